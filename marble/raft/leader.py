"""Leading: replication, commitment, the check of the quorum, and reads (Raft §5.3, §5.4.2, §8; thesis §6.2, §6.4).

Rule 1: only `_maybe_commit` raises the commit index of a leader, and only for an entry of its own term (§5.4.2).
Rule 2: the leader's own entries count like a peer's: when its disk has them, not before.
"""

from __future__ import annotations

from collections.abc import Sequence

from marble._core.term_index import EntrySpan
from marble.errors import NotLeaderError, ProtocolError, UnavailableError, UsageError
from marble.raft.messages import Message, MessageKind
from marble.raft.progress import ProgressState
from marble.raft.quorum import VoteResult
from marble.raft.reads import PendingRead
from marble.raft.state import State
from marble.types import INDEX_MAX, NO_NODE, Position, Role


def start(state: State) -> None:
    """Take office: append the no-op of the term (Raft §8) and tell everyone."""
    state.become_leader()
    state.log.append(EntrySpan.of(state.noop_index, [state.term]))
    _broadcast_append(state)


def step(state: State, message: Message) -> None:
    """A message of this leader's term."""
    match message.kind:
        case MessageKind.APPEND_ENTRIES_RESPONSE:
            _on_append_response(state, message)
        case MessageKind.HEARTBEAT_RESPONSE:
            _on_heartbeat_response(state, message)
        case MessageKind.READ_INDEX:
            _read(state, PendingRead(message.sender, message.context))
        case _:
            pass  # An answer to something that this node did in another role. A second leader `Raft.step` has refused.


def tick(state: State) -> None:
    """One tick of a leader: the quorum's turn, then heartbeats."""
    state.heartbeat_elapsed += 1
    state.election_elapsed += 1
    if state.election_elapsed >= state.config.election_ticks:
        state.election_elapsed = 0
        if state.config.check_quorum and not _check_quorum(state):
            return
    if state.heartbeat_elapsed >= state.config.heartbeat_ticks:
        state.heartbeat_elapsed = 0
        _broadcast_heartbeat(state)


def propose(state: State, sizes: Sequence[int]) -> Position:
    """Append entries of these `sizes`. See `Raft.propose`."""
    if state.role is not Role.LEADER:
        known = f"; node {state.leader} does" if state.leader != NO_NODE else ""
        raise NotLeaderError(f"node {state.id} does not lead term {state.term}{known}")
    if not sizes:
        raise UsageError("a proposal has at least one entry")
    if not all(0 <= size <= INDEX_MAX for size in sizes):
        raise UsageError("the size of an entry is not negative and fits 64 bits")
    total = sum(sizes)
    uncommitted = _uncommitted_bytes(state)
    limit = state.config.uncommitted_bytes_max
    # An entry above the limit must pass when nothing else is in its way, or it never could; one without a payload
    # always passes.
    if uncommitted > 0 and total > 0 and uncommitted + total > limit:
        raise UnavailableError(
            f"{uncommitted} bytes of entries wait to be committed; {total} more would pass the limit of {limit}"
        )
    first = state.log.last_index + 1
    state.log.append(EntrySpan.of(first, [state.term] * len(sizes), sizes))
    _broadcast_append(state)
    return Position(first, state.term)


def on_persisted(state: State) -> None:
    """This leader's disk has more of its log."""
    own = state.progress[state.id]
    if own.maybe_update(state.log.persisted_index):
        _committed(state)


def report_unreachable(state: State, peer: int) -> None:
    """A message to `peer` was dropped on the way: what is under way is probably lost, so probe."""
    progress = state.progress.get(peer)
    if progress is not None and peer != state.id and progress.state is ProgressState.REPLICATE:
        progress.become_probe()


def read_index(state: State, request: int) -> None:
    """A read of this node itself."""
    _read(state, PendingRead(state.id, request))


def send_read_round(state: State) -> None:
    """One round of heartbeats for all reads that came in since the last."""
    if state.reads.round_due:
        _broadcast_heartbeat(state)


def _uncommitted_bytes(state: State) -> int:
    """Bytes that this leader accepted and has not committed; what it inherited was not its decision."""
    first = max(state.log.commit_index + 1, state.noop_index)
    return state.log.bytes(first, state.log.last_index + 1)


def _on_append_response(state: State, message: Message) -> None:
    progress = state.progress[message.sender]
    if not message.reject and message.log_index > state.log.last_index:
        raise ProtocolError(
            f"node {message.sender} acknowledges entry {message.log_index}, but the log ends at {state.log.last_index}"
        )
    progress.recent_active = True
    if message.reject:
        hint = message.reject_hint
        if message.log_term > 0:
            # The peer has log_term at hint: entries of a greater term here cannot match there, so skip them all.
            hint = state.log.last_index_at_most_term(hint, message.log_term)
        if progress.maybe_decrease(message.log_index, hint):
            if progress.state is ProgressState.REPLICATE:
                progress.become_probe()
            _send_append(state, message.sender)
        return
    # The second case lets a probe that told nothing new bring a peer back to streaming.
    news = progress.maybe_update(message.log_index)
    if not news and not (progress.state is ProgressState.PROBE and progress.match_index == message.log_index):
        return
    if progress.state is ProgressState.PROBE:
        progress.become_replicate()
    else:
        progress.inflights.free(message.log_index)
    if not _committed(state) and progress.can_bump_commit(state.log.commit_index):
        _send_append(state, message.sender)
    # The answer may have made room for several messages.
    while _send_append(state, message.sender, if_empty=False):
        pass


def _on_heartbeat_response(state: State, message: Message) -> None:
    progress = state.progress[message.sender]
    progress.recent_active = True
    # Even with a full window one empty message may go: its answer tells whether what fills the window arrived at all.
    progress.paused = False
    if progress.match_index < state.log.last_index or progress.state is ProgressState.PROBE:
        _send_append(state, message.sender)
    state.reads.acknowledge(message.sender, message.context)
    _confirm_reads(state)


def _committed(state: State) -> bool:
    """Commit what a quorum holds; on news tell everyone, and let reads pass that waited for it."""
    if not _maybe_commit(state):
        return False
    for read in state.reads.take_deferred():
        _read(state, read)
    _broadcast_append(state)
    return True


def _maybe_commit(state: State) -> bool:
    indexes = {peer: progress.match_index for peer, progress in state.progress.items()}
    index = state.membership.majority_index(indexes)
    # An entry of an older term may be on a majority and still be replaced (Raft §5.4.2, figure 8).
    if index <= state.log.commit_index or state.log.term_at(index) != state.term:
        return False
    return state.log.commit_to(index)


def _broadcast_append(state: State) -> None:
    for peer in state.membership.peers(state.id):
        _send_append(state, peer)


def _send_append(state: State, peer: int, if_empty: bool = True) -> bool:
    """Send `peer` what comes next for it, if flow control lets it. Returns whether a message was sent."""
    progress = state.progress[peer]
    if progress.paused:
        return False
    first = progress.next_index
    if first < state.log.first_index:
        # Only a snapshot could help this peer, and until there are snapshots nobody purges what a peer lacks.
        return False
    entries = state.log.span(first, first)
    if progress.state is not ProgressState.REPLICATE or not progress.inflights.full:
        entries = state.log.span(first, state.log.clip(first, state.config.append_bytes_max))
    if not entries and not if_empty:
        return False
    state.send(
        MessageKind.APPEND_ENTRIES,
        peer,
        log_index=first - 1,
        log_term=state.log.term_at(first - 1),
        commit=state.log.commit_index,
        entries=entries,
    )
    progress.sent_entries(len(entries), entries.bytes)
    progress.sent_commit = state.log.commit_index
    return True


def _broadcast_heartbeat(state: State) -> None:
    context = state.reads.round_context
    state.reads.round_due = False
    for peer in state.membership.peers(state.id):
        progress = state.progress[peer]
        # Never more than the peer is known to hold: it may have other entries beyond.
        commit = min(progress.match_index, state.log.commit_index)
        state.send(MessageKind.HEARTBEAT, peer, commit=commit, context=context)
        progress.sent_commit = commit


def _check_quorum(state: State) -> bool:
    """Step down unless a quorum was heard since the last check."""
    active = {peer: True for peer, progress in state.progress.items() if progress.recent_active}
    if state.membership.vote_result(active) is not VoteResult.WON:
        state.become_follower(state.term, NO_NODE)
        return False
    for peer in state.membership.peers(state.id):
        state.progress[peer].recent_active = False
    return True


def _read(state: State, read: PendingRead) -> None:
    if state.reads.full:
        _answer_read(state, read, 0)
    elif not state.committed_in_term:
        # What earlier leaders committed is not known yet. A group of one waits too: after a restart its commit index
        # lags (docs/raft.md).
        state.reads.defer(read)
    else:
        state.reads.wait(read, state.log.commit_index)
        _confirm_reads(state)


def _confirm_reads(state: State) -> None:
    """Answer all reads whose round a quorum has confirmed. This leader confirms every round of its own."""
    context = state.membership.majority_index({**state.reads.acks, state.id: state.reads.last_context})
    for read in state.reads.take_confirmed(context):
        _answer_read(state, read, read.index)


def _answer_read(state: State, read: PendingRead, index: int) -> None:
    if read.requester == state.id:
        state.reads.answer(read.request, index)
    else:
        state.send(
            MessageKind.READ_INDEX_RESPONSE, read.requester, log_index=index, reject=index == 0, context=read.request
        )
