"""Memory of a fresh process that has loaded a model, against what it has to hold."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import click

from bench.checkpoint import CACHE, Sizes, checkpoint
from bench.command import BenchCommand

ALLOWANCE_MB = 300
"""For Python, torch and all else beside weights and KV cache."""

KV_BLOCKS = 64

EPILOG = """\b
Examples:
  python -m bench.memory
  python -m bench.memory --backend cpu
"""


@click.command(
    cls=BenchCommand, epilog=EPILOG, context_settings={"help_option_names": ["-h", "--help"]}
)
@click.option("--backend", default="cpu", show_default=True)
@click.option("--cache", type=click.Path(path_type=Path), default=CACHE, show_default=True)
def main(backend: str, cache: Path) -> None:
    """Load the bench checkpoint and compare resident with prepared bytes; exit 1 when over.

    Resident are private and shared pages (RssAnon + RssShmem); pages of files can be dropped.
    """
    folder = checkpoint(Sizes(), cache)
    from step3_hetero.api import load

    roles = {"all": {"stages": ["embed", "attention", "ffn", "head"], "backend": backend}}
    config = {
        "version": 1,
        "model": str(folder),
        "roles": roles,
        "runtime": {"kv_blocks": KV_BLOCKS},
    }
    with load(config) as engine:
        weights, kv = held(engine.executor)
        resident = resident_bytes()
    allowed = weights + kv + ALLOWANCE_MB * 1e6
    for name, count in (
        ("checkpoint", (folder / "model.safetensors").stat().st_size),
        ("prepared weights", weights),
        ("KV cache", kv),
        ("resident", resident),
        ("allowed", allowed),
    ):
        click.echo(f"{name:<18}{count / 1e6:8.0f} MB")
    click.echo("within" if resident <= allowed else "OVER")
    sys.exit(resident > allowed)


def held(executor: Any) -> tuple[int, int]:
    """Return the bytes of prepared weights and of KV cache that a local executor holds."""
    stages = [loaded.stage for loaded in executor._stages.values()]
    weights = sum(w.nbytes for stage in stages for w in stage.w.values())
    return weights, sum(cache.nbytes for cache in executor._caches)


def resident_bytes() -> int:
    """Return RssAnon + RssShmem of this process, as Linux counts them."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    found = dict(line.split(":", 1) for line in lines)
    return sum(int(found[name].split()[0]) for name in ("RssAnon", "RssShmem")) * 1024


if __name__ == "__main__":
    main()
