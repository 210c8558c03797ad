"""Who may import whom, held over the syntax tree: downwards only, and no vendor by name."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

BASE = "errors specs ops resample"
CORE = f"{BASE} model graph backend composed registry"
FACTS = "config catalogue transport emulate"
MAY_IMPORT = {
    "": "api runtime",  # the front door: imports them when a name is first used
    "errors": "",
    "tensors": "errors",
    "specs": "errors tensors",
    "ops": "errors specs",
    "resample": "errors",
    "model": BASE,
    "graph": f"{BASE} model",
    "collective": "errors",
    "backend": f"{BASE} collective composed",  # composed: the default stage, imported when built
    "composed": f"{BASE} backend",
    "registry": f"{BASE} backend composed",
    "config": "errors",
    "catalogue": "errors config",
    "transport": CORE,
    "emulate": f"{CORE} config catalogue",
    "runtime": f"{CORE} {FACTS}",
    "placement": f"{CORE} {FACTS} runtime",
    "afd": f"{CORE} {FACTS} runtime placement",
    "conformance": f"{CORE} {FACTS} runtime placement afd",
    "api": f"{CORE} {FACTS} runtime placement afd conformance",
    "evals": f"{CORE} {FACTS} runtime placement afd conformance api",
    "serve": f"{CORE} {FACTS} runtime placement afd conformance api evals",
    "cli": f"{CORE} {FACTS} runtime placement afd conformance api evals serve",
}
"""Each room of the package, and the rooms below it."""

CATALOGUE = ("placement.catalogue", "placement.catalogue_file")
"""Modules that lie in placement/, beside the cards, but are a room of their own below `runtime`:
what a card is, which needs no planner."""

VENDOR_MAY_IMPORT = f"{BASE} backend composed"
VENDOR_LIBRARIES = {
    "reference": "",
    "torch_common": "torch",
    "cpu": "torch",
    "cuda": "torch triton",
    "ascend": "torch torch_npu triton",
    "onnxruntime": "onnx onnxruntime",
}
SHARED = "torch_common"
"""What torch backends share; the one vendor folder that another may import."""

LIBRARIES = {"torch", "torch_npu", "triton", "onnx", "onnxruntime"}


def imported(source, module, *, is_package=False):
    """Return every module that ``source`` imports, anywhere in it, as absolute dotted names."""
    found = set()
    package = module if is_package else module.rpartition(".")[0]
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: len(package.split(".")) - node.level + 1]
            start = ".".join([*(above if node.level else []), *filter(None, [node.module])])
            found |= {f"{start}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Call) and _is_import(node.func):
            found |= {a.value for a in node.args if isinstance(a, ast.Constant)}
    return {name for name in found if isinstance(name, str)}


def _is_import(function):
    name = getattr(function, "attr", getattr(function, "id", ""))
    return name in {"import_module", "__import__"}


def room_of(parts):
    """Return the room of a dotted name, given without ``step3_hetero``."""
    return "catalogue" if ".".join(parts[:2]) in CATALOGUE else (parts[0] if parts else "")


def violations(source, module, *, is_package=False):
    """Return what ``module`` imports and may not."""
    room = room_of(module.split(".")[1:])
    if room == "backends":
        vendor = [*module.split("."), ""][2]
        allowed = VENDOR_MAY_IMPORT.split()
        vendors = {vendor, SHARED if vendor != "reference" else vendor}
        libraries = set(VENDOR_LIBRARIES.get(vendor, "").split())
    else:
        allowed = [room, *MAY_IMPORT.get(room, "").split()]
        vendors, libraries = set(), set()
    refused = set()
    for name in imported(source, module, is_package=is_package):
        top, *rest = name.split(".")
        below = room_of(rest)
        if top == "step3_hetero":
            is_vendor = below == "backends"
            fine = (rest[1:2] or [""])[0] in vendors if is_vendor else below in allowed
            if not fine and below != "__version__":
                refused.add(name)
        elif top in LIBRARIES - libraries or top in {"backends", "placement"}:
            refused.add(name)
    return refused


def modules():
    """Yield path and dotted name of every module of the package."""
    for top in ("step3_hetero", "backends", "placement"):
        for path in sorted((ROOT / top).rglob("*.py")):
            parts = list(path.relative_to(ROOT).with_suffix("").parts)
            if top == "step3_hetero" and parts[1] in ("backends", "placement"):
                continue  # a link, walked under its own name
            if top != "step3_hetero":
                parts.insert(0, "step3_hetero")
            yield path, ".".join(parts[:-1] if path.name == "__init__.py" else parts)


MODULES = list(modules())


@pytest.mark.parametrize(("path", "module"), MODULES, ids=[module for _, module in MODULES])
def test_module_imports_downwards_only(path, module):
    is_package = path.name == "__init__.py"
    found = violations(path.read_text(encoding="utf-8"), module, is_package=is_package)
    assert not found, f"{module} may not import {', '.join(sorted(found))}"


def test_every_room_and_vendor_has_its_place_in_the_order():
    rooms = {room_of(module.split(".")[1:]) for _, module in MODULES if "." in module}
    vendors = {m.split(".")[2] for _, m in MODULES if m.startswith("step3_hetero.backends.")}
    assert rooms - {"backends"} <= MAY_IMPORT.keys()
    assert vendors <= VENDOR_LIBRARIES.keys()


def test_order_has_no_way_round_but_the_default_stage():
    for room, below in MAY_IMPORT.items():
        for other in below.split():
            if {room, other} != {"backend", "composed"}:
                assert room not in MAY_IMPORT[other].split(), f"{room} and {other}"


@pytest.mark.parametrize(
    ("module", "source", "found"),
    [
        ("step3_hetero.specs", "import step3_hetero.model.config", "step3_hetero.model.config"),
        ("step3_hetero.graph.build", "from step3_hetero import registry", "step3_hetero.registry"),
        ("step3_hetero.graph.build", "from ..backend import Device", "step3_hetero.backend.Device"),
        ("step3_hetero.graph.build", "def f():\n    from .. import cli", "step3_hetero.cli"),
        ("step3_hetero.config.schema", "from step3_hetero.specs import X", "step3_hetero.specs.X"),
        ("step3_hetero.runtime.edges", "from step3_hetero.placement.planner import X",
         "step3_hetero.placement.planner.X"),
        ("step3_hetero.placement.catalogue", "from step3_hetero.placement.plans import X",
         "step3_hetero.placement.plans.X"),
        ("step3_hetero.runtime.engine", "if 0:\n    import torch.nn", "torch.nn"),
        ("step3_hetero.runtime.engine", "import_module('torch_npu')", "torch_npu"),
        ("step3_hetero.runtime.engine", "x = importlib.import_module('triton')", "triton"),
        ("step3_hetero.runtime.engine", "import backends.cpu", "backends.cpu"),
        ("step3_hetero.cli", "from step3_hetero.backends.cpu import X",
         "step3_hetero.backends.cpu.X"),
        ("step3_hetero.backends.cuda.moe", "from step3_hetero.backends import ascend",
         "step3_hetero.backends.ascend"),
        ("step3_hetero.backends.cuda.moe", "from ..reference import norm",
         "step3_hetero.backends.reference.norm"),
        ("step3_hetero.backends.cuda.moe", "import torch_npu", "torch_npu"),
        ("step3_hetero.backends.cpu.moe", "from step3_hetero.graph import X",
         "step3_hetero.graph.X"),
        ("step3_hetero.backends.reference", "import torch", "torch"),
        ("step3_hetero.backends.reference.norm", "from ..torch_common import arrays",
         "step3_hetero.backends.torch_common.arrays"),
        ("step3_hetero.backends.torch_common.arrays", "from ..cpu import norm",
         "step3_hetero.backends.cpu.norm"),
    ],
)  # fmt: skip
def test_seeded_violation_is_found(module, source, found):
    assert violations(source, module) == {found}


@pytest.mark.parametrize(
    ("module", "source"),
    [
        (
            "step3_hetero.backends.cuda.moe",
            "import torch, triton\nfrom ..torch_common import arrays",
        ),
        ("step3_hetero.backends.cuda.moe", "from step3_hetero.backends.cuda.norm import rms_norm"),
        ("step3_hetero.cli.run", "from step3_hetero import __version__, api"),
        (
            "step3_hetero.runtime.engine",
            "from .request import X\nfrom step3_hetero.config import Y",
        ),
        (
            "step3_hetero.emulate.card",
            "from step3_hetero.placement.catalogue import Card",
        ),
    ],
)
def test_allowed_import_passes(module, source):
    assert not violations(source, module)


def test_relative_import_of_a_package_counts_from_the_package():
    assert imported("from . import kernels", "step3_hetero.backends.cpu", is_package=True) == {
        "step3_hetero.backends.cpu.kernels"
    }
