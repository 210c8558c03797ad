"""Compile every kernel for a card that is not here, and read what the compiler made of it.

``python -m step3_hetero.backends.cuda.compiling --arch 90`` prints one JSON object a line. Each
arch needs a process of its own: Triton keeps a function's target by device number, and would hand
out the first arch's binary for the second.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from step3_hetero.backends.cuda.cards import SHARED_BYTES
from step3_hetero.backends.cuda.jobs import Job, jobs

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
"""ptxas, cuobjdump and nvdisasm come with Triton."""

TYPES = {
    torch.bfloat16: "*bf16",
    torch.float32: "*fp32",
    torch.int32: "*i32",
    torch.uint8: "*u8",
    torch.int8: "*i8",
    torch.float8_e4m3fn: "*fp8e4nv",
}

COUNTED = ("HGMMA", "QGMMA", "IGMMA", "HMMA", "IMMA", "LDGSTS", "STL", "LDL")
"""Instructions that are counted: tensor cores, asynchronous copies, spills."""


@dataclass(frozen=True)
class Compiled:
    """What one kernel became: registers a thread, stack and shared memory in bytes, instructions.

    ``promises`` is the instruction that its configuration promises, or empty.
    """

    name: str
    arch: int
    configuration: str
    promises: str
    registers: int
    stack_bytes: int
    shared_bytes: int
    instructions: int
    HGMMA: int
    QGMMA: int
    IGMMA: int
    HMMA: int
    IMMA: int
    LDGSTS: int
    STL: int
    LDL: int

    @property
    def key(self) -> str:
        """Return what tells this entry of the table from others."""
        return f"sm_{self.arch} {self.name} [{self.configuration}]"


def faults(found: Compiled) -> list[str]:
    """Say what a kernel may not be: spilled, too large for its card, or off the tensor cores."""
    said = []
    if found.stack_bytes:
        said.append(f"{found.stack_bytes} bytes of stack")
    if found.STL or found.LDL:
        said.append(f"spills: {found.STL} stores to local memory, {found.LDL} loads")
    limit = SHARED_BYTES[found.arch]
    if found.shared_bytes > limit:
        said.append(f"{found.shared_bytes} bytes of shared memory, the card has {limit}")
    if found.promises and not getattr(found, found.promises):
        said.append(f"no {found.promises}, which its configuration promises")
    return [f"{found.key}: {one}" for one in said]


def compile_job(job: Job) -> Compiled:
    """Compile one launch for its arch and disassemble the result.

    Raises:
        Whatever Triton raises of a kernel that does not compile.
    """
    made, chosen = job.launch, job.launch.configuration
    meta = dict(made.constants) | ({} if chosen is None else chosen.meta)
    options = {n: meta.pop(n) for n in ("num_warps", "num_stages") if n in meta}
    binary = triton.compile(
        _source(made.kernel, made.args, meta),
        target=GPUTarget("cuda", job.arch, 32),
        options=options,
    )
    usage, listing = _disassembled(binary.asm["cubin"])
    blocks = {n: v for n, v in meta.items() if n.startswith("BLOCK") or n == "ROWS"} | options
    counts = {n: len(re.findall(rf"\b{n}\b", listing)) for n in COUNTED}
    return Compiled(
        job.name,
        job.arch,
        " ".join(f"{n}={v}" for n, v in blocks.items()),
        "" if chosen is None else chosen.promises,
        registers=int(usage["REG"]),
        stack_bytes=int(usage["STACK"]),
        shared_bytes=binary.metadata.shared,
        instructions=len(re.findall(r"/\*[0-9a-f]{4,}\*/", listing)),
        **counts,
    )


def _source(kernel: Any, args: Sequence[Any], constants: dict[str, Any]) -> ASTSource:
    """Return a kernel with its arguments' types, as Triton specialises them at a launch.

    A pointer or integer that 16 divides is said to be so; an integer 1 is a constant.
    """
    names = kernel.arg_names
    signature = {n: "constexpr" for n in constants}
    held: dict[tuple[int, ...], Any] = {(names.index(n),): v for n, v in constants.items()}
    attributes = {}
    for place, value in enumerate(args):
        name = names[place]
        if isinstance(value, int) and value == 1:
            signature[name] = "constexpr"
            held[(place,)] = 1
            continue
        signature[name] = _type(value)
        if isinstance(value, Tensor) or (isinstance(value, int) and value % 16 == 0):
            attributes[(place,)] = [["tt.divisibility", 16]]
    return ASTSource(
        fn=kernel, signature={n: signature[n] for n in names}, constexprs=held, attrs=attributes
    )


def _type(value: Any) -> str:
    if isinstance(value, Tensor):
        return TYPES[value.dtype]
    if isinstance(value, float):
        return "fp32"
    return "i32" if -(2**31) <= value < 2**31 else "i64"


def _disassembled(cubin: bytes) -> tuple[dict[str, str], str]:
    """Return what a binary uses (REG, STACK, SHARED, LOCAL) and its instructions."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        used = _output("cuobjdump", "--dump-resource-usage", file.name)
        return dict(re.findall(r"\b([A-Z]+):(\d+)", used)), _output("nvdisasm", "-c", file.name)


def _output(tool: str, *arguments: str) -> str:
    done = subprocess.run(
        [str(TOOLS / tool), *arguments], capture_output=True, text=True, check=True
    )
    return done.stdout


def compiled(arch: int, only: str = "") -> Iterator[Compiled]:
    """Compile every job of an arch whose name contains ``only``."""
    for job in jobs(arch):
        if only in job.name:
            yield compile_job(job)


def main() -> None:
    """Print one compiled kernel a line."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--arch", type=int, choices=sorted(SHARED_BYTES), required=True)
    parser.add_argument("--only", default="", help="jobs whose name contains this")
    asked = parser.parse_args()
    for found in compiled(asked.arch, asked.only):
        sys.stdout.write(json.dumps(asdict(found)) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
