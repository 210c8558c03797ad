"""The oracle is worth something only while it shares no code with what it checks."""

import ast
import sys
from pathlib import Path

import pytest

OUTSIDE = {"ml_dtypes", "numpy", "oracle", "PIL", "safetensors"}
TESTS_ONLY = {"pytest", "torch"}
DYNAMIC = {"importlib", "runpy"}  # would hide from this test what they load
FILES = sorted(Path(__file__).parent.rglob("*.py"))


def imported(source):
    """Return the roots of all absolute imports, at any depth; a relative one gives its dots."""
    roots = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            roots |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            roots.add("." * node.level or node.module.partition(".")[0])
        elif isinstance(node, ast.Name) and node.id == "__import__":
            roots.add(node.id)
    return roots


def forbidden(source, *, is_test):
    allowed = (
        (set(sys.stdlib_module_names) - DYNAMIC) | OUTSIDE | (TESTS_ONLY if is_test else set())
    )
    return imported(source) - allowed


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_oracle_imports_only_what_is_listed(path):
    found = forbidden(path.read_text(encoding="utf-8"), is_test=path.name.startswith("test_"))

    assert not found, f"{path.name} imports {', '.join(sorted(found))}"


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ("import step3_hetero", "step3_hetero"),
        ("import step3_hetero.model as m", "step3_hetero"),
        ("from step3_hetero.backends import reference", "step3_hetero"),
        ("def f():\n    from backends.reference import kernels", "backends"),
        ("from ...step3_hetero import model", "..."),
        ("import importlib", "importlib"),
        ("from importlib import import_module", "importlib"),
        ("m = __import__('step3_hetero')", "__import__"),
        ("import numpy, placement", "placement"),
        ("import torch", "torch"),
    ],
)
def test_forbidden_import_is_found_in_every_spelling(source, found):
    assert forbidden(source, is_test=False) == {found}


def test_tests_may_import_torch():
    assert not forbidden("import torch\nimport pytest", is_test=True)


def test_every_module_of_the_oracle_is_looked_at():
    names = {path.name for path in FILES}

    assert {"forward.py", "vision.py", "preprocess.py", "random_checkpoint.py"} <= names
