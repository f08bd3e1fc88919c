"""How transcripts write messages, members and spans, and how they read members and changes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from marble.raft.messages import TRANSFER_CAMPAIGN, Message, MessageKind, Span
from marble.types import Change, ChangeKind, Members

_VOTE_REQUESTS = (MessageKind.REQUEST_VOTE, MessageKind.REQUEST_PRE_VOTE)
_HALVES = ("voters", "outgoing", "learners", "learners_next")


def show(message: Message) -> str:
    """One message on one line: only what its kind uses."""
    kind = message.kind
    text = f"{message.sender}->{message.to} {kind.name} term={message.term}"
    if kind in _VOTE_REQUESTS:
        text += f" last={message.log_index}/{message.log_term}"
        text += f" priority={message.priority}" if message.priority else ""
    elif message.entries is not None:
        text += _show_append(message)
    elif kind is MessageKind.APPEND_ENTRIES_RESPONSE:
        text += f" index={message.log_index}"
        if message.reject:
            text += f" hint={message.reject_hint}/{message.log_term}"
    elif kind is MessageKind.HEARTBEAT:
        text += f" commit={message.commit}"
    elif kind is MessageKind.QUIESCE:
        text += f" last={message.log_index}/{message.log_term} commit={message.commit}"
    elif kind in (MessageKind.READ_INDEX_RESPONSE, MessageKind.INSTALL_SNAPSHOT_RESPONSE):
        text += f" index={message.log_index}"
    elif message.members is not None:
        text += f" snapshot={message.log_index}/{message.log_term} of {show_members(message.members)}"
    if kind in _VOTE_REQUESTS and message.context == TRANSFER_CAMPAIGN:
        text += " by the leader's wish"
    elif message.context:
        text += f" context={message.context}"
    return text + (" REJECT" if message.reject else "")


def _show_append(message: Message) -> str:
    entries = message.entries
    assert entries is not None
    text = f" previous={message.log_index}/{message.log_term} commit={message.commit}"
    if entries:
        terms = entries.terms()
        shown = str(terms[0]) if terms[0] == terms[-1] else ",".join(map(str, terms))
        text += f" entries=[{entries.first},{entries.end}) of term {shown} bytes={entries.bytes}"
    if message.changes:
        text += f" changes={','.join(map(str, message.changes))}"
    return text


def show_span(span: Span) -> str:
    return f"[{span.first},{span.end})"


def show_members(members: Members) -> str:
    halves = ((name, getattr(members, name)) for name in _HALVES)
    parts = [f"{name}={','.join(map(str, nodes))}" for name, nodes in halves if nodes]
    return " ".join(parts + (["auto_leave"] if members.auto_leave else [])) or "nobody"


def read_members(args: Sequence[str], options: Mapping[str, str]) -> Members:
    """Of words like ``voters=1,2 outgoing=1,2,3 auto_leave``."""
    halves = {name: tuple(int(node) for node in options[name].split(",")) for name in _HALVES if name in options}
    return Members(auto_leave="auto_leave" in args, **halves)


def read_change(word: str) -> Change:
    """``+4`` adds or promotes a voter, ``+l4`` adds a learner or demotes a voter, ``-4`` removes a node."""
    if word.startswith("+l"):
        return Change(ChangeKind.ADD_LEARNER, int(word[2:]))
    return Change(ChangeKind.ADD_VOTER if word[0] == "+" else ChangeKind.REMOVE, int(word[1:]))


def read_option(word: str) -> bool | int | float:
    if word in ("true", "false"):
        return word == "true"
    return float(word) if "." in word else int(word)
