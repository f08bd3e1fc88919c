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


def test_what_follows_a_refusal_in_its_lane_is_refused_though_there_is_room_again(tmp_path: Path) -> None:
    node = Node(NodeOptions("c", 1, {1: "embedded"}, log_bytes_max=LIMIT), SystemFiles(tmp_path), TableMachine())
    node.start()
    desk, size = node._desks[0], LIMIT + 1
    node.call(lambda raft: setattr(desk, "_log_bytes", lambda: size)).result(10)
    term, stream, other = node.leading_term, Lane(), Lane()
    with pytest.raises(UnavailableError, match="max_log_size"):
        node.propose(COMMAND, term, lane=stream).result(10)
    size = 0  # A snapshot has made room.
    with pytest.raises(UnavailableError, match="max_log_size"):
        node.propose(COMMAND, term, lane=stream).result(10)
    first = node.propose(COMMAND, term, lane=other).result(10).index
    assert node.propose(COMMAND, term).result(10).index == first + 1
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

    node._engine.call(offer_all).result(10)
    for offer in offers:
        if offer.lane is refused:
            with pytest.raises(UnavailableError, match="before"):
                offer.future.result(10)
    indexes = [offer.future.result(10).index for offer in offers if offer.lane is not refused]
    assert indexes == list(range(indexes[0], indexes[0] + 3))
    node.stop()
