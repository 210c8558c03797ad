"""``step3-hetero tune``."""

from __future__ import annotations

from pathlib import Path

import click

EPILOG = """\b
Examples:
  step3-hetero tune --backend cuda --out h20.json
  STEP3_HETERO_CUDA_CONFIGURATIONS=h20.json step3-hetero generate run.yaml --prompt hello
"""


@click.command("tune", epilog=EPILOG)
@click.option("--backend", required=True, help="The backend whose kernels are tuned.")
@click.option("--out", required=True, type=click.Path(dir_okay=False), help="The table to write.")
def command(backend: str, out: str) -> None:
    """Time a backend's kernels on this machine's card and save the quickest configurations.

    Measure on a quiet machine.
    """
    from step3_hetero.errors import ConfigError
    from step3_hetero.registry import get_backend

    tune = getattr(get_backend(backend), "tune", None)
    if tune is None:
        raise ConfigError(f"backend {backend!r} has nothing to tune; cuda has")
    tune(Path(out), lambda line: click.echo(line, err=True))
    click.echo(f"wrote {out}")
