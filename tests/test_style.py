"""Style that a reader should never have to ask for. What ruff and mypy check is not checked again here."""

from __future__ import annotations

import ast
import io
import re
import tokenize
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

FILE_LINES_MAX = 500
FUNCTION_LINES_MAX = 70
"""Without the docstring, which is as long as what it has to say."""

SOURCE = (".py", ".pyi", ".pyx", ".pxd", ".hpp", ".txt", ".toml")

UNFINISHED = re.compile(r"\b(TO" r"DO|FIX" r"ME|X" r"XX|HA" r"CK|NotImplemented" r"Error)\b")
"""Written in halves, or this line would find itself."""

IN_TESTS = {
    r"\btime\.sleep\(|\basyncio\.sleep\(": "sleeps instead of waiting for an event",
    # What the machine itself lacks is an error of the test's own support, and that error is the reason.
    r"pytest\.(mark\.)?(skip(?!\(str\(error\)\))|xfail|importorskip)": "may leave out what it should show",
    r"\bassert True\b": "cannot fail",
}

MAY_SKIP = "machine.py"
"""In `tests`: where a test that needs what some machines do not have is left out, with the reason."""

IN_PACKAGE = {
    r"^\s*(import|from)\s+(pickle|marshal|shelve|dill|cloudpickle)\b": "reads code from the wire or the disk",
    r"(?<![\w.])(eval|exec)\(": "runs what it was given",
    r"^\s*except\s*:": "catches everything without saying so",
    r"^\s*except (Base)?Exception[^\n]*:\s*(#[^\n]*)?\n\s*(pass|continue|\.\.\.)\s*$": "swallows errors",
    r"^#\s*cython:.*boundscheck\s*=\s*False": "takes the bounds checks from a whole file",
}

EXTERN = re.compile(r"^cdef extern from .*:\n((?:[ \t]+.*\n|\n)*)", re.MULTILINE)
C_FUNCTION = re.compile(
    r"^[ \t]*cdef (?!class|extern|cppclass|struct|enum|packed|object |bytes |str |list |tuple |dict |set )"
    r"[^=#\n(]*?(?P<name>\w+)"
    r"\((?:[^()]|\([^()]*\))*\)(?P<end>[^:=\n]*)(?::|$)",
    re.MULTILINE,
)

PRINTING = (
    "marble/backup_commands.py",
    "marble/certs.py",
    "marble/cli.py",
    "marble/demo/",
    "marble/simulate.py",
    "marble/status_commands.py",
    "marble/watch.py",
)
"""Commands talk to a person; everything else is somebody's library."""


def files(*folders: str, endings: tuple[str, ...] = SOURCE) -> list[Path]:
    found = [path for folder in folders for path in (ROOT / folder).rglob("*")]
    return sorted(path for path in found if path.suffix in endings and "__pycache__" not in path.parts)


def relative(path: Path) -> str:
    return str(path.relative_to(ROOT))


def faults(rules: dict[str, str], path: Path) -> Iterator[str]:
    text = path.read_text()
    for pattern, reason in rules.items():
        for match in re.finditer(pattern, text, re.MULTILINE):
            yield f"{relative(path)}:{text.count(chr(10), 0, match.start()) + 1} {reason}"


def code_of(path: Path) -> str:
    """The file with its strings and comments blanked out, lines kept."""
    lines = [list(line) for line in path.read_text().splitlines(keepends=True)]
    with tokenize.open(path) as file:
        text = file.read()
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type in (tokenize.STRING, tokenize.COMMENT):
            for row in range(token.start[0], token.end[0] + 1):
                first = token.start[1] if row == token.start[0] else 0
                last = token.end[1] if row == token.end[0] else len(lines[row - 1]) - 1
                lines[row - 1][first:last] = " " * (last - first)
    return "".join(map("".join, lines))


def test_files_are_short_enough_to_read() -> None:
    long = [
        f"{relative(path)} has {count} lines"
        for path in files("marble", "tests", "bench", endings=(".py", ".pyi", ".pyx", ".pxd", ".hpp"))
        if (count := len(path.read_text().splitlines())) > FILE_LINES_MAX
    ]
    assert long == []


def test_functions_are_short_enough_to_read() -> None:
    long = []
    for path in files("marble", "tests", "bench", endings=(".py",)):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                docstring = node.body[0] if ast.get_docstring(node, clean=False) is not None else None
                said = 0 if docstring is None else (docstring.end_lineno or 0) - docstring.lineno + 1
                count = (node.end_lineno or 0) - node.lineno + 1 - said
                if count > FUNCTION_LINES_MAX:
                    long.append(f"{relative(path)}:{node.lineno} {node.name} has {count} lines")
    assert long == []


def test_nothing_is_left_unfinished() -> None:
    found = [
        f"{relative(path)}:{number} {line.strip()}"
        for path in files("marble", "tests", "bench", "docs", endings=(*SOURCE, ".md"))
        for number, line in enumerate(path.read_text().splitlines(), start=1)
        if UNFINISHED.search(line)
    ]
    assert found == []


def test_every_module_says_what_it_is_for() -> None:
    silent = []
    for path in files("marble", "tests", "bench", endings=(".py", ".pyx", ".pyi")):
        text = path.read_text()
        if text.strip() and not text.lstrip().startswith(('"""', "# ", "# cython")):
            silent.append(relative(path))
    assert silent == []


def test_every_module_postpones_its_annotations() -> None:
    eager = [
        relative(path)
        for path in files("marble", "tests", "bench", endings=(".py",))
        if re.search(r"^(def|class|async def) ", text := path.read_text(), re.MULTILINE)
        and "from __future__ import annotations" not in text
    ]
    assert eager == []


def test_the_package_runs_no_code_from_outside_and_swallows_no_error() -> None:
    found = [fault for path in files("marble", endings=(".py", ".pyx")) for fault in faults(IN_PACKAGE, path)]
    assert found == []


def test_only_commands_print() -> None:
    found = [
        f"{relative(path)}:{code.count(chr(10), 0, match.start()) + 1}"
        for path in files("marble", endings=(".py",))
        if not relative(path).startswith(PRINTING)
        for code in [code_of(path)]
        for match in re.finditer(r"(?<![\w.])print\(", code)
    ]
    assert found == []


def test_tests_can_fail_and_wait_for_events() -> None:
    here = Path(__file__).resolve()
    exempt = (here, here.with_name(MAY_SKIP))
    found = [
        fault for path in files("tests", endings=(".py",)) if path not in exempt for fault in faults(IN_TESTS, path)
    ]
    assert found == []


def test_every_kernel_has_its_stub() -> None:
    bare = [relative(path) for path in files("marble", endings=(".pyx",)) if not path.with_suffix(".pyi").exists()]
    assert bare == []


def test_every_c_function_says_how_it_fails() -> None:
    """A cdef function with neither `noexcept` nor `except` would print and go on, or check an error that cannot be.

    One that returns a Python object fails by returning none, and Cython allows it no word about it.
    """
    silent = []
    for path in files("marble", endings=(".pyx", ".pxd")):
        # What C++ declares is C++'s matter; only the lines are kept.
        text = EXTERN.sub(lambda block: "\n" * block[0].count("\n"), path.read_text())
        silent += [
            f"{relative(path)}:{text.count(chr(10), 0, match.start('name')) + 1} {match['name']}"
            for match in C_FUNCTION.finditer(text)
            if "except" not in match["end"]
        ]
    assert silent == []


def test_no_built_or_abandoned_files_lie_about() -> None:
    unwanted = (".so", ".o", ".a", ".c", ".cpp", ".bak", ".orig", ".rej")
    assert [relative(path) for path in files("marble", "tests", "bench", "docs", endings=unwanted)] == []


@pytest.mark.parametrize(
    ("text", "rules", "words"),
    [
        ("try:\n    f()\nexcept Exception:\n    pass\n", IN_PACKAGE, "swallows errors"),
        ("try:\n    f()\nexcept Exception as e:  # fine\n    pass\n", IN_PACKAGE, "swallows errors"),
        ("try:\n    f()\nexcept:\n    raise\n", IN_PACKAGE, "catches everything"),
        ("import pickle\n", IN_PACKAGE, "reads code"),
        ("x = eval(text)\n", IN_PACKAGE, "runs what it was given"),
        ("try:\n    f()\nexcept OSError:\n    pass\n", IN_PACKAGE, ""),
        ("table.eval(1)\n", IN_PACKAGE, ""),
        ("    time.sleep" + "(1)\n", IN_TESTS, "sleeps"),
        ("@pytest.mark." + "xfail\n", IN_TESTS, "leave out"),
    ],
)
def test_the_rules_bite(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str, rules: dict[str, str], words: str
) -> None:
    monkeypatch.setitem(globals(), "ROOT", tmp_path)
    path = tmp_path / "x.py"
    path.write_text(text)
    found = list(faults(rules, path))
    assert len(found) == (1 if words else 0)
    assert words in "".join(found)
