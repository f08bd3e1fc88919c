"""What is compacted next, as a pure function of the levels."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from marble.errors import InvariantError
from marble.lsm.compaction import CompactionPolicy, Plan, backlog_bytes, next_change, plan_compaction
from marble.lsm.files import TableFile
from marble.lsm.levels import Levels

POLICY = CompactionPolicy(
    level0_files=3,
    level0_files_max=6,
    level0_share=4,
    level0_overlap_files=3,
    level1_bytes=100,
    ratio=10,
    file_bytes_max=40,
)


def file(
    first: str,
    last: str,
    nbytes: int = 10,
    name: str = "",
    ttl_max: int | None = None,
    rows: int = 1,
    ttl_min: int | None = None,
    tombstones: int = 0,
) -> TableFile:
    name = name or f"{first}-{last}-{nbytes}"
    ttl_min = ttl_max if ttl_min is None else ttl_min
    return TableFile(name, nbytes, rows, tombstones, first.encode(), last.encode(), 1, 1, ttl_min, ttl_max)


def levels(*each: list[TableFile]) -> Levels:
    return Levels.of(each)


def names(plan: Plan | None) -> tuple[list[list[str]], int | None, bool, bool] | None:
    if plan is None:
        return None
    return [[file.name for file in run] for run in plan.runs], plan.level, plan.rewrite, plan.drop_tombstones


def test_nothing_to_do() -> None:
    assert plan_compaction(Levels(), POLICY) is None
    assert plan_compaction(levels([file("a", "z")] * 2, [file("a", "z", 99)]), POLICY) is None


def test_level_0_goes_into_level_1() -> None:
    above = [file("c", "f", 9, "3"), file("a", "d", 9, "2"), file("c", "g", 9, "1")]
    met, apart = [file("a", "b", 9, "x"), file("e", "k", 9, "y")], [file("m", "p", 9, "z")]
    deeper = [file("k", "l", 9, "d")]
    assert names(plan_compaction(levels(above, met + apart), POLICY)) == (
        [["3"], ["2"], ["1"], ["x", "y"]],
        1,
        True,
        True,
    )
    # k is in the range of what is merged, and deeper down.
    assert names(plan_compaction(levels(above, met + apart, deeper), POLICY)) == (
        [["3"], ["2"], ["1"], ["x", "y"]],
        1,
        True,
        False,
    )
    assert names(plan_compaction(levels(above, apart, [file("h", "i")]), POLICY)) == (
        [["3"], ["2"], ["1"]],
        1,
        True,
        True,
    )


def test_large_files_that_are_apart_move() -> None:
    above = [file("g", "h", 10, "3"), file("a", "d", 12, "2"), file("e", "f", 11, "1")]
    assert names(plan_compaction(levels(above), POLICY)) == ([["2", "1", "3"]], 1, False, False)
    small = [*above[:2], file("e", "f", 9, "1")]
    assert names(plan_compaction(levels(small), POLICY)) == ([["3"], ["2"], ["1"]], 1, True, True)


def test_level_0_is_tiered_while_level_1_is_much_larger() -> None:
    below = [file("a", "z", 90, "x")]
    above = [file("a", "z", 1, "4"), file("a", "z", 2, "3"), file("a", "z", 6, "2"), file("a", "z", 12, "1")]
    assert names(plan_compaction(levels(above, below), POLICY)) == ([["4"], ["3"], ["2"], ["1"]], 0, True, False)
    # The oldest stays out: it is too large. So a tombstone may still hide what is in it.
    above[3] = file("a", "b", 13, "1")
    above[0] = file("c", "z", 0, "4")
    assert names(plan_compaction(levels(above, below), POLICY)) is None
    above[2] = file("c", "z", 3, "2")
    assert names(plan_compaction(levels(above, below), POLICY)) == ([["3"], ["2"]], 0, True, False)
    # With so many it does not matter how large level 1 is.
    many = [file("a", "z", 0, f"{i}") for i in range(6)]
    assert names(plan_compaction(levels(many, below), POLICY)) == (
        [*([f"{i}"] for i in range(6)), ["x"]],
        1,
        True,
        True,
    )


def test_few_files_of_level_0_go_down_as_soon_as_half_of_all_may_be_of_no_use() -> None:
    policy = replace(POLICY, level0_overlap_files=2)
    new, old = file("a", "d", 9, "new"), file("c", "g", 9, "old")
    assert names(plan_compaction(levels([new, old]), policy)) == ([["new"], ["old"]], 1, True, True)
    assert plan_compaction(levels([new]), policy) is None
    # Nothing of them can be the same row.
    apart = file("e", "g", 9, "apart")
    assert plan_compaction(levels([new, apart]), policy) is None
    met = [file("a", "f", 18, "met")]
    assert names(plan_compaction(levels([new, apart], met), policy)) == ([["new"], ["apart"], ["met"]], 1, True, True)
    assert names(plan_compaction(levels([new, old], met, [file("b", "b")]), policy)) == (
        [["new"], ["old"], ["met"]],
        1,
        True,
        False,
    )
    # More would be written than that is worth.
    assert plan_compaction(levels([new, old], [file("a", "f", 19)]), policy) is None


def test_a_deep_level_that_is_too_large_gives_its_cheapest_file() -> None:
    one = [file("a", "b", 50, "p"), file("c", "d", 51, "q"), file("e", "f", 10, "r")]
    two = [file("a", "c", 40, "x"), file("d", "e", 30, "y"), file("f", "g", 20, "z")]
    assert names(plan_compaction(levels([], one, two), POLICY)) == ([["p"], ["x"]], 2, True, True)
    assert names(plan_compaction(levels([], one, two, [file("c", "c")]), POLICY)) == ([["p"], ["x"]], 2, True, False)
    assert names(plan_compaction(levels([], one, two), POLICY, damaged={"x"})) == ([["r"], ["y", "z"]], 2, True, True)
    assert names(plan_compaction(levels([], one, two[1:]), POLICY)) == ([["p"]], 2, False, False)
    # What is compressed down there cannot move as it is.
    assert names(plan_compaction(levels([], one, two[1:]), POLICY, compressed=True)) == ([["p"]], 2, True, True)


def test_the_level_that_is_fullest_for_its_size_goes_first() -> None:
    one, two = [file("a", "b", 150, "p")], [file("a", "b", 1600, "x")]
    assert names(plan_compaction(levels([], one, two), POLICY)) == ([["x"]], 3, False, False)
    assert names(plan_compaction(levels([], one, two), POLICY, damaged={"x"})) is None


def test_expired_files_go_if_they_hide_nothing() -> None:
    old, new = file("a", "c", 9, "old", ttl_max=5), file("d", "e", 9, "new", ttl_max=6)
    assert names(plan_compaction(levels([new, old]), POLICY, 5)) == ([["old"]], None, False, False)
    assert names(plan_compaction(levels([new, old]), POLICY, 4)) is None
    assert names(plan_compaction(levels([new, old]), POLICY, 6)) == ([["old"], ["new"]], None, False, False)
    # Under it is a row that lives: it would come back, so a tombstone stays, which has no time.
    under = file("b", "b", 9, "under", ttl_max=9)
    assert names(plan_compaction(levels([new, old], [under]), POLICY, 5)) == ([["old"]], 0, True, False)
    assert names(plan_compaction(levels([old, under]), POLICY, 5)) == ([["old"]], 0, True, False)
    assert names(plan_compaction(levels([under, old]), POLICY, 5)) == ([["old"]], None, False, False)
    assert names(plan_compaction(levels([old], [under]), POLICY, 9)) == ([["under"], ["old"]], None, False, False)
    # One without a time in some row never goes.
    assert plan_compaction(levels([file("a", "b")]), POLICY, 10**9) is None


def test_files_of_nothing_but_tombstones_go_if_they_hide_nothing() -> None:
    empty, under = file("a", "c", 9, "empty", rows=7, tombstones=7), file("b", "b", 9, "under")
    for until in (None, 5):
        assert names(plan_compaction(levels([empty, file("d", "e")]), POLICY, until)) == (
            [["empty"]],
            None,
            False,
            False,
        )
        assert plan_compaction(levels([empty, under]), POLICY, until) is None
        assert plan_compaction(levels([], [empty], [under]), POLICY, until) is None
        assert names(plan_compaction(levels([under], [empty]), POLICY, until)) == ([["empty"]], None, False, False)


def test_a_file_is_written_anew_when_half_of_it_is_of_no_use() -> None:
    worn = file("a", "e", 9, "worn", ttl_min=100, ttl_max=299, rows=10)
    other, under = file("c", "c", 9, "other"), file("b", "b", 9, "under")
    for level in range(3):
        at = [*([[]] * level), [worn]]
        assert plan_compaction(levels(*at), POLICY, 198) is None
        assert next_change(levels(*at), POLICY, 198) == 199
        assert names(plan_compaction(levels(*at), POLICY, 199)) == ([["worn"]], level, True, True)
        assert next_change(levels(*at), POLICY, 199) == 299
        # What lies under it, or behind it in level 0, would come back; what lies above would not.
        assert names(plan_compaction(levels(*at, [under]), POLICY, 199)) == ([["worn"]], level, True, False)
        assert names(plan_compaction(levels([other], *at), POLICY, 199)) == ([["worn"]], level + 1, True, True)
    assert names(plan_compaction(levels([worn, under]), POLICY, 199)) == ([["worn"]], 0, True, False)
    assert names(plan_compaction(levels([under, worn]), POLICY, 199)) == ([["worn"]], 0, True, True)
    assert names(plan_compaction(levels([worn]), POLICY, 199, damaged={"worn"})) is None
    assert next_change(levels([worn]), POLICY, 299) is None


def test_tombstones_that_hide_nothing_are_of_no_use_either() -> None:
    half = file("a", "e", 9, "half", rows=10, tombstones=5)
    assert names(plan_compaction(levels([half]), POLICY)) == ([["half"]], 0, True, True)
    assert plan_compaction(levels([half], [file("b", "b")]), POLICY) is None
    assert plan_compaction(levels([file("a", "e", rows=10, tombstones=4)]), POLICY) is None
    # One more is over than the half that is left: of 6 rows at 0 to 59 it takes one.
    both = file("a", "e", 9, "both", rows=10, tombstones=4, ttl_min=0, ttl_max=59)
    assert plan_compaction(levels([both]), POLICY, 8) is None
    assert names(plan_compaction(levels([both]), POLICY, 9)) == ([["both"]], 0, True, True)
    # With something under it the tombstones stay, and five of the six have to be over.
    assert plan_compaction(levels([both], [file("b", "b")]), POLICY, 48) is None
    assert names(plan_compaction(levels([both], [file("b", "b")]), POLICY, 49)) == ([["both"]], 0, True, False)


def test_levels_must_be_in_order() -> None:
    with pytest.raises(InvariantError, match="overlap"):
        levels([], [file("a", "c"), file("c", "d")])


def test_backlog_counts_when_compaction_does_not_keep_up() -> None:
    assert backlog_bytes(levels([file("a", "b", 5)] * 6), POLICY) == 0
    assert backlog_bytes(levels([file("a", "b", 5)] * 7), POLICY) == 35


ranges = st.tuples(st.integers(0, 40), st.integers(0, 8), st.integers(1, 40))


@settings(max_examples=100, deadline=None)
@given(st.lists(ranges, min_size=1, max_size=60), st.integers(1, 12))
def test_it_comes_to_an_end_and_keeps_the_levels_in_order(flushes: list[tuple[int, int, int]], expired: int) -> None:
    """Flush after flush, each plan carried out by adding up sizes: never more to be done than there are files and levels."""
    now = Levels()
    for number, (first, length, nbytes) in enumerate(flushes):
        flushed = TableFile(
            f"f{number}", nbytes, 1, 0, b"%03d" % first, b"%03d" % (first + length), 1, 1, number % 15, number % 15
        )
        now = now.flushed([flushed])
        for turn in range(100):
            plan = plan_compaction(now, POLICY, expired)
            if plan is None:
                break
            assert plan.names <= {each.name for each in now}
            merged: list[TableFile] = []
            if plan.level is not None:
                merged = list(plan.files)
                if plan.rewrite:
                    keys = [key for each in plan.files for key in (each.first_key, each.last_key)]
                    total = sum(each.nbytes for each in plan.files)
                    name = f"m{number}.{turn}"
                    merged = [TableFile(name, total, 1, 0, min(keys), max(keys), 1, 1, None, None)]
            now = now.replaced(plan.names, plan.level or 0, merged)
        assert plan is None
        assert len(now[0]) < POLICY.level0_files_max
