"""``marble simulate``: what it plays, what it says, and how it ends when a history breaks."""

from __future__ import annotations

import pytest

from marble import simulate
from marble.cli import main
from marble.testing import invariants
from marble.testing.ledger import Violation


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    status = main(["simulate", *arguments])
    output = capsys.readouterr()
    return status, output.out, output.err


def test_it_tells_what_was_simulated(capsys: pytest.CaptureFixture[str]) -> None:
    status, out, err = run(capsys, "--seeds", "3", "--steps", "1000", "--plan", "crashes")
    assert (status, err) == (0, "")
    assert "3 histories held: " in out
    assert "steps/s of one core" in out
    assert "power losses" in out


def test_processes_play_the_same_histories(capsys: pytest.CaptureFixture[str]) -> None:
    status, alone, _ = run(capsys, "--seeds", "4", "--steps", "500", "--plan", "all")
    assert status == 0
    status, shared, _ = run(capsys, "--seeds", "4", "--steps", "500", "--plan", "all", "--jobs", "2")
    assert status == 0
    # Behind the line with the rate, which is the machine's; lines of progress come before it.
    found = [out.partition(" histories held: ")[2].splitlines()[1:] for out in (alone, shared)]
    assert found[0] == found[1] != []


def test_a_broken_history_is_shown_with_what_plays_it_again(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object) -> None:
        raise Violation("nothing holds")

    monkeypatch.setattr(invariants, "election_safety", broken)
    status, out, _ = run(capsys, "--seeds", "3", "--first-seed", "5", "--steps", "500", "--plan", "calm")
    assert status == 1
    assert "Violation: nothing holds" in out
    assert "plan calm, seed 5, step " in out
    assert "play it again: marble simulate --plan calm --first-seed 5 --seeds 1 --steps 500" in out
    assert len([line for line in out.splitlines() if " node " in line]) > 10
    again = out.partition("play it again: marble ")[2].split()
    assert main(again) == 1


def test_no_history_begins_after_the_time(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    now = iter(range(0, 100_000, 20))
    monkeypatch.setattr(simulate.time, "monotonic", lambda: next(now))
    status, out, _ = run(capsys, "--minutes", "1", "--steps", "200", "--plan", "calm")
    assert status == 0
    assert "histories held" in out


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--plan", "nice"], "there is no plan 'nice': choose one of swarm, "),
        (["--seeds", "0"], "--seeds 0"),
        (["--jobs", "0"], "--jobs 0"),
        (["--nodes", "10"], "up to 9"),
        (["--minutes", "0"], "--minutes 0"),
    ],
)
def test_a_wrong_call_is_one_line(capsys: pytest.CaptureFixture[str], arguments: list[str], words: str) -> None:
    status, _, err = run(capsys, *arguments)
    assert status == 2
    assert words in err
