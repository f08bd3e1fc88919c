"""Imports run downwards only: read from the sources, so that a lazy import inside a function counts like any other."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "marble"

FLOORS = [
    (
        "types",
        "errors",
        "table_options",
        "schema",
        "requests",
        "filters",
        "env",
        "metrics",
        "sampling",
        "machine",
        "config",
        "sessions",
        "writing",
        "logs",
        "memory",
    ),
    ("_core", "rows"),
    ("raft", "logstore", "lsm", "database", "members"),
    ("transport",),
    (
        "archive",
        "checkpoint",
        "driver",
        "compacting",
        "fetching",
        "groups",
        "identity",
        "jobs",
        "options",
        "pacing",
        "promises",
        "rebuilding",
        "recovery",
        "snapshotting",
        "transfer",
        "verify",
    ),
    ("node", "engine", "desk", "workers", "status", "stopwatch", "web"),
    ("local", "client", "contacts", "vigil", "orders", "admin", "backup", "doctor"),
    ("server", "service", "actions", "operating"),
    ("cli", "demo", "simulate", "backup_commands", "status_commands", "watch", "certs"),
]

STEPS = {
    **{
        part: {"types", "errors"}
        for part in ("table_options", "schema", "filters", "env", "metrics", "machine", "logs")
    },
    "schema": {"types", "errors", "table_options"},
    "requests": {"types", "schema"},
    "config": {"types", "errors", "logs"},
    "sampling": {"errors", "metrics"},
    "sessions": {"types", "errors", "machine"},
    "writing": {"env"},
    "rows": {"_core"},
    "checkpoint": {"identity"},
    "verify": {"checkpoint", "identity", "recovery"},
    "archive": {"checkpoint", "identity", "recovery", "verify"},
    "fetching": {"jobs"},
    "transfer": {"fetching", "jobs", "rebuilding"},
    "snapshotting": {"jobs", "rebuilding", "transfer"},
    "compacting": {"jobs"},
    "driver": {"compacting", "jobs", "snapshotting"},
    "groups": {"driver", "jobs"},
    "recovery": {"driver"},
    "desk": {"stopwatch"},
    "engine": {"desk", "workers"},
    "node": {"desk", "engine", "status"},
    "client": {"contacts", "orders", "vigil"},
    "vigil": {"contacts", "orders"},
    "admin": {"client"},
    "backup": {"client"},
    "operating": {"actions"},
    "server": {"operating", "service", "actions"},
    "cli": {"certs", "backup_commands", "demo", "simulate", "status_commands"},
    "doctor": {"orders"},
    "status_commands": {"watch"},
    "service": {"actions"},
}
"""The few steps inside a floor: whose module may import which others of its own floor."""

TESTING_FLOOR_MAX = 4

PURE = {"__future__", "bisect", "collections", "collections.abc", "dataclasses", "enum", "itertools", "typing"}
"""All that `raft` may import from outside of marble: no time, no chance, no files, no threads, no Arrow."""

PURE_OF_MARBLE = ("marble.types", "marble.errors", "marble._core.term_index", "marble.raft")

WORLD = {"asyncio", "io", "multiprocessing", "os", "random", "select", "selectors", "shutil", "signal", "socket"} | {
    "subprocess", "tempfile", "threading", "time"
}  # fmt: skip
"""What `_core` must not touch: it computes."""


def sources(folder: Path, endings: tuple[str, ...] = (".py", ".pyi", ".pyx", ".pxd")) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.suffix in endings and "__pycache__" not in path.parts)


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def exists(module: str) -> bool:
    base = ROOT.joinpath(*module.split("."))
    return base.is_dir() or any(base.with_suffix(ending).exists() for ending in (".py", ".pyx"))


def resolve(module: str, names: list[str]) -> Iterator[str]:
    """``from package import name`` imports the module ``package.name`` where there is one, else ``package``."""
    for name in names:
        yield f"{module}.{name}" if exists(f"{module}.{name}") else module


def imports(path: Path) -> set[str]:
    """Names of all modules that `path` imports or cimports, wherever in it."""
    text = path.read_text()
    found: set[str] = set()
    if path.suffix in (".py", ".pyi"):
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.Import):
                found |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                assert node.level == 0, f"{path}:{node.lineno}: relative import: floors are read from absolute ones"
                found |= set(resolve(node.module or "", [alias.name for alias in node.names]))
        return found
    for line in re.sub(r"\(\s*([^)]*?)\s*\)", lambda group: group[1].replace("\n", " "), text).splitlines():
        if match := re.match(r"\s*from\s+([\w.]+)\s+c?import\s+(.+)", line):
            found |= set(resolve(match[1], re.findall(r"(\w+)(?:\s+as\s+\w+)?", match[2])))
        elif match := re.match(r"\s*c?import\s+([\w.]+)", line):
            found.add(match[1])
    return found


def floor_of(part: str) -> int:
    for floor, parts in enumerate(FLOORS):
        if part in parts:
            return floor
    raise AssertionError(f"marble.{part} stands on no floor: add it to FLOORS and to the picture in marble/__init__.py")


def faults(path: Path) -> list[str]:
    part = module_name(path).split(".")[1]
    found = []
    for module in imports(path):
        if module != "marble" and not module.startswith("marble."):
            continue
        target = module.split(".")[1] if "." in module else ""
        if target == part:
            continue
        if not target:
            reason = "imports the package itself, which imports everything"
        elif target == "testing":
            reason = "" if part == "simulate" else "imports marble.testing, which nothing but simulate may"
        elif part == "testing":
            reason = "" if floor_of(target) <= TESTING_FLOOR_MAX else f"reaches up to {module}"
        elif floor_of(target) < floor_of(part) or target in STEPS.get(part, ()):
            reason = ""
        else:
            reason = f"imports {module}, which is not below it"
        if reason:
            found.append(f"{path.relative_to(ROOT)} {reason}")
    return found


def test_imports_run_downwards_only() -> None:
    inside = [path for path in sources(PACKAGE) if path != PACKAGE / "__init__.py"]
    assert [fault for path in inside for fault in faults(path)] == []


def test_every_part_stands_on_a_floor() -> None:
    parts = {path.stem for path in PACKAGE.glob("*.py")} | {path.parent.name for path in PACKAGE.glob("*/__init__.py")}
    assert parts - {"__init__", "testing"} == {part for floor in FLOORS for part in floor}


def test_the_picture_in_the_package_shows_these_floors() -> None:
    text = ast.get_docstring(ast.parse((PACKAGE / "__init__.py").read_text())) or ""
    # What stands below a row, indented, belongs to it.
    rows = re.findall(r"(?m)^(\d) +(\w+(?:[ |]{1,3}\w+)*) {2,}.*((?:\n {4}\w.*)*)", text)
    shown = {int(floor): tuple(f"{names} {more}".replace("|", " ").split()) for floor, names, more in rows}
    assert shown == dict(enumerate(FLOORS))


def test_no_module_imports_itself_in_a_circle() -> None:
    graph = {module_name(path): imports(path) for path in sources(PACKAGE, (".py", ".pyx"))}
    graph["marble"] = set()
    done: set[str] = set()

    def visit(module: str, way: tuple[str, ...]) -> None:
        assert module not in way, " -> ".join((*way[way.index(module) :], module))
        if module in done:
            return
        for target in sorted(graph.get(module, ())):
            # A package runs before its modules: that it gathers their names is no circle.
            if target in graph and target != module and not module.startswith(f"{target}."):
                visit(target, (*way, module))
        done.add(module)

    for module in sorted(graph):
        visit(module, ())


def test_raft_is_pure() -> None:
    impure = []
    for path in sources(PACKAGE / "raft"):
        for module in imports(path):
            own = any(module == allowed or module.startswith(f"{allowed}.") for allowed in PURE_OF_MARBLE)
            if not own and module not in PURE:
                impure.append(f"{path.relative_to(ROOT)} imports {module}")
    assert impure == []


def test_core_computes_only() -> None:
    impure = [
        f"{path.relative_to(ROOT)} imports {module}"
        for path in sources(PACKAGE / "_core")
        for module in imports(path)
        if module.split(".")[0] in WORLD or module.startswith(("posix", "libc.stdio", "libc.time"))
    ]
    assert impure == []


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("raft/x.py", "def f():\n    from marble.node import Node", "imports marble.node"),
        ("raft/x.py", "from marble.lsm import payload", "imports marble.lsm.payload"),
        ("types.py", "import marble.errors", "imports marble.errors"),
        ("env.py", "from marble import schema", "imports marble.schema"),
        ("node.py", "from marble import open", "imports the package itself"),
        ("client.py", "import marble.testing.disk", "which nothing but simulate may"),
        ("_core/x.pyx", "from marble.lsm cimport y", "imports marble.lsm"),
        ("testing/x.py", "from marble.node import Node", "reaches up"),
        ("driver.py", "from marble.transport.codec import Envelope", ""),
        ("server.py", "from marble.service import TablesService", ""),
        ("_core/x.pyx", "from marble._core.term_index import EntrySpan\nfrom marble.errors import check", ""),
    ],
)
def test_the_rules_bite(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, text: str, words: str) -> None:
    monkeypatch.setitem(globals(), "ROOT", tmp_path)
    path = tmp_path / "marble" / name
    for each in (path, *(tmp_path / "marble" / part for part in ("schema.py", "lsm/payload.py", "node.py"))):
        each.parent.mkdir(parents=True, exist_ok=True)
        each.touch()
    path.write_text(text)
    found = faults(path)
    assert len(found) == (1 if words else 0)
    assert words in "".join(found)
