"""Which files a certificate's digests follow."""

import ast
import sys

import pytest

from step3_hetero.conformance import digests as module
from step3_hetero.conformance.digests import digests, files_digest
from step3_hetero.conformance.gaps import known_gaps
from step3_hetero.conformance.origin import origin
from step3_hetero.registry import get_backend

NEW = ["kernel.cu", "op.cpp", "op.h", "k.cl", "model.om", "op.o", "op.bin", "x.pyd", "l.so.2", "k"]


@pytest.mark.parametrize("name", NEW)
def test_any_new_file_changes_the_digest(name, tmp_path):
    before = files_digest([tmp_path])
    (tmp_path / name).write_bytes(b"1")
    assert files_digest([tmp_path]) != before


def test_a_file_that_moves_between_folders_changes_the_digest(tmp_path):
    for place in ("one/a", "two/a"):
        (tmp_path / place).mkdir(parents=True)
    (tmp_path / "one" / "a" / "k.py").write_text("x")
    before = files_digest([tmp_path])
    (tmp_path / "one" / "a" / "k.py").rename(tmp_path / "two" / "a" / "k.py")
    assert files_digest([tmp_path]) != before


def test_what_the_interpreter_caches_changes_nothing(tmp_path):
    before = files_digest([tmp_path])
    (tmp_path / "__pycache__").mkdir()
    (tmp_path / "__pycache__" / "k.pyc").write_bytes(b"1")
    assert files_digest([tmp_path]) == before


@pytest.mark.parametrize(
    "name",
    ["backend.py", "registry.py", "graph/build.py", "model/config.py", "runtime/loader.py",
     "runtime/engine.py", "conformance/calls.py", "conformance/gaps.py", "conformance/suite.py",
     "conformance/last.py", "conformance/sketch.py", "conformance/certificate.py",
     "conformance/model/config.json"],
)  # fmt: skip
def test_what_judges_is_in_the_digest_of_the_cases(name):
    assert module.CORE / name in module.judges()


def test_nothing_that_judges_imports_what_is_left_out():
    judges = set(module.judges())
    left_out = {p for p in module.CORE.rglob("*.py") if p not in judges}
    names = {".".join(p.relative_to(module.CORE.parent).with_suffix("").parts) for p in left_out}
    excused = {f"step3_hetero.{name.removesuffix('.py')}" for name in module.OPS}
    excused |= {n for n in names if n.startswith("step3_hetero.backends.")}
    for path in judges:
        if path.suffix != ".py" or path.name in ("__init__.py", "plugin.py"):  # what users call
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom):
                assert node.module not in names - excused, f"{path}: {node.module}"


def load(folder, monkeypatch, name):
    """Import a module that defines a backend and return one."""
    monkeypatch.syspath_prepend(folder)
    base = type(get_backend("reference"))
    module = __import__(name, fromlist=["x"])
    made = type("Flat", (base,), {"__module__": name})()
    monkeypatch.setitem(sys.modules, name, module)
    return made


def test_a_backend_in_one_module_is_that_file_alone(tmp_path, monkeypatch):
    (tmp_path / "flat_vendor.py").write_text("x = 1\n")
    (tmp_path / "stranger.py").write_text("x = 1\n")
    (tmp_path / "known_gaps.txt").write_text("a stranger's file\n")
    backend = load(tmp_path, monkeypatch, "flat_vendor")
    assert origin(backend) == tmp_path / "flat_vendor.py"
    before = digests(backend)["backend"]
    (tmp_path / "stranger.py").write_text("x = 2\n")
    assert digests(backend)["backend"] == before
    assert known_gaps(backend) == {}
    (tmp_path / "flat_vendor.py").write_text("x = 2\n")
    assert digests(backend)["backend"] != before


@pytest.mark.parametrize("shared", [False, True])
def test_a_backend_deep_in_a_package_is_the_whole_package(shared, tmp_path, monkeypatch):
    package = tmp_path / "ns" / "deep" if shared else tmp_path / f"deep{shared}"
    (package / "impl").mkdir(parents=True)
    for folder in (package, package / "impl"):
        (folder / "__init__.py").write_text("")
    (package / "impl" / "main.py").write_text("x = 1\n")
    name = ".".join(package.relative_to(tmp_path).parts)
    assert origin(load(tmp_path, monkeypatch, f"{name}.impl.main")) == package


def test_our_own_backend_is_its_folder_and_not_the_core():
    assert origin(get_backend("reference")).parts[-2:] == ("backends", "reference")
