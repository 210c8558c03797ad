"""``step3-hetero checkpoint``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from step3_hetero.cli.options import human_bytes, json_option, print_json, print_table, progress

INSPECT_EPILOG = """\b
Examples:
  step3-hetero checkpoint inspect models/tiny-step3-digits
"""
QUANTISE_EPILOG = """\b
Examples:
  step3-hetero checkpoint quantise models/tiny-step3-digits /tmp/tiny-fp8
"""
EPILOG = INSPECT_EPILOG + QUANTISE_EPILOG.removeprefix("\b\nExamples:\n")


@click.group("checkpoint", epilog=EPILOG)
def command() -> None:
    """Inspect or quantise a checkpoint."""


@command.command("inspect", epilog=INSPECT_EPILOG)
@click.argument("path", type=click.Path(file_okay=False))
@json_option
def inspect(path: str, as_json: bool) -> None:
    """Check every shard and list what a checkpoint holds, part by part."""
    summary = _summary(Path(path))
    if as_json:
        print_json(summary)
        return
    rows = [
        (
            g["name"],
            g["tensors"],
            f"{g['params']:,}",
            human_bytes(g["bytes"]),
            ", ".join(g["dtypes"]),
        )
        for g in [*summary["groups"], summary["total"]]
    ]
    print_table(path, ("part", "tensors", "parameters", "bytes", "dtypes"), rows)


@command.command("quantise", epilog=QUANTISE_EPILOG)
@click.argument("source", type=click.Path(file_okay=False))
@click.argument("out", type=click.Path(file_okay=False))
@json_option
def quantise(source: str, out: str, as_json: bool) -> None:
    """Write the block-FP8 copy of a checkpoint to a new folder."""
    from step3_hetero.model.quantise import quantise_checkpoint

    with progress("quantising, bytes") as advance:
        quantise_checkpoint(
            Path(source), Path(out), on_progress=lambda _, done, total: advance(done, total)
        )
    before, after = (_summary(Path(folder)) for folder in (source, out))
    if as_json:
        print_json({"path": out, "source": before, "written": after})
        return
    sizes = [human_bytes(s["total"]["bytes"]) for s in (before, after)]
    click.echo(f"wrote {out}: {sizes[1]} of weights, from {sizes[0]}")


def _summary(folder: Path) -> dict[str, Any]:
    """Open a checkpoint, which checks its headers, and return what it holds."""
    from step3_hetero.model.checkpoint import Checkpoint
    from step3_hetero.model.config import ModelConfig

    return Checkpoint.open(folder, ModelConfig.read(folder)).summary().to_json()
