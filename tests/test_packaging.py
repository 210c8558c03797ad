"""One import name, light imports, extras that keep vendors apart, and a wheel that works alone."""

import importlib
import importlib.util
import json
import re
import shutil
import site
import subprocess
import sys
import tomllib
import venv
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
VENDOR_LIBRARIES = {"onnx", "onnxruntime", "torch", "torch_npu", "triton"}


@pytest.mark.parametrize("folder", ["backends", "placement"])
def test_link_in_the_package_points_at_the_folder(folder):
    link = ROOT / "step3_hetero" / folder
    assert link.is_symlink()
    assert link.readlink() == Path("..", folder)
    module = importlib.import_module(f"step3_hetero.{folder}")
    assert Path(module.__file__).samefile(ROOT / folder / "__init__.py")


@pytest.mark.parametrize("folder", ["backends", "placement"])
def test_short_name_refuses_in_one_line(folder):
    done = python("-c", f"import {folder}", cwd=ROOT)
    assert done.returncode == 1
    last = done.stderr.strip().splitlines()[-1]
    assert last == f"ImportError: import step3_hetero.{folder}, not {folder}"


def test_every_folder_of_the_package_is_a_package():
    for top in ("step3_hetero", "backends", "placement"):
        for path in (ROOT / top).rglob("*.py"):
            assert (path.parent / "__init__.py").exists(), f"{path.parent} has no __init__.py"


@pytest.mark.parametrize(
    "module",
    ["step3_hetero", "step3_hetero.registry", "step3_hetero.config", "step3_hetero.api",
     "step3_hetero.cli", "step3_hetero.backends.reference", "step3_hetero.backends.cpu"],
)  # fmt: skip
def test_importing_loads_no_vendor_library(module):
    code = f"import sys, {module}; print(*sorted({VENDOR_LIBRARIES} & set(sys.modules)))"
    done = python("-c", code)
    assert (done.stdout.strip(), done.stderr) == ("", "")


def test_importing_the_package_alone_loads_nothing_outside_python():
    code = "import sys; old = set(sys.modules); import step3_hetero; print(*set(sys.modules) - old)"
    loaded = {name.partition(".")[0] for name in python("-c", code).stdout.split()}
    assert loaded - set(sys.stdlib_module_names) == {"step3_hetero"}


def required(extra):
    """Return the names that an extra brings, with those of the extras that it names."""
    names = set()
    for line in PROJECT["optional-dependencies"][extra]:
        requirement = Requirement(line)
        if canonicalize_name(requirement.name) == PROJECT["name"]:
            for inner in requirement.extras:
                names |= required(inner)
        else:
            names.add(canonicalize_name(requirement.name))
    return names


EXTRAS = sorted(PROJECT["optional-dependencies"])


def test_every_vendor_and_every_service_has_its_extra():
    vendors = {"cpu", "cuda", "ascend", "onnx", "onnx-gpu"}
    assert vendors | {"serve", "distributed", "dev"} <= set(EXTRAS)


@pytest.mark.parametrize("extra", EXTRAS)
def test_extra_never_brings_two_builds_of_one_library(extra):
    names = required(extra)
    assert len(names & {"onnxruntime", "onnxruntime-gpu"}) <= 1
    assert len(names & {"torch-npu", "triton"}) <= 1


@pytest.mark.parametrize("extra", [extra for extra in EXTRAS if extra != "ascend"])
def test_torch_npu_comes_with_its_own_extra_alone(extra):
    assert "torch-npu" not in required(extra)


def test_dev_and_cpu_together_keep_to_the_cpu():
    names = required("dev") | required("cpu")
    assert {"torch", "onnxruntime", "pytest"} <= names
    assert not names & {"torch-npu", "onnxruntime-gpu", "triton", "ray"}


def test_core_requires_no_vendor_library():
    names = {canonicalize_name(Requirement(line).name) for line in PROJECT["dependencies"]}
    assert not names & {"torch", "torch-npu", "triton", "onnx", "onnxruntime", "onnxruntime-gpu"}


def test_licence_is_the_one_that_the_metadata_names():
    text = (ROOT / "LICENSE").read_text()
    assert PROJECT["license"] == "Apache-2.0"
    assert "Apache License\n                           Version 2.0, January 2004" in text
    assert "END OF TERMS AND CONDITIONS" in text


def test_version_stands_in_two_places_and_agrees():
    import step3_hetero

    assert step3_hetero.__version__ == PROJECT["version"]
    assert f"[{PROJECT['version']}]" in (ROOT / "CHANGELOG.md").read_text()


def python(*args, cwd=None, interpreter=sys.executable):
    return subprocess.run(
        [interpreter, *args], cwd=cwd, text=True, capture_output=True, timeout=120, check=False
    )


def run(*command, cwd=None):
    done = subprocess.run(
        list(map(str, command)), cwd=cwd, text=True, capture_output=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="session")
def built(tmp_path_factory):
    """Build the sdist, and the wheel from it, of a copy: leftovers of a build must not get in."""
    folder = tmp_path_factory.mktemp("build")
    source = folder / "source"
    source.mkdir()
    for name in ("step3_hetero", "backends", "placement"):
        ignore = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / name, source / name, symlinks=True, ignore=ignore)
    shutil.copytree(ROOT / "models", source / "models")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", folder / "dist", source)
    (wheel,) = (folder / "dist").glob("*.whl")
    return wheel


@pytest.fixture(scope="session")
def elsewhere(built, tmp_path_factory):
    """Return an environment's bin folder: it has the wheel, and our libraries by path.

    A path in a .pth file is searched, but its own .pth files are not run; so the editable install
    of the repository is out of reach.
    """
    folder = tmp_path_factory.mktemp("elsewhere")
    venv.create(folder, with_pip=False)
    binaries = folder / "bin"
    run(sys.executable, "-m", "pip", "--python", binaries / "python", "install", "--no-deps",
        "--no-index", "--disable-pip-version-check", built)  # fmt: skip
    (own,) = folder.glob("lib/python*/site-packages")
    (own / "libraries.pth").write_text("\n".join(site.getsitepackages()))
    return binaries


@pytest.mark.wheel
def test_wheel_holds_each_source_once_under_one_name(built):
    names = zipfile.ZipFile(built).namelist()
    tops = {name.split("/")[0] for name in names}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"step3_hetero"}
    modules = [name for name in names if name.endswith(".py")]
    sources = {
        f"step3_hetero/{path.relative_to(ROOT)}".replace(
            "step3_hetero/step3_hetero", "step3_hetero"
        )
        for top in ("step3_hetero", "backends", "placement")
        for path in (ROOT / top).rglob("*.py")
        if not {"backends", "placement"} & set(path.relative_to(ROOT).parts[1:])
    }
    assert sorted(modules) == sorted(sources)
    assert "step3_hetero/py.typed" in names
    model = {name for name in names if name.startswith("step3_hetero/conformance/model/")}
    assert any(name.endswith(".safetensors") for name in model)
    assert "step3_hetero/conformance/model/eval/held_out.npz" in model
    assert any(re.search(r"dist-info/licenses/LICENSE$", name) for name in names)


@pytest.mark.wheel
def test_installed_wheel_runs_without_the_repository(elsewhere, tmp_path):
    code = "import step3_hetero.backends.reference as r; print(r.__file__)"
    assert str(elsewhere.parent) in run(elsewhere / "python", "-c", code, cwd=tmp_path)
    assert run(elsewhere / "step3-hetero", "--help", cwd=tmp_path).startswith("Usage: step3-hetero")
    listed = json.loads(run(elsewhere / "step3-hetero", "backends", "--json", cwd=tmp_path))
    assert {"reference", "cpu"} <= {backend["name"] for backend in listed}


@pytest.mark.wheel
def test_installed_wheel_certifies_a_backend(elsewhere, tmp_path):
    run(elsewhere / "step3-hetero", "conformance", "run", "--backend", "cpu", "--only", "model",
        "--only", "rope", "--json", "cpu.json", cwd=tmp_path)  # fmt: skip
    written = json.loads((tmp_path / "cpu.json").read_text())
    assert written["counts"] == {"passed": 12}
    run(elsewhere / "python", "-m", "pytest", "-q", "-p", "no:cacheprovider", "--pyargs",
        "step3_hetero.conformance", "--backend", "cpu", "-k", "model", cwd=tmp_path)  # fmt: skip
