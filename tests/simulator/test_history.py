"""The linearizability checker: histories that are known good or bad, and the brute-force twin on thousands of small ones."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest
from reference import linearize as twin

from marble.errors import InvariantError
from marble.testing.history import History, Operation, OperationKind, check
from marble.testing.linearize import Answer

Play = Callable[[History], None]


def play(text: str) -> History:
    """A history from lines of ``client: operation @ called-returned``; ``?`` for a return that never came.

    Operations: ``w x 1``, ``r x 1``, ``c x 1 2`` (cas that took effect), ``f x 1 2`` (cas that did not), ``d x`` and
    ``d x 1`` (delete without and with an answer). ``-`` reads nothing.
    """
    history = History()
    moments: list[tuple[int, int, int, list[str], str]] = []
    for number, line in enumerate(filter(None, map(str.strip, text.splitlines()))):
        client, rest = line.split(": ")
        words, span = rest.split(" @ ")
        called, returned = span.split("-")
        moments.append((int(called), 0, number, words.split(), client))
        if returned != "?":
            moments.append((int(returned), 1, number, words.split(), client))
    numbers: dict[int, int] = {}
    for at, what, line_number, words, client in sorted(moments):
        value = None if words[-1] == "-" else words[-1]
        if what == 0:
            numbers[line_number] = _call(history, client, words, at)
        else:
            answers: dict[str, Any] = {"w": None, "r": value, "c": True, "f": False}
            answer = (int(words[2]) if len(words) > 2 else None) if words[0] == "d" else answers[words[0]]
            history.answer(numbers[line_number], answer, at)
    return history


def _call(history: History, client: str, words: list[str], at: int) -> int:
    key = words[1]
    match words[0]:
        case "w":
            return history.write(client, key, words[2], at)
        case "r":
            return history.read(client, key, at)
        case "d":
            return history.delete(client, [key], at)
    return history.cas(client, key, words[2], words[3], at)


GOOD = {
    "nothing happened": "",
    "one after the other": "a: w x 1 @ 1-2\nb: r x 1 @ 3-4\na: w x 2 @ 5-6\nb: r x 2 @ 7-8",
    "nothing is there before the first write": "a: r x - @ 1-2\nb: w x 1 @ 3-4",
    # Herlihy and Wing, figure 1, as a register.
    "a read beside a write may see it or not": "a: w x 1 @ 1-10\nb: r x - @ 2-3\nb: r x 1 @ 4-5\nc: w x 2 @ 11-12",
    "porcupine's register": "a: w x 100 @ 0-100\nb: r x 100 @ 25-75\nc: r x - @ 30-60",
    "writes beside each other go either way": "a: w x 1 @ 1-10\nb: w x 2 @ 1-10\nc: r x 1 @ 11-12",
    "an unknown write shows up late": "a: w x 1 @ 1-2\na: w x 2 @ 3-?\nb: r x 1 @ 4-5\nb: r x 1 @ 6-7\nb: r x 2 @ 8-9",
    "an unknown write is seen by a read that began before it": "b: r x 1 @ 1-3\na: w x 1 @ 2-?",
    "an unknown write never shows up": "a: w x 1 @ 1-2\na: w x 2 @ 3-?\nb: r x 1 @ 4-5",
    "an unknown write overtakes a later one": "a: w x 1 @ 1-?\nb: w x 2 @ 2-3\nb: r x 2 @ 4-5\nb: r x 1 @ 6-7",
    "two unknown writes, each seen once": "a: w x 1 @ 1-?\nb: w x 2 @ 1-?\nc: r x 2 @ 3-4\nc: r x 1 @ 5-6",
    "the same value twice, unknown both times": "a: w x 1 @ 1-?\nb: w x 1 @ 1-?\nc: w x 2 @ 2-3\nd: r x 1 @ 4-5\n"
    "c: w x 2 @ 6-7\nd: r x 1 @ 8-9",
    "a cas that was not answered took effect": "a: w x 1 @ 1-2\nb: c x 1 2 @ 3-?\nc: r x 2 @ 5-6",
    "a chain of swaps whose order only the values tell": "a: w x 1 @ 1-2\nb: c x 3 4 @ 3-20\nc: c x 2 3 @ 3-20\nd: c x 1 2 @ 3-20\n"
    "a: r x 4 @ 21-22",
    "a refused swap needs another value there, if for a moment": "a: w x 1 @ 1-2\na: w x 2 @ 3-9\nb: w x 1 @ 3-9\nc: f x 1 3 @ 4-8\n"
    "d: r x 1 @ 10-11",
    "deleted, and not there": "a: w x 1 @ 1-2\na: d x 1 @ 3-4\na: d x 0 @ 5-6\nb: r x - @ 7-8",
    "of two that delete one finds it": "a: w x 1 @ 1-2\nb: d x 1 @ 3-9\nc: d x 0 @ 3-9",
    "an unknown delete explains an absence": "a: w x 1 @ 1-2\nb: d x @ 3-?\nc: r x - @ 5-6",
    "keys do not disturb each other": "a: w x 1 @ 1-2\na: w y 1 @ 1-2\nb: r x 1 @ 3-4\nb: r y 1 @ 3-4",
}

BAD = {
    "stale read": "a: w x 1 @ 1-2\na: w x 2 @ 3-4\nb: r x 1 @ 5-6",
    "the write is not there": "a: w x 1 @ 1-2\nb: r x - @ 3-4",
    "porcupine's register": "a: w x 200 @ 0-100\nb: r x 200 @ 10-30\nc: r x - @ 40-90",
    "never written": "a: w x 1 @ 1-2\nb: r x 7 @ 3-4",
    "read before it was written": "b: r x 1 @ 1-2\na: w x 1 @ 3-4",
    "lost update": "a: w x 1 @ 1-2\nb: c x 1 2 @ 3-8\nc: c x 1 3 @ 3-8",
    "an acknowledged write is lost under an older one": "a: w x 1 @ 1-2\nb: w x 2 @ 3-4\nc: r x 2 @ 5-6\nc: r x 1 @ 7-8",
    "two clients read in opposite orders": "a: w x 1 @ 1-20\nb: w x 2 @ 1-20\nc: r x 1 @ 2-3\nc: r x 2 @ 6-7\n"
    "d: r x 2 @ 2-3\nd: r x 1 @ 6-7",
    "an unknown write is seen and then not": "a: w x 1 @ 1-2\na: w x 2 @ 3-?\nb: r x 2 @ 4-5\nb: r x 1 @ 6-7",
    "an unknown write takes effect twice": "a: w x 1 @ 1-?\nb: w x 2 @ 2-3\nc: r x 1 @ 4-5\nb: w x 3 @ 6-7\nc: r x 1 @ 8-9",
    "an unknown write takes effect before it was called": "a: r x 1 @ 1-2\nb: w x 1 @ 3-?",
    "a deleted row comes back": "a: w x 1 @ 1-2\na: d x 1 @ 3-4\nb: r x - @ 5-6\nb: r x 1 @ 7-8",
    "two delete the same row": "a: w x 1 @ 1-2\nb: d x 1 @ 3-9\nc: d x 1 @ 3-9",
    "a cas succeeds on a value that is gone": "a: w x 1 @ 1-2\na: w x 2 @ 3-4\nb: c x 1 3 @ 5-6",
    "a cas is refused although nothing else was there": "a: w x 1 @ 1-2\nb: f x 1 2 @ 3-4",
    "a write beside a cas hides neither before nor after it": "a: w x 1 @ 1-2\nb: w x 9 @ 3-6\nc: c x 1 2 @ 3-6\nd: r x 2 @ 7-8",
    "one of many keys": "a: w y 1 @ 1-2\na: w x 1 @ 1-2\na: w z 1 @ 1-2\nb: r y 1 @ 3-4\nb: r x - @ 3-4\nb: r z 1 @ 3-4",
}


@pytest.mark.parametrize("name", GOOD)
@pytest.mark.parametrize("atomic", [False, True])
def test_good(name: str, atomic: bool) -> None:
    verdict = check(play(GOOD[name]), atomic=atomic)
    assert verdict.ok, verdict
    assert verdict.answer is Answer.LINEARIZABLE
    assert (verdict.keys, verdict.operations) == ((), ())


@pytest.mark.parametrize("name", BAD)
@pytest.mark.parametrize("atomic", [False, True])
def test_bad(name: str, atomic: bool) -> None:
    verdict = check(play(BAD[name]), atomic=atomic)
    assert verdict.answer is Answer.VIOLATED
    assert not verdict.ok
    assert verdict.keys == ("x",)
    assert not twin.linearizable(verdict.operations)


@pytest.mark.parametrize("name", [*GOOD, *BAD])
def test_the_twin_agrees(name: str) -> None:
    for some, good in ((GOOD, True), (BAD, False)):
        if name in some:
            assert twin.linearizable(list(play(some[name]).operations.values())) is good


def test_a_refused_write_must_not_show_up_and_an_unknown_one_may() -> None:
    history = History()
    number = history.write("a", "x", 1)
    answer = history.read("b", "x")
    history.answer(answer, 1)
    assert check(history).ok
    history.refuse(number)
    assert check(history).answer is Answer.VIOLATED


def test_what_has_ended_cannot_end_again() -> None:
    history = History()
    first, second = history.write("a", "x", 1), history.write("a", "x", 2)
    history.answer(first)
    history.refuse(second)
    for number in (first, second):
        with pytest.raises(InvariantError, match="ended already"):
            history.answer(number)
        with pytest.raises(InvariantError, match="ended already"):
            history.refuse(number)


def test_a_first_value_may_be_given() -> None:
    history = History()
    history.answer(history.read("a", "x"), 0)
    assert check(history).answer is Answer.VIOLATED
    assert check(history, initial=0).ok


def test_half_a_batch_is_seen_only_where_keys_are_kept_together() -> None:
    history = History()
    history.answer(history.upsert("a", {1: "old", 2: "old"}))
    batch = history.upsert("a", {1: "new", 2: "new"})
    history.answer(history.scan("b"), {1: "new", 2: "old"})
    history.answer(batch)
    assert check(history).ok
    verdict = check(history, atomic=True)
    assert verdict.answer is Answer.VIOLATED
    assert verdict.keys == (1, 2)


def test_a_scan_says_what_is_not_there() -> None:
    history = History()
    history.answer(history.upsert("a", {1: "one", 2: "two", 3: "three"}))
    history.answer(history.scan("b", 2, 3), {2: "two"})
    history.answer(history.scan("b", 2), {2: "two", 3: "three"})
    history.answer(history.get("b", [1, 4]), {1: "one"})
    assert check(history).ok
    history.answer(history.scan("b", None, 3), {1: "one"})
    verdict = check(history)
    assert verdict.answer is Answer.VIOLATED
    assert verdict.keys == (2,)


@pytest.mark.parametrize("atomic", [False, True])
def test_a_row_that_was_not_asked_for_is_a_violation(atomic: bool) -> None:
    history = History()
    history.answer(history.upsert("a", {1: "one", 2: "two"}))
    history.answer(history.get("b", [1]), {1: "one", 2: "two"})
    assert check(history, atomic=atomic).answer is Answer.VIOLATED


@pytest.mark.parametrize("atomic", [False, True])
def test_more_rows_deleted_than_named_is_a_violation(atomic: bool) -> None:
    history = History()
    history.answer(history.upsert("a", {1: "one", 2: "two"}))
    number = history.delete("a", [1])
    history.answer(number, 2)
    assert check(history, atomic=atomic).answer is Answer.VIOLATED


def test_the_explanation_is_short_and_says_what_could_have_been() -> None:
    rng, history = random.Random(5), History()
    value: dict[str, int] = {}
    for number in range(400):
        key = rng.choice("xyz")
        if rng.random() < 0.5:
            value[key] = number
            history.answer(history.write(rng.randrange(5), key, number, at=10 * number), at=10 * number + 5)
        else:
            history.answer(history.read(rng.randrange(5), key, at=10 * number), value.get(key), at=10 * number + 5)
    stale = value["y"]
    history.answer(history.write(6, "y", "fresh", at=4000), at=4010)
    history.answer(history.read(7, "y", at=4020), stale, at=4030)
    for number in range(500, 600):
        history.answer(history.read(8, "y", at=10 * number), "fresh", at=10 * number + 5)
    verdict = check(history)
    assert verdict.answer is Answer.VIOLATED
    assert str(verdict).splitlines() == [
        "not linearizable at key 'y': no order of these 3 of 502 operations explains the answers",
        f"  client {verdict.operations[0].client}  write 'y' = {stale}      [{10 * stale}, {10 * stale + 5}]",
        "  client 6  write 'y' = 'fresh'  [4000, 4010]",
        f"  client 7  read 'y' -> {stale}      [4020, 4030]  <- by then it can only have been 'fresh'",
    ]


def test_the_search_gives_up_and_says_so() -> None:
    history = History()
    numbers = [history.write(client, "x", client) for client in range(30)]
    reads = [history.read(client, "x") for client in range(30, 60)]
    history.answer(history.read(99, "y"), None)
    for client, number in enumerate(reads):
        history.answer(number, client)
    history.answer(history.read(98, "x"), "never")
    for number in numbers:
        history.answer(number)
    verdict = check(history, explored_max=50)
    assert verdict.answer is Answer.UNDECIDED
    assert verdict.keys == ("x",)
    assert not verdict.ok
    assert "'x'" in str(verdict)


def test_a_violation_at_one_key_is_found_though_another_is_undecided() -> None:
    history = History()
    numbers = [history.write(client, "x", client) for client in range(30)]
    reads = [history.read(client, "x") for client in range(30, 60)]
    for client, number in enumerate(reads):
        history.answer(number, client)
    for number in numbers:
        history.answer(number)
    history.answer(history.read(1, "y"), "never")
    verdict = check(history, explored_max=5)
    assert (verdict.answer, verdict.keys) == (Answer.VIOLATED, ("y",))


def test_operations_have_words() -> None:
    history = History()
    for number, answer in (
        (history.upsert("a", {1: "p", 2: "q"}), None),
        (history.delete("a", [1, 2]), 1),
        (history.cas("a", 1, "p", "q"), False),
        (history.read("a", 1), None),
        (history.get("a", [1]), {}),
        (history.scan("a", 1), {2: "q"}),
        (history.scan("a"), {}),
    ):
        history.answer(number, answer)
    history.delete("a", [1])
    assert [str(operation) for operation in history.operations.values()] == [
        "write 1 = 'p', 2 = 'q'",
        "delete 1, 2 -> 1",
        "cas 1 from 'p' to 'q' -> False",
        "read 1 -> None",
        "get 1 -> {}",
        "scan from 1 -> {2: 'q'}",
        "scan all -> {}",
        "delete 1 -> unknown",
    ]


def draw(rng: random.Random, keys: int, several: bool) -> list[Operation]:
    """A small history of a table that works, with some answers lost and, sometimes, one of them wrong.

    Values are few, so that one of them may come from several writes.
    """
    history, table = History(), dict[int, int]()
    pending: dict[int, tuple[int, Operation]] = {}
    count, lost, wrong = rng.randrange(2, 9), rng.random() * 0.5, rng.random() * 0.3
    while count or pending:
        client = rng.randrange(4)
        if client not in pending:
            if count:
                count -= 1
                number = _draw_call(rng, history, client, keys, several)
                pending[client] = (0, history.operations[number])
            continue
        done, operation = pending[client]
        if not done:
            operation.answer = twin.apply(operation, table) if rng.random() > lost / 2 else _draw_answer(rng, operation)
            pending[client] = (1, operation)
            continue
        del pending[client]
        if rng.random() < lost:
            operation.answer = None
        else:
            answer = _draw_answer(rng, operation) if rng.random() < wrong else operation.answer
            history.answer(operation.called, answer)
    return list(history.operations.values())


def _draw_call(rng: random.Random, history: History, client: int, keys: int, several: bool) -> int:
    key, value = rng.randrange(keys), rng.randrange(1, 5)
    some = rng.sample(range(keys), rng.randrange(1, keys + 1)) if several else [key]
    match rng.randrange(7):
        case 0 | 1:
            return history.upsert(client, dict.fromkeys(some, value))
        case 2:
            return history.delete(client, some)
        case 3:
            return history.cas(client, key, rng.choice((None, 1, 2, 3)), value)
        case 4 if several:
            return history.get(client, some)
        case 5 if several:
            return history.scan(client, rng.choice((None, 0, 1)), rng.choice((None, 1, 2)))
    return history.read(client, key)


def _draw_answer(rng: random.Random, operation: Operation) -> Any:
    match operation.kind:
        case OperationKind.WRITE:
            return None
        case OperationKind.CAS:
            return rng.random() < 0.5
        case OperationKind.READ:
            return rng.choice((None, 1, 2, 3, 4))
        case OperationKind.DELETE:
            return rng.choice((None, *range(len(operation.argument) + 1)))
        case OperationKind.GET:
            return {key: rng.randrange(1, 5) for key in operation.argument if rng.random() < 0.7}
    first, end = operation.argument
    inside = range(0 if first is None else first, 3 if end is None else end)
    return {key: rng.randrange(1, 5) for key in inside if rng.random() < 0.5}


@pytest.mark.parametrize(("keys", "several"), [(1, False), (2, False), (3, True)])
def test_the_twin_agrees_on_thousands_of_small_histories(keys: int, several: bool) -> None:
    verdicts = {True: 0, False: 0}
    for seed in range(2000):
        operations = draw(random.Random(seed), keys, several)
        expected = twin.linearizable(operations)
        verdict = check(operations, atomic=several)
        assert verdict.ok is expected, f"seed {seed}: {verdict}\n" + "\n".join(map(str, operations))
        verdicts[expected] += 1
        if not expected:
            assert not twin.linearizable(verdict.operations), f"seed {seed}: no witness: {verdict}"
        elif several:
            # What holds for all keys together holds for each.
            assert check(operations).ok, f"seed {seed}"
    assert min(verdicts.values()) > 300, verdicts


def test_unknown_operations_that_do_the_same_cost_like_one() -> None:
    history = History()
    for round_ in range(12):
        history.answer(history.write("a", "x", round_))
        history.delete("b", ["x"])
        history.write("b", "x", "again")
    history.answer(history.delete("c", ["x"]), 1)
    history.answer(history.read("c", "x"), "again")
    history.answer(history.read("c", "x"), 11)
    verdict = check(history)
    assert verdict.answer is Answer.VIOLATED
    # Any of the 24 may be used, in any order; but it does not matter which of twelve equal ones is.
    assert verdict.explored < 200


def test_long_histories_of_many_clients_are_quick_to_search() -> None:
    for seed, keys in ((1, 1), (2, 20)):
        rng, history, table = random.Random(seed), History(), dict[int, int]()
        pending: dict[int, Operation] = {}
        applied: set[int] = set()
        for value in range(6000):
            client = rng.randrange(12)
            operation = pending.get(client)
            key = rng.randrange(keys)
            if operation is None:
                number = history.write(client, key, value) if rng.random() < 0.5 else history.read(client, key)
                pending[client] = history.operations[number]
            elif operation.called not in applied:
                operation.answer = twin.apply(operation, table)
                applied.add(operation.called)
            else:
                del pending[client]
                if rng.random() > 0.1:
                    history.answer(operation.called, operation.answer)
        verdict = check(history)
        assert verdict.ok, verdict
        # A search that tries all orders of what overlaps would look at some thousands for each operation.
        assert verdict.explored < 20 * len(history.operations)
