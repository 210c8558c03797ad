"""What ruff does not measure: short files, short functions, no promise without an issue."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = ("step3_hetero", "backends", "placement", "tests", "tools", "examples", "bench")
FILES = sorted(
    {path.resolve() for folder in FOLDERS for path in (ROOT / folder).rglob("*.py")},
)
FILE_LINES = 400
FUNCTION_LINES = 60
PROMISE = re.compile(r"\b(?:TO" + r"DO|FIX" + r"ME|XX" + r"X)\b(?!\(#\d+\))")


def long_functions(source, limit=FUNCTION_LINES):
    """Return the functions longer than ``limit`` lines; decorators and docstring count."""
    return [
        f"{node.name}: {node.end_lineno - node.lineno + 1} lines"
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        and node.end_lineno - node.lineno >= limit
    ]


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_file_is_one_that_a_reader_can_hold(path):
    source = path.read_text(encoding="utf-8")
    lines = source.count("\n")
    assert lines <= FILE_LINES
    assert not PROMISE.findall(source), "a promise names its issue, as in (#12)"
    if path.relative_to(ROOT).parts[0] != "backends":  # a kernel is as long as its op
        assert not long_functions(source)


def test_what_is_too_long_is_found():
    body = "\n".join("    x = 1" for _ in range(FUNCTION_LINES))
    assert long_functions(f"def f():\n{body}\n") == ["f: 61 lines"]
    assert not long_functions(f"def f():\n{body[10:]}\n")


@pytest.mark.parametrize("word", ["TO" + "DO", "FIX" + "ME", "XX" + "X"])
def test_promise_without_an_issue_is_found(word):
    assert PROMISE.search(f"# {word}: faster")
    assert not PROMISE.search(f"# {word}(#12): faster")
