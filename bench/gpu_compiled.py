"""``python -m bench.gpu_compiled``: every CUDA kernel compiled for sm_80 and sm_90, without a card.

Fails where a kernel spills, asks for more shared memory than its card has or lost its tensor-core
instruction, and where the figures are not those of the table that is kept in the repository.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import click

from bench.command import BenchCommand

TABLE = Path(__file__).parents[1] / "tests" / "cuda" / "compiled.json"

ARCHS = (80, 90)

COLUMNS = (
    "registers", "shared_bytes", "instructions", "HGMMA", "QGMMA", "IGMMA", "HMMA", "IMMA", "LDGSTS"
)  # fmt: skip

EPILOG = """\b
Examples:
  python -m bench.gpu_compiled
  python -m bench.gpu_compiled --write      after a change to kernels or configurations
"""


@click.command(
    cls=BenchCommand, epilog=EPILOG, context_settings={"help_option_names": ["-h", "--help"]}
)
@click.option("--write", is_flag=True, help="Renew the table instead of holding it against.")
def main(write: bool) -> None:
    """Compile every kernel of the cuda backend; exit 1 for a fault or a figure that changed."""
    from step3_hetero.backends.cuda.compiling import faults

    found = compile_all()
    said = [fault for one in found for fault in faults(one)]
    if write:
        TABLE.write_text(as_text(found), encoding="utf-8")
    else:
        said += differences(found, json.loads(TABLE.read_text(encoding="utf-8")))
    for line in said:
        click.echo(line, err=True)
    click.echo(f"{len(found)} kernels compiled for sm_80 and sm_90: {len(said) or 'no'} complaints")
    sys.exit(bool(said))


def compile_all() -> list[Any]:
    """Compile for every arch, each in a process of its own, at the same time.

    Raises:
        click.ClickException: a kernel does not compile, with what Triton said of it.
    """
    from step3_hetero.backends.cuda.compiling import Compiled

    module = "step3_hetero.backends.cuda.compiling"
    running = [
        subprocess.Popen(
            [sys.executable, "-m", module, "--arch", str(arch)], stdout=subprocess.PIPE,
            stderr=subprocess.PIPE, text=True,
        )
        for arch in ARCHS
    ]  # fmt: skip
    found = []
    for arch, process in zip(ARCHS, running, strict=True):
        out, complaints = process.communicate()
        if process.returncode:
            raise click.ClickException(f"sm_{arch}: {complaints.strip()[-2000:]}")
        found += [Compiled(**json.loads(line)) for line in out.splitlines()]
    return found


def as_text(found: Sequence[Any]) -> str:
    """Return the table's file: one kernel a line, so that a change shows as one."""
    rows = [json.dumps({"kernel": one.key, **figures(one)}) for one in found]
    body = ",\n  ".join(rows)
    return f'{{"triton": "{version("triton")}",\n "kernels": [\n  {body}\n]}}\n'


def figures(one: Any) -> dict[str, int]:
    """Return the figures of a kernel that the table keeps."""
    return {name: getattr(one, name) for name in COLUMNS}


def differences(found: Sequence[Any], kept: Mapping[str, Any]) -> list[str]:
    """Say where the figures are not the table's; each line names the kernel and both numbers."""
    if kept["triton"] != version("triton"):
        return [f"the table is of triton {kept['triton']}, this is {version('triton')}"]
    old = {row["kernel"]: row for row in kept["kernels"]}
    new = {one.key: figures(one) for one in found}
    said = [f"{key}: in the table, no longer compiled" for key in old.keys() - new.keys()]
    for key, got in new.items():
        if key not in old:
            said.append(f"{key}: not in the table; python -m bench.gpu_compiled --write")
            continue
        changed = {n: (old[key][n], v) for n, v in got.items() if old[key][n] != v}
        said += [f"{key}: {n} was {was}, is {now}" for n, (was, now) in changed.items()]
    return sorted(said)


if __name__ == "__main__":
    main()
