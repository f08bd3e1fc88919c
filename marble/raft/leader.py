"""Leading: replication, commitment, the check of the quorum, and reads (Raft §5.3, §5.4.2, §8; thesis §6.2, §6.4).

Rule 1: only `_maybe_commit` raises the commit index of a leader, and only for an entry of its own term (§5.4.2).
Rule 2: the leader's own entries count like a peer's: when its disk has them, not before.
"""

from __future__ import annotations

from collections.abc import Sequence

from marble._core.term_index import EntrySpan
from marble.errors import NotLeaderError, ProtocolError, UnavailableError, UsageError
from marble.raft.membership import Membership, leave
from marble.raft.messages import MembershipProposed, Message, MessageKind
from marble.raft.progress import Progress, ProgressState
from marble.raft.quorum import VoteResult
from marble.raft.reads import PendingRead
from marble.raft.state import State
from marble.types import INDEX_MAX, NO_NODE, Members, Position, Role


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
        case MessageKind.INSTALL_SNAPSHOT_RESPONSE if message.reject:
            report_snapshot(state, message.sender, ok=False)
        case _:
            pass  # An answer to something that this node did in another role. A second leader `Raft.step` has refused.


def tick(state: State) -> None:
    """One tick of a leader: the quorum's turn, then heartbeats."""
    state.heartbeat_elapsed += 1
    state.election_elapsed += 1
    state.idle_ticks += 1
    state.hanging_ticks = state.hanging_ticks + 1 if state.unfinished_write else 0
    hangs = state.hanging_ticks >= state.config.election_ticks
    if hangs and state.config.check_quorum and state.membership.voters != (state.id,):
        # The others could commit without its disk, but nobody could apply or read here (hashicorp/raft#503). A single
        # voter goes on: nobody else could lead.
        state.become_follower(state.term, NO_NODE)
        return
    if state.election_elapsed >= state.config.election_ticks:
        state.election_elapsed = 0
        if state.config.check_quorum and not _check_quorum(state):
            return
        # The target had its time: go on proposing.
        state.transferee = NO_NODE
    if 0 < state.config.quiesce_ticks <= state.idle_ticks and _is_idle(state):
        _quiesce(state)
    elif state.heartbeat_elapsed >= state.config.heartbeat_ticks:
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
    if state.transferee != NO_NODE:
        raise UnavailableError(f"the leadership is being handed to node {state.transferee}: retry at the new leader")
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
    state.idle_ticks = 0
    state.log.append(EntrySpan.of(first, [state.term] * len(sizes), sizes))
    _broadcast_append(state)
    return Position(first, state.term)


def propose_membership(state: State, members: Members) -> Position:
    """Append an entry from whose application on the group is `members`."""
    position = Position(state.log.last_index + 1, state.term)
    state.log.append(EntrySpan.of(position.index, [state.term]), (position.index,))
    state.proposed.append(MembershipProposed(position.index, position.term, members))
    state.pending_change_index = position.index
    _broadcast_append(state)
    return position


def apply_membership(state: State, members: Members) -> None:
    """The group is `members` from now on: look after who came, no longer after who went."""
    state.membership = Membership(members)
    if not state.membership.is_voter(state.id):
        # Its own removal is committed: somebody else's turn (Raft §6). One that has the whole log need not wait for it.
        last = state.log.last_index
        level = [voter for voter in members.voters if voter in state.progress]
        heir = next((voter for voter in level if state.progress[voter].match_index == last), NO_NODE)
        if heir != NO_NODE:
            state.send(MessageKind.TIMEOUT_NOW, heir)
        state.become_follower(state.term, NO_NODE)
        return
    for peer in [peer for peer in state.progress if not state.membership.is_member(peer)]:
        del state.progress[peer]
    for peer in state.membership.all:
        if peer not in state.progress:
            state.add_progress(peer)
            # Or the next check of the quorum would count it as silent before it was ever spoken to.
            state.progress[peer].recent_active = True
    # Peers are visited in ascending order.
    state.progress = {peer: state.progress[peer] for peer in sorted(state.progress)}
    if state.transferee != NO_NODE and not state.membership.is_voter(state.transferee):
        state.transferee = NO_NODE
    state.idle_ticks = 0
    # A smaller quorum may have more already.
    if not _committed(state):
        _broadcast_append(state)
    _confirm_reads(state)


def leave_if_due(state: State) -> None:
    """Leave a joint group that is to be left by itself, once it is in use here and nothing else is under way."""
    members = state.membership.members
    if members.auto_leave and state.log.applied_index >= state.pending_change_index:
        propose_membership(state, leave(members))


def transfer(state: State, target: int) -> None:
    """Hand the leadership to `target`. See `Raft.transfer_leadership`."""
    if target == state.transferee:
        return
    if target == state.id:
        # Rather not, as in etcd.
        state.transferee = NO_NODE
        return
    state.transferee = target
    # It has one election timeout to take over.
    state.election_elapsed = 0
    state.idle_ticks = 0
    if not _hand_over(state, target):
        _send_append(state, target)


def report_snapshot(state: State, peer: int, ok: bool) -> None:
    """The snapshot for `peer` arrived, or did not: probe."""
    progress = state.progress.get(peer)
    if progress is None or progress.state is not ProgressState.SNAPSHOT:
        return
    if not ok:
        progress.pending_snapshot = 0
    progress.become_probe()
    # An answer to the snapshot, or the next to a heartbeat, says how to go on.
    progress.paused = True


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


def report_way_lost(state: State, peer: int) -> None:
    """What is under way to `peer` is probably lost, a probe too, but there is another way to it: probe at once."""
    progress = state.progress.get(peer)
    # To a group that sleeps nothing is under way.
    if (
        progress is not None
        and peer != state.id
        and progress.state is not ProgressState.SNAPSHOT
        and not state.quiesced
    ):
        progress.become_probe()
        _send_append(state, peer)


def read_index(state: State, request: int, lease: bool) -> None:
    """A read of this node itself; by `lease` if there is one."""
    in_lease = state.clock_us < state.lease_until_us and state.transferee == NO_NODE and not state.lease_void
    if lease and in_lease and state.committed_in_term:
        state.reads.answer(request, state.log.commit_index)
        return
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
    if progress.state is ProgressState.REPLICATE:
        progress.inflights.free(message.log_index)
    elif progress.state is ProgressState.PROBE or progress.match_index + 1 >= state.log.first_index:
        # Whatever brought it there, the peer can go on with the log.
        progress.become_replicate()
    elif progress.match_index >= progress.pending_snapshot:
        # It has the snapshot, but what follows that was purged meanwhile: it needs the next one.
        progress.become_probe()
    if not _committed(state) and progress.can_bump_commit(state.log.commit_index):
        _send_append(state, message.sender)
    # The answer may have made room for several messages.
    while message.sender in state.progress and _send_append(state, message.sender, if_empty=False):
        pass
    if message.sender == state.transferee:
        _hand_over(state, message.sender)


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
    if progress.blocked:
        return False
    first = progress.next_index
    if first < state.log.first_index:
        return _send_snapshot(state, peer, progress)
    waits = progress.state is ProgressState.REPLICATE and progress.inflights.full
    entries = state.log.span(first, first if waits else state.log.clip(first, state.config.append_bytes_max))
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


def _send_snapshot(state: State, peer: int, progress: Progress) -> bool:
    """What comes next for `peer` is gone here: announce the newest snapshot, if the peer is there to fetch it."""
    snapshot = state.snapshot
    if snapshot is None or not progress.recent_active:
        return False
    progress.become_snapshot(snapshot.index)
    state.send(
        MessageKind.INSTALL_SNAPSHOT,
        peer,
        log_index=snapshot.index,
        log_term=snapshot.term,
        members=snapshot.members,
    )
    return True


def _hand_over(state: State, target: int) -> bool:
    """Tell `target` to campaign, if it has all that is in the log here (thesis §3.10)."""
    if state.progress[target].match_index < state.log.last_index:
        return False
    # From now on somebody may be elected within the lease.
    state.lease_void = True
    state.send(MessageKind.TIMEOUT_NOW, target)
    return True


def _is_idle(state: State) -> bool:
    """Whether this leader has nothing to say that anybody does not know."""
    last = state.log.last_index
    return (
        state.log.applied_index == last == state.log.persisted_index
        and all(progress.match_index == last and progress.recent_active for progress in state.progress.values())
        and state.transferee == NO_NODE
        and not state.reads.pending
        and not state.membership.members.auto_leave
    )


def _quiesce(state: State) -> None:
    """Let the group sleep. Who misses the message misses the heartbeats, too, and wakes the others by campaigning."""
    last, term = state.log.last_index, state.log.last_term
    for peer in state.membership.peers(state.id):
        state.send(MessageKind.QUIESCE, peer, log_index=last, log_term=term, commit=last)
    state.quiesced = True


def _broadcast_heartbeat(state: State) -> None:
    reads = state.reads
    context = reads.open_round(state.clock_us) if state.config.lease_reads else reads.round_context
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
    sent_us = state.reads.confirmed_since(context)
    if sent_us:
        state.lease_until_us = max(state.lease_until_us, sent_us + state.config.lease_us)
    for read in state.reads.take_confirmed(context):
        _answer_read(state, read, read.index)


def _answer_read(state: State, read: PendingRead, index: int) -> None:
    if read.requester == state.id:
        state.reads.answer(read.request, index)
    else:
        state.send(
            MessageKind.READ_INDEX_RESPONSE, read.requester, log_index=index, reject=index == 0, context=read.request
        )
