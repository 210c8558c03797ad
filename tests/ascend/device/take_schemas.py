"""Take the vendor's op signatures again from its wheel: ``python take_schemas.py [WHEEL]``.

Without a wheel the pinned one is downloaded, alone. ``schemas.json`` gets the wheel's name and
digest, the signature of every vendor op that the backend or its tests name, a digest of the op's
own documentation inside the wheel, the names of torch's own ops that have an NPU kernel, and the
parameters of what captures graphs.
"""

from __future__ import annotations

import ast
import hashlib
import json
import re
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Any

VERSION = "2.13.0"
OUT = Path(__file__).with_name("schemas.json")
LISTS = ("npu_native_functions.yaml", "npu_native_functions_by_codegen.yaml")
DOCS = "torch_npu/_op_plugin_docs.py"

RUNTIME = {
    "graphs.py": ("NPUGraph.replay", "NPUGraph.update", "graph.__init__"),
    "streams.py": ("Event.record", "Stream.wait_stream"),
    "utils.py": ("current_stream", "device.__init__"),
}
"""What of ``torch.npu`` the backend calls in Python, by the file of torch_npu/npu."""

OPS = (
    "get_npu_format",
    "npu_add_rms_norm",
    "npu_apply_rotary_pos_emb",
    "npu_attention_update",
    "npu_dynamic_quant",
    "npu_format_cast",
    "npu_fused_infer_attention_score",
    "npu_grouped_matmul",
    "npu_moe_distribute_combine",
    "npu_moe_distribute_dispatch",
    "npu_moe_gating_top_k",
    "npu_moe_init_routing_v2",
    "npu_moe_token_unpermute",
    "npu_quant_matmul",
    "npu_rms_norm",
    "npu_rotary_mul",
    "npu_scatter_pa_kv_cache",
    "npu_swiglu",
)


def taken(wheel: Path) -> dict[str, Any]:
    """Return what ``schemas.json`` holds, read from the wheel at ``wheel``."""
    import yaml

    with zipfile.ZipFile(wheel) as archive:
        lists = [yaml.safe_load(archive.read(f"torch_npu/csrc/aten/{name}")) for name in LISTS]
        docs = archive.read(DOCS).decode()
        runtime = {name: _parameters(archive.read(f"torch_npu/npu/{file}").decode(), name)
                   for file, names in RUNTIME.items() for name in names}  # fmt: skip
    schemas = {_name(s): s for y in lists for s in _signatures(y, "custom")}
    native = {_name(s).partition(".")[0] for y in lists for s in _signatures(y, "supported")}
    return {
        "package": f"torch-npu {VERSION}",
        "wheel": wheel.name,
        "sha256": hashlib.sha256(wheel.read_bytes()).hexdigest(),
        "ops": {op: schemas[op] for op in OPS},
        "docs_sha256": {op: _digest(docs, op) for op in OPS},
        "native": sorted(native),
        "runtime": runtime,
    }


def _signatures(listed: dict[str, Any], section: str) -> list[str]:
    """Return a section's signatures; its library registers ``self`` as ``input``."""
    entries = listed.get(section) or []
    found = [e["func"] if isinstance(e, dict) else e for e in entries]
    return [re.sub(r"\bself\b", "input", signature) for signature in found]


def _parameters(source: str, name: str) -> list[str]:
    """Return the parameters of a function, or of a class's method."""
    body: list[ast.stmt] = ast.parse(source).body
    for cls in name.split(".")[:-1]:
        [body] = [n.body for n in body if isinstance(n, ast.ClassDef) and n.name == cls]
    last = name.split(".")[-1]
    [found] = [n for n in body if isinstance(n, ast.FunctionDef) and n.name == last]
    return [a.arg for a in (*found.args.posonlyargs, *found.args.args, *found.args.kwonlyargs)]


def _name(signature: str) -> str:
    return signature.partition("(")[0]


def _digest(docs: str, op: str) -> str | None:
    found = re.search(rf'_add_torch_npu_docstr\(\s*"{op}",\s*"""(.*?)"""', docs, re.DOTALL)
    return hashlib.sha256(found[1].encode()).hexdigest() if found else None


def download(folder: Path) -> Path:
    """Download the pinned wheel for Python 3.11 on x86-64 and return its path."""
    platform = ["--python-version", "3.11", "--platform", "manylinux_2_28_x86_64"]
    subprocess.run(
        [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:",
         *platform, "--dest", str(folder), f"torch-npu=={VERSION}"],
        check=True,
    )  # fmt: skip
    return next(folder.glob("torch_npu-*.whl"))


def main(arguments: list[str]) -> None:
    """Write ``schemas.json``."""
    with tempfile.TemporaryDirectory() as folder:
        wheel = Path(arguments[0]) if arguments else download(Path(folder))
        OUT.write_text(json.dumps(taken(wheel), indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
