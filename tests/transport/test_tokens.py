"""Who may do what: tokens, their file, the proof of the cluster's secret, and that nothing else comes in."""

from __future__ import annotations

import dataclasses
import datetime
import hashlib
import itertools
import logging
import queue
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.flight as fl
import pytest
from transport.pki import DEADLINE_S, Files, Node, ask, client, eventually, running

from marble.config import SecurityConfig
from marble.errors import ForbiddenError, ProtocolError, UnauthenticatedError, UsageError
from marble.transport import proof as proofs
from marble.transport.faults import from_flight_error
from marble.transport.proof import CalleeProof, CallerProof, Secret
from marble.transport.security import PLAIN, Credentials, read_security
from marble.transport.tokens import ANYWHERE, Access, Principal, parse_tokens

READER, WRITER, OLD = "reader-0123456789", "writer-0123456789", "former-0123456789"
NOW = datetime.datetime(2026, 1, 1, tzinfo=datetime.UTC)


def entry(name: str, token: str, access: str, more: str = "") -> str:
    return f'[tokens.{name}]\nsha256 = "{hashlib.sha256(token.encode()).hexdigest()}"\naccess = "{access}"\n{more}\n'


def bearing(token: str | None, **more: Any) -> Credentials:
    return Credentials(token=None if token is None else lambda: token, **more)


@pytest.fixture
def files(tmp_path: Path) -> Files:
    return Files(tmp_path)


# -- the file --------------------------------------------------------------------------------------------------------------


def test_a_token_is_found_by_its_digest() -> None:
    file = parse_tokens(
        entry("a", READER, "read") + f'[tokens.b]\ntoken = "{WRITER}"\naccess = "write"\ntables = ["t*", "u"]\n'
    )
    assert file.find(READER, NOW) == Principal("a", Access.READ)
    assert file.find(WRITER, NOW) == Principal("b", Access.WRITE, ("t*", "u"))
    for other in ("", READER[:-1], READER + "x", READER.upper(), "\ud800"):
        assert file.find(other, NOW) is None
    assert WRITER not in repr(file)


def test_two_tokens_stand_side_by_side_while_one_replaces_the_other() -> None:
    file = parse_tokens(
        entry("etl-1", OLD, "write", "expires = 2026-02-01T00:00:00Z") + entry("etl-2", WRITER, "write")
    )
    assert file.find(OLD, NOW) is not None
    assert file.find(OLD, NOW + datetime.timedelta(days=31)) is None
    assert file.find(WRITER, NOW + datetime.timedelta(days=9999)) is not None


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("x", "not valid TOML"),
        ("[token.a]", "unknown key 'token'"),
        ("tokens = 3", "must hold at most"),
        ("[tokens]\na = 3", "must be a table"),
        ('[tokens."a b"]', "must be a table whose name"),
        ("[tokens.a]", "needs one of 'sha256' and 'token'"),
        ('[tokens.a]\nsha256 = "00"\naccess = "read"', "64 hexadecimal digits"),
        ('[tokens.a]\ntoken = "short"\naccess = "read"', "16 to 4096 characters"),
        ('[tokens.a]\ntoken = "with spaces in it 0123"\naccess = "read"', "without spaces"),
        (entry("a", READER, "all"), "access must be one of read, write, admin"),
        (entry("a", READER, "read", "tables = []"), "tables must be a list"),
        (entry("a", READER, "read", "tables = [1]"), "tables must be a list"),
        (entry("a", READER, "read", "expires = 2026-01-01"), "with its zone"),
        (entry("a", READER, "read", "expires = 2026-01-01T00:00:00"), "with its zone"),
        (entry("a", READER, "read", "table = 1"), "unknown key 'table'"),
        (entry("a", READER, "read") + entry("b", READER, "read"), r"has the token of \[tokens.a\]"),
        ('[certificates.a]\naccess = "read"', "needs a 'name' of its own"),
        ("a = " + "[" * 5000, "not valid TOML"),
    ],
)
def test_a_wrong_file_is_refused_without_showing_a_token(text: str, words: str) -> None:
    with pytest.raises(UsageError, match=words) as caught:
        parse_tokens(text)
    assert "0123456789" not in str(caught.value)


def test_access_includes_what_is_below_it_on_its_tables_only() -> None:
    writer = Principal("w", Access.WRITE, ("tmp_*", "flights"))
    assert writer.may(Access.READ, "flights")
    assert writer.may(Access.WRITE, "tmp_1")
    assert writer.may(Access.WRITE, ANYWHERE)
    assert not writer.may(Access.ADMIN, "tmp_1")
    assert not writer.may(Access.READ, "orders")
    assert not writer.may(Access.READ, None)
    assert Principal("a", Access.ADMIN).may(Access.ADMIN, None)
    with pytest.raises(
        ForbiddenError, match="'w' has write access to tmp_\\*, flights, and this call needs admin access to all"
    ):
        writer.demand(Access.ADMIN, None)


def test_tokens_need_a_way_to_know_nodes(files: Files) -> None:
    with pytest.raises(UsageError, match=r"needs \[node\] secret_file or \[node.tls\] client_certificates"):
        read_security(SecurityConfig(tokens=files.tokens(entry("a", READER, "read"))))
    with pytest.raises(UsageError, match="a cluster's secret has 32 to 4096 bytes"):
        read_security(SecurityConfig(secret_file=files.put("secret", b"short\n")))


# -- at the door -----------------------------------------------------------------------------------------------------------


def guarded(files: Files, text: str, **more: Any) -> SecurityConfig:
    return SecurityConfig(tokens=files.tokens(text), secret_file=files.secret(), **more)


def test_only_a_right_token_comes_in(files: Files, caplog: pytest.LogCaptureFixture) -> None:
    with running(node := Node(1, guarded(files, entry("a", READER, "read"))).start()):
        assert ask(node.endpoint, bearing(READER)) == b"you"
        wrong = READER[:-1] + "X"
        with caplog.at_level(logging.INFO):
            for credentials, words in [
                (PLAIN, "wants a token"),
                (bearing(wrong), "is wrong, has expired"),
                (bearing(""), ""),
            ]:
                with pytest.raises(fl.FlightUnauthenticatedError) as caught:
                    ask(node.endpoint, credentials)
                told = from_flight_error(caught.value)
                assert type(told) is UnauthenticatedError
                assert words in str(told)
                assert wrong not in str(told)
        assert node.count("transport_unauthenticated") == 3
        # One line, however often.
        assert len([line for line in caplog.messages if "refused a call" in line]) == 1
        assert wrong not in caplog.text


@pytest.mark.parametrize("header", [b"Basic cmVhZGVy", b"Bearer", b"bearer " + READER.encode(), READER.encode()])
def test_other_headers_are_no_token(files: Files, header: bytes) -> None:
    with (
        running(node := Node(1, guarded(files, entry("a", READER, "read"))).start()),
        PLAIN.client(node.endpoint) as made,
    ):
        options = fl.FlightCallOptions(timeout=DEADLINE_S, headers=[(b"authorization", header)])
        with pytest.raises(fl.FlightUnauthenticatedError):
            list(made.do_action(fl.Action("who", b""), options))


def test_a_file_that_changes_counts_from_then_on(files: Files) -> None:
    with running(node := Node(1, guarded(files, entry("a", READER, "read"))).start()):
        assert ask(node.endpoint, bearing(READER)) == b"you"
        files.put("tokens.toml", entry("b", WRITER, "write").encode())
        eventually(lambda: node.count("security_reloads") == 1, "not read again")
        assert ask(node.endpoint, bearing(WRITER)) == b"you"
        with pytest.raises(fl.FlightUnauthenticatedError):
            ask(node.endpoint, bearing(READER))
        files.put("tokens.toml", b"[half")
        eventually(lambda: node.count("security_reload_failures") == 1, "not seen")
        assert ask(node.endpoint, bearing(WRITER)) == b"you"


class Bodies(Node):
    """Notes what handlers get to see."""

    def __init__(self, security: SecurityConfig) -> None:
        super().__init__(1, security, service=self)
        self.seen: queue.SimpleQueue[str] = queue.SimpleQueue()

    def do_put(self, context: Any, descriptor: Any, reader: Any, writer: Any) -> None:
        self.seen.put("put")

    def do_action(self, context: Any, action: Any) -> Any:
        self.seen.put("action")
        return iter([b"you"])


def test_nothing_of_a_stranger_s_call_reaches_a_handler(files: Files) -> None:
    with (
        running(node := Bodies(guarded(files, entry("a", READER, "read"))).start()),
        PLAIN.client(node.endpoint) as made,
    ):
        with pytest.raises((fl.FlightUnauthenticatedError, pa.ArrowException, OSError)):  # noqa: PT012
            writer, _ = made.do_put(fl.FlightDescriptor.for_path("t"), pa.schema([("a", pa.int64())]))
            for _ in range(1000):
                writer.write_batch(pa.record_batch({"a": [1]}))
            writer.close()
        assert node.seen.empty()


def test_certificates_have_names_and_rights(files: Files) -> None:
    text = '[certificates.etl]\nname = "etl"\naccess = "read"\n'
    tls = files.node(client_certificates=True)
    with running(node := Node(1, guarded(files, text, tls=tls)).start()):
        assert ask(node.endpoint, client(by="first", names=("etl", "other"))) == b"you"
        with pytest.raises(fl.FlightUnauthenticatedError, match="not 'other'"):
            ask(node.endpoint, client(by="first", names=("other", "etl")))
    with pytest.raises(UsageError, match=r"\[certificates\] needs \[node.tls\] client_certificates"):
        read_security(guarded(files, text))


# -- nodes -----------------------------------------------------------------------------------------------------------------


def pair(tmp_path: Path, texts: tuple[str | None, str | None], tokens: str = "") -> tuple[Node, Node]:
    nodes = []
    for number, text in enumerate(texts, start=1):
        (tmp_path / str(number)).mkdir()
        files = Files(tmp_path / str(number))
        given: dict[str, Any] = {} if text is None else {"secret_file": files.secret(text)}
        nodes.append(Node(number, SecurityConfig(tokens=files.tokens(tokens) if tokens and given else None, **given)))
    nodes[0].start(nodes[1])
    nodes[1].start(nodes[0])
    return nodes[0], nodes[1]


def test_nodes_with_the_secret_know_each_other(tmp_path: Path) -> None:
    one, other = pair(tmp_path, ("s", "s"), entry("a", READER, "read"))
    with running(one, other):
        one.beat(other)
        other.beat(one)
        assert one.inbox.get(timeout=DEADLINE_S)
        assert other.inbox.get(timeout=DEADLINE_S)


@pytest.mark.parametrize("texts", [("s", "t"), ("s", None), (None, "s")])
def test_nodes_without_the_same_secret_refuse_each_other(tmp_path: Path, texts: tuple[str | None, str | None]) -> None:
    one, other = pair(tmp_path, texts)
    with running(one, other):
        for node in (one, other):
            eventually(lambda n=node: n.count("transport_streams_broken") > 1, "no stream broke")  # type: ignore[misc]
        assert not one.transport.connected(2)
        assert not other.transport.connected(1)
        assert one.inbox.empty()
        assert other.inbox.empty()


def test_the_proof_of_a_call_opens_nothing_but_streams_of_nodes(files: Files) -> None:
    secret = read_security(SecurityConfig(secret_file=files.secret())).secret
    assert secret is not None
    with running(node := Node(1, guarded(files, entry("a", READER, "read"))).start()):
        replayed = secret.call("c", 2)
        with pytest.raises(fl.FlightUnauthenticatedError):
            ask(node.endpoint, Credentials(peer=lambda: replayed))
        for forged in ("", "1;2;00;00", replayed[:-1] + ("0" if replayed[-1] != "0" else "1"), secret.call("d", 2)):
            with pytest.raises(fl.FlightUnauthenticatedError, match="proof of the cluster's secret is wrong"):
                ask(node.endpoint, Credentials(peer=lambda text=forged: text))  # type: ignore[misc]


SECRET, OTHER = Secret(b"s" * 32), Secret(b"t" * 32)


def meet(caller: CallerProof, callee: CalleeProof) -> bytes:
    """Play the opening of a stream; the last word."""
    assert callee.take_hello(caller.hello(b"hello of 1")) == b"hello of 1"
    answer, last = caller.check_answer(callee.answer(b"hello of 2"), "node 2")
    assert answer == b"hello of 2"
    assert last is not None
    return last


def test_both_prove_the_secret() -> None:
    callee = CalleeProof(SECRET)
    last = meet(CallerProof(SECRET), callee)
    callee.check_last_word(last)
    with pytest.raises(ProtocolError):
        callee.check_last_word(last)
    assert Secret(b"s" * 32) == SECRET
    assert SECRET != OTHER
    assert "s" * 8 not in repr(SECRET)


@pytest.mark.parametrize("at", range(40))
def test_a_last_word_of_another_stream_or_with_a_flipped_bit_is_refused(at: int) -> None:
    old = meet(CallerProof(SECRET), CalleeProof(SECRET))
    callee = CalleeProof(SECRET)
    meet(CallerProof(SECRET), callee)
    with pytest.raises(ProtocolError, match="does not know the cluster secret"):
        callee.check_last_word(old)
    callee = CalleeProof(SECRET)
    last = bytearray(meet(CallerProof(SECRET), callee))
    last[at] ^= 1
    with pytest.raises(ProtocolError):
        callee.check_last_word(bytes(last))


def test_a_proof_is_for_one_side_and_one_opening() -> None:
    caller, callee = CallerProof(SECRET), CalleeProof(SECRET)
    hello = caller.hello(b"hello of 1")
    callee.take_hello(hello)
    answer = callee.answer(b"hello of 2")
    # Reflection: what the callee proves is no proof of a caller, also with the same numbers.
    with pytest.raises(ProtocolError):
        callee.check_last_word(proofs._sealed(proofs._LAST, answer[-32:]))
    # Replay: an answer to another opening.
    with pytest.raises(ProtocolError, match="node 2 has another cluster secret"):
        CallerProof(SECRET).check_answer(answer, "node 2")
    # Another hello than was sent.
    meddled = CalleeProof(SECRET)
    meddled.take_hello(b"HELLO of 1" + hello[10:])
    with pytest.raises(ProtocolError):
        caller.check_answer(meddled.answer(b"hello of 2"), "node 2")
    with pytest.raises(ProtocolError, match="has no cluster secret"):
        caller.check_answer(b"hello of 2", "node 2")
    with pytest.raises(ProtocolError, match="this node has a cluster secret and the caller has none"):
        CalleeProof(SECRET).take_hello(b"hello of 1")
    with pytest.raises(ProtocolError, match="the caller has a cluster secret and this node has none"):
        CalleeProof(None).take_hello(hello)


def opens(caller: Secret, callee: Secret) -> bool:
    """Whether a stream between two that know these comes about."""
    called = caller.call("c", 1)
    try:
        there = CalleeProof(callee)
        there.check_last_word(meet(CallerProof(caller), there))
    except ProtocolError:
        return False
    assert callee.check_call("c", called) == 1
    return True


def test_one_secret_takes_the_place_of_another_node_by_node() -> None:
    old, new = b"o" * 32, b"n" * 32
    # Each step is done at one node after the other: neighbours are one step apart.
    steps = (Secret(old), Secret(old, [new]), Secret(new, [old]), Secret(new))
    for before, after in itertools.pairwise(steps):
        for one, other in itertools.product((before, after), repeat=2):
            assert opens(one, other)
    assert not opens(steps[0], steps[2])
    assert not opens(steps[0], steps[3])
    assert not opens(steps[3], steps[0])
    assert Secret(new).check_call("c", Secret(old).call("c", 1)) is None
    assert Secret(old, [new]) != Secret(new, [old])
    assert Secret(old, [new]) != Secret(old)
    assert Secret(old, [new]) == Secret(old, [new])
    with pytest.raises(ValueError, match="must have"):
        Secret(old, [b"short"])


def test_a_file_may_have_other_secrets_that_are_known(files: Files) -> None:
    path = files.secret()

    def read(text: bytes) -> Secret | None:
        path.write_bytes(text)
        return read_security(SecurityConfig(secret_file=path)).secret

    old, new = b"o" * 40, b"n" * 40
    assert read(new + b"\nalso " + old + b"\n") == Secret(new, [old])
    assert read(new + b"\r\nalso  " + old + b" \r\n") == Secret(new, [old])
    # Any bytes are one secret, as ever.
    assert read(new + b"\n" + old) == Secret(new + b"\n" + old)
    assert read(new + b"\nalso " + old + b"\n" + old) == Secret(new + b"\nalso " + old + b"\n" + old)
    with pytest.raises(UsageError, match="has 32 to 4096 bytes"):
        read(new + b"\nalso short")
    with pytest.raises(UsageError, match="5 secrets, more than 4"):
        read(new + b"".join(b"\nalso " + bytes([65 + number]) * 32 for number in range(4)))


def test_without_a_secret_nothing_is_added() -> None:
    caller, callee = CallerProof(None), CalleeProof(None)
    assert callee.take_hello(caller.hello(b"hello")) == b"hello"
    assert caller.check_answer(callee.answer(b"answer"), "node 2") == (b"answer", None)
    assert not callee.needed
    assert dataclasses.asdict(Principal("a", Access.READ))["name"] == "a"
