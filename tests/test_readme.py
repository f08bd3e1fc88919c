"""README is run as it stands: its Python, its config file, its commands."""

from __future__ import annotations

import re
import sys
import urllib.request
from pathlib import Path

import pytest
from server.cluster import eventually

from marble.cli import main
from marble.demo.processes import NodeProcess, Nodes, find_free_ports

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()


def blocks(language: str) -> list[str]:
    found: list[str] = re.findall(rf"(?ms)^```{language}\n(.*?)^```$", README)
    assert found
    return found


def python(words: str) -> str:
    """The one Python example that contains `words`."""
    (found,) = (block for block in blocks("python") if words in block)
    return found


def test_the_embedded_example_prints_what_it_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    exec(python("marble.open"), {})
    out = capsys.readouterr().out
    assert re.match(r"durable at index \d+\n", out)
    assert "{'id': 2, 'city': 'Roma', 'price': 7.5}" in out


def test_the_cluster_examples_work_with_the_config_that_is_shown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    free = find_free_ports(7)

    def on_free_ports(text: str) -> str:
        for shown, port in zip((5001, 5002, 5003, 5004, 5005, 5006, 9001), free, strict=True):
            text = text.replace(f"127.0.0.1:{shown}", f"127.0.0.1:{port}")
        return text

    config, page = blocks("toml")
    processes = {}
    for node in (1, 2, 3):
        path = tmp_path / f"node-{node}.toml"
        shown = on_free_ports(config).replace("id = 1", f"id = {node}").replace("node-1", f"node-{node}")
        path.write_text(shown + (on_free_ports(page) if node == 1 else ""))
        command = [sys.executable, "-P", "-m", "marble.cli", "serve", "--config", str(path)]
        processes[node] = NodeProcess(f"node {node}", command, tmp_path / f"node-{node}.log")
    with Nodes(processes) as nodes:
        nodes.start()
        exec(on_free_ports(python("marble.connect")), {})
        assert "{'id': 2, 'city': 'Rome'}" in capsys.readouterr().out
        exec(on_free_ports(python("flight.connect")), {})
        out = capsys.readouterr().out
        assert re.search(r'"index": ?\d+', out)
        assert "Bern" in out
        exec(on_free_ports(python("create_raft_server")), {})
        assert capsys.readouterr().out == f"Role.LEADER 127.0.0.1:{free[3]}\n"
        (command,) = re.findall(r"^marble (status .*)$", on_free_ports(README), re.MULTILINE)
        assert main(command.split()) == 0
        assert capsys.readouterr().out.count("follower") == 2
        (command,) = re.findall(r"^marble (doctor .*)$", on_free_ports(README), re.MULTILINE)
        # On a busy machine a node may be away for a moment, and the doctor says so.
        eventually(lambda: main(command.split()) == 0, "the doctor finds nothing")
        capsys.readouterr()
        (address,) = re.findall(r"^curl (\S+)", on_free_ports(README), re.MULTILINE)
        with urllib.request.urlopen(address, timeout=10) as answer:
            assert b"marble_transport_messages_sent_total" in answer.read()
        exec(on_free_ports(python("send_message")), {})
        out = capsys.readouterr().out
        assert "1 b'hello'\n" in out
        assert "'peer:2': True} 1\n" in out


def test_ci_runs_the_command_that_readme_gives() -> None:
    """README's second command installs and tests; the first line of ours that does anything is that one."""
    (command,) = (line for block in blocks("sh") for line in block.splitlines() if "pytest" in line)
    assert command in (ROOT / ".ci" / "run").read_text().splitlines()


def test_links_lead_somewhere() -> None:
    for name in ("README.md", "CONTRIBUTING.md"):
        for target in re.findall(r"\]\(([^):]+)\)", (ROOT / name).read_text()):
            assert (ROOT / target).exists(), f"{name}: {target}"
