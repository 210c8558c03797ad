"""Lower Triton kernels, plan them for a 910B and compile their lowered form for this CPU.

Runs where triton-ascend is the only triton. Jobs come as a JSON list on standard input, results
leave as one on standard output. A job: kernel, source (its file), arguments and constants of its
launch (an array stands as its dtype); targets, the chips to plan it for; object, the shared library
to write, or nothing.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
import tempfile
from functools import cache
from pathlib import Path

import triton
from triton._C.libtriton import ir, llvm
from triton.backends.ascend import compiler
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver
from triton.runtime.jit import MockTensor

HERE = Path(__file__).resolve().parent
SPACES = {"ub": "unified buffer", "cbuf": "L1", "cc": "L0C"}
BYTES = {"i1": 1 / 8, "i8": 1, "i16": 2, "f16": 2, "bf16": 2, "i32": 4, "f32": 4, "i64": 8}
PLAN = ("--enable-auto-multi-buffer=True", "--enable-auto-bind-sub-block=True",
        "--enable-hfusion-compile=true", "--enable-hivm-compile=true",
        "--enable-triton-kernel-compile=true")  # fmt: skip
"""The options that triton-ascend itself gives for a 910B."""

TO_LLVM = (
    "--convert-elementwise-to-linalg", "--linalg-generalize-named-ops", "--eliminate-empty-tensors",
    "--empty-tensor-to-alloc-tensor",
    "--one-shot-bufferize=allow-return-allocs-from-loops=true bufferize-function-boundaries=0",
    "--buffer-deallocation-pipeline", "--convert-linalg-to-loops", "--lower-affine",
    "--convert-scf-to-cf", "--memref-expand", "--expand-strided-metadata", "--lower-affine",
    "--convert-cf-to-llvm", "--convert-arith-to-llvm", "--convert-math-to-llvm",
    "--convert-index-to-llvm", "--finalize-memref-to-llvm", "--convert-func-to-llvm",
    "--lower-affine", "--convert-arith-to-llvm", "--reconcile-unrealized-casts",
)  # fmt: skip


@cache
def module(source: str):
    """Import a file of kernels."""
    spec = importlib.util.spec_from_file_location("kernels", source)
    made = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(made)
    return made


class NoCard:
    """What Triton asks of a card before it compiles a launch."""

    def get_current_device(self) -> int:
        """Return the only one."""
        return 0

    def get_current_stream(self, device: int) -> int:
        """Return a stream that nothing is queued on."""
        return 0

    def get_current_target(self) -> GPUTarget:
        """Name a chip; what is lowered is the same for all, plans are made for each."""
        return GPUTarget("npu", "Ascend910B3", 0)


def lowered(job) -> str:
    """Return what Triton makes of a launch, up to the linear algebra that the planner takes."""
    kernel = getattr(module(job["source"]), job["kernel"])
    given = [MockTensor(x) if isinstance(x, str) else x for x in job["arguments"]]
    made = kernel.warmup(*given, grid=(1, 1), **job["constants"])
    text = made.asm["npubin"]
    return text.decode() if isinstance(text, bytes) else text


def stop_at_linalg(_, stages, options) -> None:
    """End Triton's pipeline before the vendor's binary, which needs the closed last step."""
    stages["ttir"] = lambda m, meta: compiler.make_ttir(m, meta, options)
    stages["ttadapter"] = lambda m, meta: compiler.ttir_to_linalg(m, meta, options, named_ops=True)
    stages["npubin"] = lambda m, meta: compiler._parse_linalg_metadata(m, meta)[0].encode()


def planned(text: str, target: str) -> dict[str, object]:
    """Return the bytes of each on-chip memory in the compiler's plan, or why it refuses."""
    with tempfile.TemporaryDirectory() as folder:
        given, kept = Path(folder, "kernel.mlir"), Path(folder, "planned.mlir")
        given.write_text(text)
        done = subprocess.run(
            ["bishengir-compile", given, f"--target={target}", *PLAN, "-o", Path(folder, "out")],
            env={**os.environ, "HIVMC_KEEPS": str(kept)}, capture_output=True, text=True,
            check=False,
        )  # fmt: skip
        said = done.stdout + done.stderr
        if kept.exists() and done.returncode == 0:
            return {"bytes": peaks(kept.read_text())}
        overflow = re.search(r"(\w+) overflow, requires (\d+) bits while (\d+)", said)
        if overflow is None:
            return {"failed": f"exit code {done.returncode}: {said[-600:]}"}
        memory, wanted, there = overflow.groups()
        memory = SPACES.get(memory.lower(), memory)
        return {"refused": f"{memory}: {int(wanted) // 8} bytes of {int(there) // 8}"}


def peaks(text: str) -> dict[str, int]:
    """Return the end of the last array that a plan places in each memory."""
    found = dict.fromkeys(SPACES.values(), 0)
    pattern = r"pointer_cast\(([^)]*)\).*?: memref<([\dx]+)x(\w+), #hivm.address_space<(\w+)>>"
    placed = re.findall(pattern, text)
    if len(placed) != text.count("pointer_cast("):
        raise ValueError(f"{len(placed)} arrays read of {text.count('pointer_cast(')}")
    for places, shape, dtype, space in placed:
        if space not in SPACES:
            continue
        size = BYTES[dtype]
        for n in shape.split("x"):
            size *= int(n)
        ends = [int(re.search(r"%c(\d+)", place)[1]) + int(size) for place in places.split(",")]
        found[SPACES[space]] = max(found[SPACES[space]], *ends)
    return {name: n for name, n in found.items() if n}


def write_object(text: str, target: Path) -> None:
    """Compile a lowered kernel for this CPU."""
    with tempfile.TemporaryDirectory() as folder:
        given, flat, assembly = (Path(folder, n) for n in ("kernel.mlir", "flat.mlir", "kernel.s"))
        given.write_text(text)
        subprocess.run(["bishengir-opt", given, "--allow-unregistered-dialect", *TO_LLVM, "-o",
                        flat], check=True, capture_output=True)  # fmt: skip
        context = ir.context()
        ir.load_dialects(context)
        llvm.init_targets()
        inside = llvm.context()
        made = llvm.to_module(ir.parse_mlir_module(str(flat), context), inside)
        llvm.optimize_module(made, llvm.OPTIMIZE_O3)
        machine = "x86_64-unknown-linux-gnu"
        assembly.write_text(
            llvm.translate_to_asm(str(made), machine, "x86-64-v2", "", [], False, False)
        )
        out = target.with_name(f"{target.name}.{os.getpid()}")
        subprocess.run(["gcc", "-shared", "-fPIC", "-O2", assembly, HERE / "support.c", "-o", out,
                        "-lm"], check=True, capture_output=True)  # fmt: skip
        out.replace(target)


def main() -> None:
    """Do the jobs on standard input."""
    driver.set_active(NoCard())
    for backend in triton.backends.backends.values():  # loaded under a second name
        backend.compiler.add_stages = stop_at_linalg
    results = []
    for job in json.load(sys.stdin):
        text = lowered(job)
        if job.get("object"):
            write_object(text, Path(job["object"]))
        results.append([planned(text, target) for target in job.get("targets", ())])
    json.dump(results, sys.stdout)


if __name__ == "__main__":
    main()
