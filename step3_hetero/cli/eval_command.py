"""``step3-hetero eval``."""

from __future__ import annotations

from typing import Any

import click

from step3_hetero.cli.loading import roles_options
from step3_hetero.cli.options import (
    config_argument,
    json_option,
    print_json,
    print_table,
    progress,
    set_option,
)
from step3_hetero.cli.seeing import Seeing, seeing_options, seen_engine, timings_json

EPILOG = """\b
Examples:
  step3-hetero eval digits examples/digits.yaml
  step3-hetero eval digits examples/digits.yaml --ablate experts --limit 200
  step3-hetero eval digits examples/digits.yaml --set roles.f.backend=cpu --json
"""


@click.group("eval", epilog=EPILOG)
def command() -> None:
    """Measure a model's accuracy through the full engine."""


@command.command("digits", epilog=EPILOG)
@config_argument
@click.option("--limit", type=click.IntRange(1), help="Ask the first N of each kind only.")
@click.option(
    "--ablate",
    type=click.Choice(["attention", "experts", "vision"]),
    help="Zero a part first, to see what it is worth (experts: routed and shared).",
)
@roles_options
@seeing_options
@set_option
@json_option
def digits(
    config: str,
    limit: int | None,
    ablate: str | None,
    overrides: tuple[str, ...],
    as_json: bool,
    seeing: Seeing,
    roles: dict[str, Any],
) -> None:
    """Ask about held-out handwritten digits: which digit, and the sum of two."""
    from step3_hetero.config import Config
    from step3_hetero.evals.digits import HeldOut, evaluate
    from step3_hetero.runtime.resolving import checkpoint_folder

    held = HeldOut.read(checkpoint_folder(Config.read(config, overrides)))
    with seen_engine(config, overrides, seeing, ablate=ablate, **roles) as engine:
        with progress("answering, tokens") as advance:
            scores = evaluate(engine, held, limit=limit, on_progress=advance)
        placement, timings = engine.placement.to_json(), timings_json(engine)
    if as_json:
        listed = [s.to_json() for s in scores]
        seen = {"placement": placement, "timings": timings}
        print_json({"scores": listed, "ablate": ablate, **seen})
        return
    rows = [(s.name, f"{s.accuracy:.1%}", f"{s.right} of {s.asked}") for s in scores]
    title = "held-out accuracy" + (f", {ablate} zeroed" if ablate else "")
    print_table(title, ("question", "accuracy", "right"), rows)
