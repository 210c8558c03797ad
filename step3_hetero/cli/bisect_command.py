"""``step3-hetero bisect``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import click

from step3_hetero.cli.generate_command import _question
from step3_hetero.cli.options import (
    config_argument,
    json_option,
    print_json,
    print_table,
    progress,
    set_option,
)
from step3_hetero.errors import PlacementError, RequestError

if TYPE_CHECKING:
    from step3_hetero.backend import Device
    from step3_hetero.conformance.bisect_report import BisectReport
    from step3_hetero.conformance.bisect_run import Subject

EPILOG = """\b
Examples:
  step3-hetero bisect examples/digits.yaml --suspect a --prompt "which digit is this ?" \\
      --image examples/digits/7_held-out_0007.png
  step3-hetero bisect run.yaml --suspect f --prompt-ids 1,2,3 --max-tokens 400 --ignore-eos
  step3-hetero bisect run.yaml --suspect f --prompt-ids 1,2,3 --json --plot growth.html
  step3-hetero bisect run.yaml --replay shadow-excess/ffn-12-run-40.safetensors
\b
Exit code: 0 nothing beyond rounding, 1 a divergence, 2 bad input.
"""

FLIPS_SHOWN = 8


@click.command("bisect", epilog=EPILOG)
@config_argument
@click.option("--suspect", metavar="ROLE", help="The role whose stages are held to account.")
@click.option("--trusted", metavar="BACKEND", default="reference", show_default=True,
              help="What the suspect is held against.")  # fmt: skip
@click.option("--prompt", help="A question; the model's chat template is put around it.")
@click.option("--prompt-ids", metavar="1,2,3", help="Token ids instead of text.")
@click.option(
    "--image",
    "images",
    multiple=True,
    type=click.Path(dir_okay=False),
    help="An image file. May be repeated.",
)
@click.option("--max-tokens", default=64, show_default=True, type=click.IntRange(1),
              help="Tokens to generate at most.")  # fmt: skip
@click.option("--ignore-eos", is_flag=True, help="Go on at the model's own end.")
@click.option("--replay", type=click.Path(dir_okay=False), metavar="FILE",
              help="Run what the shadow check kept again, instead of a request.")  # fmt: skip
@click.option("--plot", type=click.Path(dir_okay=False), metavar="FILE",
              help="Draw the error's growth to FILE.png or FILE.html.")  # fmt: skip
@set_option
@json_option
@click.pass_context
def command(
    ctx: click.Context,
    config: str,
    suspect: str | None,
    trusted: str,
    prompt: str | None,
    prompt_ids: str | None,
    images: tuple[str, ...],
    max_tokens: int,
    ignore_eos: bool,
    replay: str | None,
    plot: str | None,
    overrides: tuple[str, ...],
    as_json: bool,
) -> None:
    """Name the first layer, stage and op that errs by more than rounding explains."""
    from step3_hetero.conformance.bisect import bisect, check_role
    from step3_hetero.conformance.bisect_plot import check_plot, write_plot

    if replay is not None:
        given = {"--suspect": suspect, "--prompt": prompt, "--prompt-ids": prompt_ids,
                 "--image": images, "--plot": plot}  # fmt: skip
        if taken := [name for name, value in given.items() if value]:
            raise RequestError(f"--replay takes no {', '.join(taken)}: the file has the inputs")
        ctx.exit(_replay(config, overrides, Path(replay), as_json))
    if suspect is None:
        raise RequestError("give --suspect with the name of a role, or --replay with a file")
    question = _question(prompt, prompt_ids)
    if plot is not None:
        check_plot(Path(plot))
    subject = open_subject(config, overrides)
    check_role(subject, suspect)
    peer = _open_trusted(trusted)
    with progress("loading stages, then bisecting, steps") as advance:
        report = bisect(
            subject, suspect, question, images=[Path(i) for i in images], max_tokens=max_tokens,
            ignore_eos=ignore_eos, trusted=peer, on_load=advance, on_progress=advance,
        )  # fmt: skip
    if plot is not None:
        write_plot(report, Path(plot))
    _print(report, as_json)
    ctx.exit(int(report.divergence is not None))


def open_subject(config: str, overrides: Sequence[str]) -> Subject:
    """Load what a bisect takes: graph, devices and weights' source of a config file.

    Raises:
        ConfigError, BackendNotFound, UnsupportedOp, PlacementError, CheckpointError: as ``load``.
    """
    from step3_hetero.api import open_prompter
    from step3_hetero.config import Config
    from step3_hetero.conformance.bisect_run import Subject
    from step3_hetero.model.checkpoint import Checkpoint
    from step3_hetero.runtime import resolving

    read = Config.read(Path(config), list(overrides))
    if read.runtime.processes != "one":
        click.echo(
            f"bisect runs the stages of every role in this process, on the same backends; "
            f"runtime.processes: {read.runtime.processes} is not examined",
            err=True,
        )
    folder = resolving.checkpoint_folder(read)
    checkpoint = Checkpoint.open(folder, resolving.model_config(read))
    resolved = resolving.resolve(read, checkpoint.config)
    devices = resolving.stage_devices(resolved, resolving.open_devices(resolved))
    return Subject(
        resolved.model,
        resolved.placement,
        devices,
        checkpoint,
        open_prompter(resolved.model, folder),
        read.runtime.max_batch,
        read.runtime.prefill_chunk,
    )


def _open_trusted(name: str) -> Device | None:
    """Open the backend to hold against; None for the reference, which judges anyway."""
    from step3_hetero.registry import get_backend

    if name == "reference":
        return None
    backend = get_backend(name)
    if reason := backend.why_unavailable():
        raise PlacementError(f"--trusted: {name!r} has no device here: {reason}")
    return backend.open(0)


def _replay(config: str, overrides: Sequence[str], path: Path, as_json: bool) -> int:
    """Run a kept run again; return the exit code."""
    from step3_hetero.conformance.bisect_replay import read_replay
    from step3_hetero.conformance.bisect_rerun import rerun

    replay = read_replay(path)
    report = rerun(open_subject(config, overrides), replay)
    if as_json:
        print_json({"verdict": report.sentence(), **asdict(report)})
    else:
        click.echo(report.sentence())
    return int(bool(report.again))


def _print(report: BisectReport, as_json: bool) -> None:
    from step3_hetero.conformance.bisect_report import HEADER

    if as_json:
        print_json(report.to_json())
        return
    click.echo(report.sentence())
    for flip in report.flips[:FLIPS_SHOWN]:
        click.echo(flip.sentence())
    if len(report.flips) > FLIPS_SHOWN:
        click.echo(f"and {len(report.flips) - FLIPS_SHOWN} more flips within rounding; see --json")
    title = "error of each stage on trusted inputs, and of the chain running freely"
    print_table(title, HEADER, report.table())
    if report.divergence is not None:
        rows = [(f.label, f"{f.worst:.2g}", f.said or "within bounds")
                for f in report.divergence.ops]  # fmt: skip
        print_table(f"ops of {report.divergence.stage}", ("op", "part of bound", "verdict"), rows)
