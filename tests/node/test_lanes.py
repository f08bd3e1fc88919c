"""Offers of one stream: none takes effect after one before it was refused."""

from __future__ import annotations

from pathlib import Path

import pytest

from marble._core.entry_batch import Proposal
from marble.env import SystemFiles
from marble.errors import UnavailableError
from marble.lsm import payload
from marble.lsm.machine import TableMachine
from marble.node import Node
from marble.options import NodeOptions
from marble.promises import Lane, Offer, promise
from marble.types import EntryKind

COMMAND = Proposal(EntryKind.COMMAND, 0, payload.encode_command(b"x"))
LIMIT = 1_000_000
DEADLINE_S = 30.0


def test_what_follows_a_refusal_in_its_lane_is_refused_though_there_is_room_again(tmp_path: Path) -> None:
    node = Node(NodeOptions("c", 1, {1: "embedded"}, log_bytes_max=LIMIT), SystemFiles(tmp_path), TableMachine())
    node.start()
    desk, size = node._desks[0], LIMIT + 1
    node.call(lambda raft: setattr(desk, "_log_bytes", lambda: size)).result(DEADLINE_S)
    term, stream, other = node.leading_term, Lane(), Lane()
    with pytest.raises(UnavailableError, match="max_log_size"):
        node.propose(COMMAND, term, lane=stream).result(DEADLINE_S)
    size = 0  # A snapshot has made room.
    with pytest.raises(UnavailableError, match="max_log_size"):
        node.propose(COMMAND, term, lane=stream).result(DEADLINE_S)
    first = node.propose(COMMAND, term, lane=other).result(DEADLINE_S).index
    assert node.propose(COMMAND, term).result(DEADLINE_S).index == first + 1
    node.stop()


def test_of_offers_that_come_together_only_those_of_the_refused_lane_are_refused(tmp_path: Path) -> None:
    node = Node(NodeOptions("c", 1, {1: "embedded"}), SystemFiles(tmp_path), TableMachine())
    node.start()
    refused, good = Lane(), Lane()
    refused.refusal = UnavailableError("before")
    offers = [Offer(COMMAND, promise(), None, lane) for lane in (good, refused, None, good, refused)]

    def offer_all() -> None:
        for offer in offers:
            node._engine._offer(0, offer)

    node._engine.call(offer_all).result(DEADLINE_S)
    for offer in offers:
        if offer.lane is refused:
            with pytest.raises(UnavailableError, match="before"):
                offer.future.result(DEADLINE_S)
    indexes = [offer.future.result(DEADLINE_S).index for offer in offers if offer.lane is not refused]
    assert indexes == list(range(indexes[0], indexes[0] + 3))
    node.stop()
