"""A byte that changes on its way from the proposer to a replica's tables is caught at the next hop, whichever it changed on.

On disk that is `tests/logstore/test_recovery.py` (``test_one_flipped_bit_anywhere_is_never_silent``).
"""

from __future__ import annotations

import ctypes

import pyarrow as pa
import pytest

from marble._core import entry_batch
from marble._core.entry_batch import Proposal, encode_payload
from marble.errors import CorruptionError, ProtocolError
from marble.lsm import payload
from marble.lsm.machine import TableMachine
from marble.raft.messages import Message, MessageKind
from marble.transport.codec import Codec, Envelope
from marble.types import EntryKind

SCHEMA = pa.schema([pa.field("id", pa.int64(), nullable=False), ("name", pa.string())])
CREATE = Proposal(EntryKind.CREATE_TABLE, 0, payload.encode_create_table("t", SCHEMA, ["id"]))


def write() -> Proposal:
    """A write whose payload is in memory of its own, so that a test may spoil it."""
    encoded = encode_payload(pa.record_batch([[1, 2], ["one", "two"]], schema=SCHEMA))
    return Proposal(EntryKind.WRITE, 1, pa.py_buffer(bytearray(encoded.to_pybytes())), 5, 6)


def flip(buffer: pa.Buffer, at: int) -> None:
    """Change one bit of memory, behind Arrow's back."""
    address = buffer.address + at
    ctypes.c_ubyte.from_address(address).value ^= 1


def column(batch: pa.RecordBatch, name: str) -> pa.Buffer:
    return batch.column(name).buffers()[-1]


def first_byte(batch: pa.RecordBatch, name: str) -> int:
    """Where the last row's value of a column starts in its last buffer."""
    found = batch.column(name)
    if name == "payload":
        return sum(len(value.as_py()) for value in found[:-1])
    return (len(found) - 1) * found.type.bit_width // 8


@pytest.mark.parametrize("at", [0, 63, 64, -1])
def test_between_the_proposer_s_encoder_and_the_log(at: int) -> None:
    proposal = write()
    assert proposal.payload is not None
    flip(proposal.payload, at % proposal.payload.size)
    batch = entry_batch.build(1, 1, 1, [CREATE, proposal])
    with pytest.raises(CorruptionError, match="entry 2 of"):
        entry_batch.verify(batch)
    machine = TableMachine()
    with pytest.raises(CorruptionError, match="entry 2 of"):
        machine.apply(batch)
    assert machine.tables() == []


@pytest.mark.parametrize("name", ["kind", "session", "sequence", "table", "checksum", "payload"])
def test_in_memory_before_it_is_applied(name: str) -> None:
    batch = entry_batch.build(1, 1, 1, [CREATE, write()])
    flip(column(batch, name), first_byte(batch, name))
    machine = TableMachine()
    with pytest.raises(CorruptionError, match="entry 2 of"):
        machine.apply(batch)
    assert machine.tables() == []


@pytest.mark.parametrize(
    "name", ["kind", "session", "sequence", "table", "checksum", "payload", "index", "term", "time_us"]
)
def test_on_the_wire(name: str) -> None:
    batch = entry_batch.build(1, 1, 1, [CREATE, write()])
    message = Message(
        MessageKind.APPEND_ENTRIES,
        1,
        2,
        1,
        log_index=0,
        log_term=0,
        commit=0,
        entries=entry_batch.span(batch),
        changes=(),
    )
    (packet,) = Codec("c", 1, 1 << 20).encode(2, [Envelope(1, message, batch)])
    assert packet.batch is not None
    other = Codec("c", 2, 1 << 20)
    assert other.decode(1, packet.metadata, packet.batch)
    flip(column(packet.batch, name), first_byte(packet.batch, name))
    with pytest.raises(ProtocolError):
        other.decode(1, packet.metadata, packet.batch)
