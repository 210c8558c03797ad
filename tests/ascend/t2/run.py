"""Tier 2: hold the backend against the real torch_npu, over a stand-in driver, without a card.

The vendor's wheel goes into a folder of its own (build/ascend-t2) that only the process started
here sees: with it on the path, plain ``import torch`` would look for the vendor's driver. Exit code
0 also when nothing could be run; the reason is printed then.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
FOLDER = HERE.parents[2] / "build" / "ascend-t2"
SCHEMAS = HERE.parent / "device" / "schemas.json"
VERSION = "2.13.0"
LIBRARIES = ("ascendcl", "hccl", "acl_op_compiler", "ge_runner", "graph", "acl_tdt_channel")


def prepare() -> str | None:
    """Install the wheel and compile the driver; return why that cannot be, or None."""
    import torch

    if not torch.__version__.startswith(VERSION):
        return f"torch_npu {VERSION} wants torch {VERSION}, here is {torch.__version__}"
    compiler = shutil.which("gcc")
    if compiler is None:
        return "no C compiler (gcc)"
    site, lib = FOLDER / "site", FOLDER / "lib"
    if not (site / "torch_npu").is_dir():
        done = _run([sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target",
                     str(site), f"torch-npu=={VERSION}"])  # fmt: skip
        if done.returncode:
            return f"torch-npu {VERSION} does not install: {done.stderr.strip()[-300:]}"
    lib.mkdir(parents=True, exist_ok=True)
    for name in LIBRARIES:
        target = lib / f"lib{name}.so"
        done = _run([compiler, "-w", "-shared", "-fPIC", str(HERE / "driver.c"), "-o", str(target)])
        if done.returncode:
            return f"the stand-in driver does not compile: {done.stderr[-300:]}"
    return None


def check(schemas: Path) -> subprocess.CompletedProcess[str]:
    """Run check.py where torch_npu and the stand-in driver are found."""
    environment = {
        **os.environ,
        "TORCH_DEVICE_BACKEND_AUTOLOAD": "0",
        "TASK_QUEUE_ENABLE": "0",  # errors of an operator surface where it is called
        "LD_LIBRARY_PATH": str(FOLDER / "lib"),
        "PYTHONPATH": str(FOLDER / "site"),
    }
    environment.pop("STEP3_HETERO_ASCEND_STAND_IN", None)
    return _run([sys.executable, str(HERE / "check.py"), str(schemas)], environment)


def altered() -> Path:
    """Write the signatures with one keyword changed, of an operator and of the capture."""
    recorded = json.loads(SCHEMAS.read_text(encoding="utf-8"))
    name = "npu_fused_infer_attention_score"
    recorded["ops"][name] = recorded["ops"][name].replace("sparse_mode", "sparse_modes")
    recorded["runtime"]["graph.__init__"][-2] = "auto_dispatch"
    out = FOLDER / "altered.json"
    out.write_text(json.dumps(recorded), encoding="utf-8")
    return out


def _run(
    command: list[str], environment: dict[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command, env=environment, text=True, capture_output=True, timeout=300, check=False
    )


def main() -> int:
    """Print the report and return the exit code."""
    try:
        if reason := prepare():
            print(f"tier 2: not run: {reason}")
            return 0
        done = check(SCHEMAS)
        print(done.stdout + (done.stderr[-2000:] if done.returncode else ""), end="")
        control = check(altered())
    except subprocess.TimeoutExpired as late:
        print(f"tier 2: FAILED: {' '.join(late.cmd[:3])} did not end within {late.timeout:g} s")
        return 1
    seen = control.returncode == 1 and all(
        said in control.stdout for said in ("sparse_modes", "torch.npu.graph.__init__: recorded")
    )
    print(f"signatures altered by one keyword: {'found' if seen else 'NOT FOUND'}")
    passed = done.returncode == 0 and seen
    print(f"tier 2: {'passed' if passed else 'FAILED'}")
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
