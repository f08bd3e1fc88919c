"""Appends that have gathered for one follower as fewer, larger ones.

While a packet is on its way a leader may have sent a follower many small appends. Each would cost the follower a step, a place in its
next sync and an answer. Those that follow on one another say the same as one with all their entries.

Rule 1: only what lies waiting anyway is merged. Nobody waits for more to come.

Invariants:
- The entries of each group, their order, and the last commit index said of it stay what they were.
- Two appends are merged only if the second would be accepted whenever the first was: the same term, and the entry before the second's
  first one is the first's last one (Raft §5.3).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Final

import pyarrow as pa

from marble._core import entry_batch
from marble.raft.messages import Message, MessageKind
from marble.transport.codec import Envelope

MERGED_BYTES_MAX: Final = 1 << 20
"""Merging copies: above this a message's own cost is no longer what counts."""


class _Run:
    """Appends of one group that make one message."""

    def __init__(self, envelope: Envelope) -> None:
        self.parts = [envelope]
        self.nbytes = envelope.nbytes

    def takes(self, envelope: Envelope) -> bool:
        """Whether `envelope` follows on the last part."""
        last, message = self.parts[-1].message, envelope.message
        assert last.entries is not None
        end_term = last.entries.last_term if len(last.entries) else last.log_term
        return (
            message.term == last.term
            and message.log_index == last.entries.end - 1
            and message.log_term == end_term
            and (message.context, message.reject_hint, message.reject) == (last.context, last.reject_hint, last.reject)
            and self.nbytes + envelope.nbytes <= MERGED_BYTES_MAX
        )

    def add(self, envelope: Envelope) -> None:
        self.parts.append(envelope)
        self.nbytes += envelope.nbytes

    def merged(self) -> Envelope:
        """All parts as one."""
        if len(self.parts) == 1:
            return self.parts[0]
        first = self.parts[0].message
        batches = [part.batch for part in self.parts if part.batch is not None]
        batch: pa.RecordBatch | None = entry_batch.concat(batches) if batches else None
        message: Message = replace(
            first,
            commit=max(part.message.commit for part in self.parts),
            entries=first.entries if batch is None else entry_batch.span(batch),
            changes=tuple(index for part in self.parts for index in part.message.changes),
        )
        return Envelope(self.parts[0].group, message, batch)


def merge_appends(envelopes: Sequence[Envelope]) -> list[Envelope]:
    """`envelopes`, which are all to one node, with appends that follow on one another as one, in the place of the first."""
    merged: list[_Run | Envelope] = []
    latest: dict[int, _Run] = {}
    for envelope in envelopes:
        if envelope.message.kind is not MessageKind.APPEND_ENTRIES:
            merged.append(envelope)
            continue
        run = latest.get(envelope.group)
        if run is not None and run.takes(envelope):
            run.add(envelope)
        else:
            run = latest[envelope.group] = _Run(envelope)
            merged.append(run)
    return [each.merged() if isinstance(each, _Run) else each for each in merged]
