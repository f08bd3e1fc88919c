"""`Progress` and `Inflights` against their twin, which counts nothing and looks everything up."""

from __future__ import annotations

from typing import Any

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from reference.progress import Progress as Twin

from marble.raft.progress import Inflights, Progress, ProgressState

near = st.integers(-3, 6)


class ProgressModel(RuleBasedStateMachine):
    """A peer that says anything, and a leader that sends when it may."""

    real: Progress
    twin: Twin

    @initialize(window=st.integers(1, 4), window_bytes=st.sampled_from((1, 10, 20, 30)), following=st.integers(1, 6))
    def start(self, window: int, window_bytes: int, following: int) -> None:
        self.real = Progress(following, Inflights(window, window_bytes))
        self.twin = Twin(window, window_bytes, following)

    @precondition(lambda self: not self.twin.looks()["blocked"])
    @rule(count=st.integers(0, 3), size=st.sampled_from((0, 10, 20)), commit=st.integers(0, 12))
    def send(self, count: int, size: int, commit: int) -> None:
        """With a full window, which an answer to a heartbeat opens by a gap, nothing but an empty message goes."""
        if self.twin.full:
            count = size = 0
        self.real.sent_entries(count, size)
        self.twin.sent_entries(count, size)
        self.real.sent_commit = self.twin.sent_commit = min(commit, self.twin.next_index - 1)

    @rule(
        messages=st.lists(st.tuples(st.integers(1, 3), st.sampled_from((0, 10, 20))), max_size=5),
        answered=st.integers(0, 9),
    )
    def stream(self, messages: list[tuple[int, int]], answered: int) -> None:
        """The usual way: a peer whose log is known gets message after message, and has answered some of them."""
        if self.twin.state != "replicate":
            self.become("replicate", 1)
        for count, size in messages:
            if not self.twin.looks()["blocked"]:
                self.send(count, size, self.twin.match_index)
        if messages:
            self.acknowledge(min(answered, self.twin.next_index - 1 - self.twin.match_index))

    @rule(offset=near)
    def acknowledge(self, offset: int) -> None:
        """What was known already, or more, or more than was ever sent: a peer may know it from another leader."""
        index = max(0, self.twin.match_index + offset)
        assert self.real.maybe_update(index) == self.twin.maybe_update(index)
        self.real.inflights.free(index)
        self.twin.free(index)

    @rule(offset=near, hint=st.integers(0, 20))
    def refuse(self, offset: int, hint: int) -> None:
        """The last probe, an older one, or something that is known to match. What was streamed beyond it is in vain."""
        rejected = max(0, self.twin.next_index - 1 + min(offset, 0))
        news = self.twin.maybe_decrease(rejected, hint)
        assert self.real.maybe_decrease(rejected, hint) == news
        if news and self.twin.state == "replicate":
            self.everything_agrees()
            self.become("probe", 1)

    @rule(to=st.sampled_from(["probe", "replicate", "snapshot"]), beyond=st.integers(1, 9))
    def become(self, to: str, beyond: int) -> None:
        index = self.twin.match_index + beyond
        match to:
            case "probe":
                self.real.become_probe()
                self.twin.become("probe")
            case "replicate":
                self.real.become_replicate()
                self.twin.become("replicate")
            case _:
                self.real.become_snapshot(index)
                self.twin.become("snapshot", index)

    @rule()
    def heartbeat_answered(self) -> None:
        self.real.paused = self.twin.paused = False

    @rule(commit=st.integers(0, 20))
    def commit_is_news(self, commit: int) -> None:
        """Only what reaches beyond what was said, to a peer that has entries which were not said to be committed."""
        told = commit <= self.twin.sent_commit or self.twin.sent_commit >= self.twin.next_index - 1
        assert self.real.can_bump_commit(commit) is not told

    @invariant()
    def everything_agrees(self) -> None:
        if not hasattr(self, "real"):
            return
        real = self.real
        looks: dict[str, Any] = {name: getattr(real, name) for name in self.twin.looks() if hasattr(real, name)}
        looks |= {"state": real.state.value}
        looks |= {name: getattr(real.inflights, name) for name in ("count", "bytes", "full")}
        assert looks == self.twin.looks()

    @invariant()
    def the_docstrings_hold(self) -> None:
        if not hasattr(self, "real"):
            return
        real = self.real
        assert 0 <= real.match_index < real.next_index
        assert real.sent_commit < real.next_index
        assert (real.pending_snapshot != 0) == (real.state is ProgressState.SNAPSHOT)
        assert real.inflights.count <= self.twin.window
        if real.state is not ProgressState.REPLICATE:
            assert real.inflights.count == 0
        for text in (real.state.value, f"match={real.match_index}", f"next={real.next_index}"):
            assert text in repr(real)


ProgressModel.TestCase.settings = settings(max_examples=120, stateful_step_count=40, deadline=None)
TestProgressModel = ProgressModel.TestCase
