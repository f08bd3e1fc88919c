"""``marble certs`` and ``marble token``: what they make is taken, nothing is overwritten, and nothing secret lies open."""

from __future__ import annotations

import builtins
import stat
from pathlib import Path
from typing import Any

import pytest

from marble.cli import main
from marble.config import SecurityConfig, TlsConfig, TokensConfig
from marble.transport.security import read_security
from marble.transport.tokens import Access


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def test_certificates_for_a_trial_are_taken(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made = tmp_path / "certs"
    assert (
        main(["certs", str(made), "--node", "n1.example,127.0.0.1,[::1]", "--node", "n2.example", "--client", "etl"])
        == 0
    )
    assert "node n1.example, 127.0.0.1, ::1, 365 days" in capsys.readouterr().out
    assert main(["token", str(made / "tokens.toml"), "etl", "--access", "write", "--table", "t*", "--days", "7"]) == 0
    token = capsys.readouterr().out.strip()
    for name in ("n1.example", "n2.example", "etl"):
        tls = TlsConfig(made / f"{name}.pem", made / f"{name}.key", made / "ca.pem", client_certificates=True)
        security = read_security(SecurityConfig(tls, TokensConfig(made / "tokens.toml"), made / "cluster.secret"))
        assert security.tokens is not None
        ((_, holder),) = security.tokens.tokens
        assert (holder.name, holder.access, holder.tables) == ("etl", Access.WRITE, ("t*",))
        assert holder.expires is not None
    assert token not in (made / "tokens.toml").read_text()
    for secret in ("ca.key", "n1.example.key", "etl.key", "cluster.secret", "tokens.toml"):
        assert mode(made / secret) == 0o600, secret


def test_nothing_is_overwritten(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["certs", str(tmp_path), "--node", "n1"]) == 0
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert main(["certs", str(tmp_path), "--node", "n1"]) == 2
    assert "n1.pem exists: delete it first" in capsys.readouterr().err
    assert main(["certs", str(tmp_path), "--node", "n2"]) == 0
    assert {name: (tmp_path / name).read_bytes() for name in before} == before
    tokens = tmp_path / "tokens.toml"
    assert main(["token", str(tokens), "a", "--access", "read"]) == 0
    assert main(["token", str(tokens), "b", "--access", "admin"]) == 0
    text = tokens.read_text()
    assert main(["token", str(tokens), "a", "--access", "admin"]) == 2
    assert tokens.read_text() == text
    assert text.count("sha256") == 2


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["certs", "DIR", "--node", "a b"], "--node 'a b:1' has no valid host"),
        (["certs", "DIR", "--client", "../x"], "--client '../x:1' has no valid host"),
        (["certs", "DIR", "--node", "n", "--days", "0"], "--days 0: it must be 1 to 3650"),
        (["token", "DIR/t", "a b", "--access", "read"], "must be a table whose name"),
        (["token", "DIR/t", "a", "--access", "read", "--table", '"'], "is not the pattern of a name"),
    ],
)
def test_wrong_wishes_leave_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], words: str
) -> None:
    assert main([each.replace("DIR", str(tmp_path)) for each in arguments]) == 2
    assert words in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_half_a_ca_is_none(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "ca.pem").write_bytes(b"")
    assert main(["certs", str(tmp_path), "--node", "n"]) == 2
    assert "a CA needs both" in capsys.readouterr().err


def test_without_the_extra_it_says_what_to_install(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    real = builtins.__import__

    def missing(name: str, *arguments: Any, **named: Any) -> Any:
        if name.startswith("cryptography"):
            raise ImportError(name)
        return real(name, *arguments, **named)

    monkeypatch.setattr(builtins, "__import__", missing)
    assert main(["certs", str(tmp_path / "new"), "--node", "n"]) == 2
    assert "pip install 'marbledb[server]'" in capsys.readouterr().err
