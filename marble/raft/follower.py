"""Following: taking entries from the leader (Raft §5.3), hearing its heartbeats, asking it for read indexes.

Rule 1: an acknowledgement names the last index that this very message proved equal to the leader's log, never simply
the end of the log here: there may be more, from another leader.
"""

from __future__ import annotations

from marble.errors import UsageError
from marble.raft.messages import Message, MessageKind
from marble.raft.state import State
from marble.types import NO_NODE, SnapshotMeta


def step(state: State, message: Message) -> None:
    """A message of this follower's term."""
    match message.kind:
        case MessageKind.APPEND_ENTRIES:
            state.follow(message.sender)
            _append(state, message)
        case MessageKind.HEARTBEAT:
            state.follow(message.sender)
            # The leader never sends more than what it knows to be durable here.
            state.log.commit_to(message.commit)
            state.send(MessageKind.HEARTBEAT_RESPONSE, message.sender, context=message.context)
        case MessageKind.INSTALL_SNAPSHOT:
            state.follow(message.sender)
            _install(state, message)
        case MessageKind.QUIESCE:
            state.follow(message.sender)
            _quiesce(state, message)
        case MessageKind.READ_INDEX_RESPONSE:
            # Index 0 stands for a refusal, both here and towards the caller.
            state.reads.resolve(message.context, 0 if message.reject else message.log_index)
        case MessageKind.READ_INDEX:
            refuse_read(state, message)
        case _:
            pass  # An answer to something that this node did in another role.


def read_index(state: State, request: int) -> None:
    """Ask the leader from where on a read here is linearizable."""
    if state.leader == NO_NODE or state.reads.full:
        state.reads.answer(request, 0)
        return
    context = state.reads.forward(request, state.config.election_ticks)
    state.send(MessageKind.READ_INDEX, state.leader, context=context)


def forget_leader(state: State) -> None:
    """Be free to vote at once. See `Raft.forget_leader`."""
    if state.config.lease_reads:
        raise UsageError("with lease_reads a follower may not forget its leader, whose leases rest on it")
    state.forget_leader()


def refuse_read(state: State, message: Message) -> None:
    """Who asks takes this node for the leader: tell it to ask again."""
    state.send(MessageKind.READ_INDEX_RESPONSE, message.sender, reject=True, context=message.context)


def _append(state: State, message: Message) -> None:
    log, entries = state.log, message.entries
    assert entries is not None  # Message holds to this; the line is for the type checker.
    before, term = message.log_index, message.log_term
    commit = log.commit_index
    if before < commit < entries.end - 1 and log.matches(commit, entries.term_at(commit)):
        # What is committed here matches in any case. What comes behind that is of use: the next append builds on it.
        before, term, entries = commit, log.term_at(commit), entries.slice(commit + 1, entries.end)
    if before < commit:
        # Old, or a leader that probes too low.
        state.send(MessageKind.APPEND_ENTRIES_RESPONSE, message.sender, log_index=commit)
    elif log.matches(before, term):
        log.splice(entries, message.changes)
        last_verified = entries.end - 1
        # Beyond the verified prefix there may be entries here that the leader does not have.
        log.commit_to(min(message.commit, last_verified))
        state.send(MessageKind.APPEND_ENTRIES_RESPONSE, message.sender, log_index=last_verified)
    else:
        # The leader's log has at most log_term at log_index and before, so no entry here with a greater term can match:
        # skip them all.
        hint = log.last_index_at_most_term(min(message.log_index, log.last_index), message.log_term)
        state.send(
            MessageKind.APPEND_ENTRIES_RESPONSE,
            message.sender,
            log_index=message.log_index,
            log_term=log.term_or_zero(hint),
            reject=True,
            reject_hint=hint,
        )


def _install(state: State, message: Message) -> None:
    """A snapshot (Raft §7), of which the driver has all that it needs."""
    assert message.members is not None  # Message holds to this; the line is for the type checker.
    log = state.log
    if message.log_index > log.commit_index:
        if log.matches(message.log_index, message.log_term):
            # The log leads there by itself; what comes after it may be of use (Raft figure 13, step 6).
            log.commit_to(message.log_index)
        else:
            state.restore(SnapshotMeta(message.log_index, message.log_term, message.members))
    # Beyond the commit index this log may differ from the leader's.
    state.send(MessageKind.APPEND_ENTRIES_RESPONSE, message.sender, log_index=log.commit_index)


def _quiesce(state: State, message: Message) -> None:
    """The leader has nothing to say any more: sleep, if this log is all that it would say."""
    log = state.log
    level = (message.log_index, message.log_term) == (log.last_index, log.last_term)
    # Who sleeps counts no time, and so would never tell a caller that its read was lost.
    if level and log.persisted_index == log.last_index and not state.reads.forwarding:
        log.commit_to(message.log_index)
        state.quiesced = True
    else:
        # Any answer wakes the leader.
        state.send(MessageKind.HEARTBEAT_RESPONSE, message.sender)
