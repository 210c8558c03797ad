"""The oracle is worth something only while it shares no code with what it checks.

The tests that hold the package's reference to the oracle, test_reference_*.py, import both; nothing
else here knows the package, and no module of the oracle reaches it through such a test.
"""

import ast
import sys
from pathlib import Path

import pytest

OUTSIDE = {"ml_dtypes", "numpy", "oracle", "PIL", "safetensors"}
BY_ONE_MODULE = {"onnx_ops.py": {"onnx"}}
TESTS_ONLY = {"pytest", "torch"}
JUDGED = {"step3_hetero"}
DYNAMIC = {"importlib", "runpy"}  # would hide from this test what they load
FILES = sorted(Path(__file__).parent.rglob("*.py"))


def roots_of(name):
    """Return the root of a dotted name; a test among the oracle's modules keeps its name."""
    root, _, rest = name.partition(".")
    return name if root == "oracle" and rest.startswith("test_") else root


def imported(source):
    """Return the roots of all absolute imports, at any depth; a relative one gives its dots."""
    roots = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            roots |= {roots_of(alias.name) for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level:
            roots.add("." * node.level)
        elif isinstance(node, ast.ImportFrom):
            below = [f".{alias.name}" for alias in node.names] if node.module == "oracle" else [""]
            roots |= {roots_of(node.module + name) for name in below}
        elif isinstance(node, ast.Name) and node.id == "__import__":
            roots.add(node.id)
    return roots


def forbidden(source, name):
    """Return what a file of that name imports and must not."""
    found = imported(source) - (set(sys.stdlib_module_names) - DYNAMIC) - OUTSIDE
    found -= BY_ONE_MODULE.get(name, set())
    if name.startswith("test_"):
        found = {root for root in found - TESTS_ONLY if not root.startswith("oracle.test_")}
    return found - JUDGED if name.startswith("test_reference_") else found


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_oracle_imports_only_what_is_listed(path):
    found = forbidden(path.read_text(encoding="utf-8"), path.name)

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
        ("from oracle import ops, test_reference_ops", "oracle.test_reference_ops"),
        ("from oracle.test_reference_ops import call", "oracle.test_reference_ops"),
        ("import oracle.test_reference_ops as t", "oracle.test_reference_ops"),
    ],
)
@pytest.mark.parametrize("name", ["forward.py", "ops.py", "onnx_ops.py"])
def test_forbidden_import_is_found_in_every_spelling(name, source, found):
    assert forbidden(source, name) == {found}


def test_only_the_tests_of_the_reference_import_the_package():
    source = "from step3_hetero.ops import OPS"

    assert not forbidden(source, "test_reference_ops.py")
    for name in ("test_oracle.py", "test_oracle_torch.py", "test_imports_nothing.py"):
        assert forbidden(source, name) == {"step3_hetero"}


def test_onnx_is_imported_by_one_module():
    assert not forbidden("import onnx", "onnx_ops.py")
    assert forbidden("import onnx", "ops.py") == {"onnx"}


def test_tests_may_import_torch():
    assert not forbidden("import torch\nimport pytest", "test_oracle_torch.py")


def test_every_module_of_the_oracle_is_looked_at():
    names = {path.name for path in FILES}

    assert {"forward.py", "vision.py", "preprocess.py", "random_checkpoint.py"} <= names
    assert {"ops.py", "onnx_ops.py", "test_reference_ops.py"} <= names
