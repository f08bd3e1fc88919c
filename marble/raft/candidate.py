"""Campaigning, and answering those who campaign (Raft §5.2, §5.4.1; pre-vote: thesis §9.6).

Rule 1: a candidate counts its own vote only when that is durable, and does not lead before. So the term of a leader is
durable at the leader, and no node leads twice in a term, whatever it forgets in a crash.
"""

from __future__ import annotations

from marble.raft import follower, leader
from marble.raft.messages import TRANSFER_CAMPAIGN, Message, MessageKind
from marble.raft.quorum import VoteResult
from marble.raft.state import State
from marble.types import NO_NODE, Role


def may_campaign(state: State) -> bool:
    """Whether this node could lead: it votes, and knows the membership that it would lead as well as it can."""
    return (
        state.role is not Role.LEADER
        and state.membership.is_voter(state.id)
        # Votes of a membership that is known to be over could elect a second leader beside the new one's.
        and not state.log.has_change_to_apply
    )


def campaign(state: State, pre_vote: bool, transfer: bool = False) -> None:
    """Ask for votes, or first whether they could be had. A leader and a node that cannot lead do nothing.

    By `transfer` it is the leader's own wish, which its lease does not stand against.
    """
    if not may_campaign(state):
        return
    if not transfer and state.membership.voters != (state.id,) and state.promised:
        return
    if pre_vote and not transfer:
        state.become_pre_candidate()
        # The term asked for is the next one, which nobody enters by answering.
        _request(state, MessageKind.REQUEST_PRE_VOTE, state.term + 1)
        # Nothing of a pre-vote has to survive a crash: one's own counts at once.
        _record(state, state.id, granted=True)
    else:
        state.become_candidate()
        _request(state, MessageKind.REQUEST_VOTE, state.term, TRANSFER_CAMPAIGN if transfer else 0)


def answer_summons(state: State) -> None:
    """Campaign because the leader wishes it (thesis §3.10), as soon as the members are applied that are to vote."""
    if not state.log.has_change_to_apply:
        state.summoned = False
        campaign(state, pre_vote=False, transfer=True)


def on_persisted(state: State) -> None:
    """Term and vote may have become durable: count this candidate's own vote."""
    if state.role is Role.CANDIDATE and state.id not in state.votes and state.own_vote_durable:
        _record(state, state.id, granted=True)


def step(state: State, message: Message) -> None:
    """A message of this candidate's term."""
    if message.kind in (MessageKind.REQUEST_PRE_VOTE_RESPONSE, MessageKind.REQUEST_VOTE_RESPONSE):
        learn_commit(state, message)
    match message.kind:
        case MessageKind.APPEND_ENTRIES | MessageKind.HEARTBEAT | MessageKind.INSTALL_SNAPSHOT | MessageKind.QUIESCE:
            # Somebody else won this term (Raft §5.2), or leads while this node only asked around.
            state.become_follower(message.term, message.sender)
            follower.step(state, message)
        case MessageKind.REQUEST_PRE_VOTE_RESPONSE if state.role is Role.PRE_CANDIDATE:
            # A granted pre-vote carries the term asked for. One for another term answers an earlier campaign.
            if message.reject or message.term == state.term + 1:
                _record(state, message.sender, granted=not message.reject)
        case MessageKind.REQUEST_VOTE_RESPONSE if state.role is Role.CANDIDATE:
            _record(state, message.sender, granted=not message.reject)
        case MessageKind.READ_INDEX:
            follower.refuse_read(state, message)
        case _:
            pass  # An answer to something that this node did in another role.


def learn_commit(state: State, message: Message) -> None:
    """What the sender of a request for a vote, or of an answer to one, knows to be committed is committed here, too, where
    this log has the same entry (Log Matching, Raft §5.3).

    Without it a group could stand still for good: who has a change of the members in its log, and does not know that it
    is committed, needs votes of those who went; they may have gone with longer logs than anybody else's (raft-rs).
    """
    if message.commit > state.log.commit_index and state.log.matches(message.commit, message.reject_hint):
        state.log.commit_to(message.commit)
        if state.role in (Role.PRE_CANDIDATE, Role.CANDIDATE) and state.log.has_change_to_apply:
            # Votes of a membership that is over count for nothing.
            state.become_follower(state.term, NO_NODE)


def answer_request(state: State, message: Message) -> None:
    """Answer a REQUEST_VOTE of this term, or a REQUEST_PRE_VOTE of this term or a later one."""
    pre_vote = message.kind is MessageKind.REQUEST_PRE_VOTE
    response = MessageKind.REQUEST_PRE_VOTE_RESPONSE if pre_vote else MessageKind.REQUEST_VOTE_RESPONSE
    learn_commit(state, message)
    commit, commit_term = state.log.commit_index, state.log.term_at(state.log.commit_index)
    # It may have entered the candidate's term by another message, and with a leader's lease still resting on it.
    bound = state.promised and message.context != TRANSFER_CAMPAIGN
    may_vote = (
        # It repeats what was granted: the answer may have been lost.
        state.vote == message.sender
        # Neither a vote nor a leader binds this node in this term.
        or (state.vote == NO_NODE and state.leader == NO_NODE and not bound)
        # A pre-vote for a later term binds nobody.
        or (pre_vote and message.term > state.term)
    )
    if may_vote and state.log.is_up_to_date(message.log_index, message.log_term) and not _would_rather(state, message):
        if not pre_vote:
            state.grant(message.sender)
        # The term of the request: a pre-candidate would take a lower one for an old answer.
        state.send(response, message.sender, term=message.term, commit=commit, reject_hint=commit_term)
    else:
        state.send(response, message.sender, reject=True, commit=commit, reject_hint=commit_term)


def _would_rather(state: State, message: Message) -> bool:
    """Whether this node should lead itself: it matters more than the candidate, whose log is no better than its own."""
    return (
        message.priority < state.config.priority
        and message.context != TRANSFER_CAMPAIGN
        and state.membership.is_voter(state.id)
        # While it may not campaign the others must not wait for it.
        and not state.log.has_change_to_apply
        and state.vote != message.sender
        and (message.log_term, message.log_index) == (state.log.last_term, state.log.last_index)
    )


def _request(state: State, kind: MessageKind, term: int, context: int = 0) -> None:
    for peer in state.membership.peers(state.id):
        if not state.membership.is_voter(peer):
            continue
        state.send(
            kind,
            peer,
            term=term,
            log_index=state.log.last_index,
            log_term=state.log.last_term,
            context=context,
            priority=state.config.priority,
            commit=state.log.commit_index,
            reject_hint=state.log.term_at(state.log.commit_index),
        )


def _record(state: State, voter: int, granted: bool) -> None:
    """Count the first answer of `voter`, and act when the vote is decided."""
    state.votes.setdefault(voter, granted)
    result = state.membership.vote_result(state.votes)
    if result is VoteResult.LOST:
        state.become_follower(state.term, NO_NODE)
    elif result is VoteResult.WON:
        if state.role is Role.PRE_CANDIDATE:
            state.become_candidate()
            _request(state, MessageKind.REQUEST_VOTE, state.term)
        elif state.own_vote_durable:
            leader.start(state)
