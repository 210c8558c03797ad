"""``step3-hetero simulate``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import click

from step3_hetero.cli.options import Number, json_option, print_json, print_table, progress

if TYPE_CHECKING:
    from step3_hetero.placement.simulate_result import Result, RoleUse

EPILOG = """\b
Examples:
  step3-hetero simulate plan.yaml
  step3-hetero simulate plan.yaml --jitter 0.1 --context-cv 0.5 --tokens 500 --json
  step3-hetero simulate plan.yaml --fail ffn@2.5 --trace trace.json --html gantt.html
"""
TITLES = {"attention": "attention", "a2f": "A2F", "ffn": "FFN", "f2a": "F2A"}
LONGEST_CV = 10.0


@click.command("simulate", epilog=EPILOG)
@click.argument("plan", type=click.Path(dir_okay=False))
@click.option(
    "--tokens",
    type=click.IntRange(min=2),
    default=100,
    show_default=True,
    help="Tokens of every sequence.",
)
@click.option(
    "--jitter",
    type=Number(0, LONGEST_CV),
    default=0.0,
    metavar="CV",
    help="Standard deviation over mean of every service time (lognormal).",
)
@click.option(
    "--context-cv",
    type=Number(0, LONGEST_CV),
    default=0.0,
    metavar="CV",
    help="The same of the sequences' contexts; the mean is the plan's.",
)
@click.option(
    "--contexts",
    type=click.Path(dir_okay=False),
    metavar="FILE",
    help="Draw contexts from this file, one whole number a line.",
)
@click.option(
    "--seed", type=click.IntRange(min=0), default=0, show_default=True, help="Of all that is drawn."
)
@click.option("--fail", metavar="ROLE@T", help="Lose an instance of a role after T seconds.")
@click.option("--trace", type=click.Path(dir_okay=False), help="Write a Perfetto trace (JSON).")
@click.option("--html", type=click.Path(dir_okay=False), help="Write a Gantt chart (HTML).")
@json_option
def command(
    plan: str, tokens: int, jitter: float, context_cv: float, contexts: str | None, seed: int,
    fail: str | None, trace: str | None, html: str | None, as_json: bool,
) -> None:  # fmt: skip
    """Run a plan's pipeline token by token: TPOT percentiles, tokens/s, use and bubbles per role.

    PLAN is a config with the planner's prediction under `predicted.pipeline`.
    """
    from step3_hetero.placement.simulate import Scenario, simulate
    from step3_hetero.placement.simulate_contexts import Contexts
    from step3_hetero.placement.simulate_plan import PlanFile, read_contexts
    from step3_hetero.placement.trace import SliceRecorder
    from step3_hetero.placement.written import check_writable

    check_writable("--trace", trace)
    check_writable("--html", html)
    read = PlanFile.read(Path(plan))
    sample = read_contexts(Path(contexts)) if contexts else ()
    loss = read.loss(fail) if fail else None
    lengths = Contexts(read.pipeline.context, context_cv, sample)
    scenario = Scenario(tokens, jitter, seed, lengths, loss)
    recorder = SliceRecorder(read.pipeline, tokens) if trace or html else None
    with progress("simulating tokens") as advance:
        result = simulate(read.pipeline, scenario, recorder=recorder, on_token=advance)
    if recorder:
        _write(recorder, result, trace, html)
    if as_json:
        print_json(result.to_json())
    else:
        _print(result)


def _write(recorder: object, result: Result, trace: str | None, html: str | None) -> None:
    from step3_hetero.placement.gantt import gantt_page
    from step3_hetero.placement.trace import SliceRecorder, chrome_trace
    from step3_hetero.placement.written import write_whole

    assert isinstance(recorder, SliceRecorder)
    if trace:
        write_whole(Path(trace), json.dumps(chrome_trace(recorder)))
        click.echo(f"wrote {trace}: {recorder.said}", err=True)
    if html:
        write_whole(Path(html), gantt_page(recorder, result))
        click.echo(f"wrote {html}", err=True)


def _print(result: Result) -> None:
    """Print the tables: latency, then use by role; then what a loss did."""
    tpot = [f"{seconds * 1e3:.2f}" for seconds in result.tpot_s.values()]
    print_table("TPOT in ms", tuple(result.tpot_s), [tpot])
    rows = [_use_row(use) for use in result.roles]
    header = ("role", "group", "units", "busy", "least", "most", "bubble per token")
    print_table("use after the first token", header, rows)
    click.echo(
        f"{result.tokens} tokens of {result.instances} attention instances, "
        f"{result.layers} layers, seed {result.seed}"
    )
    click.echo(f"{result.tokens_per_s:,.0f} tokens/s, {result.tokens_per_s_per_card:,.0f} per card")
    if result.loss is not None:
        click.echo(loss_sentence(result))


def _use_row(use: RoleUse) -> tuple[str, ...]:
    shares = (f"{share:.1%}" for share in (use.utilisation, use.least, use.most))
    return (TITLES[use.what], use.name, str(use.units), *shares, f"{use.bubble_s * 1e3:.2f} ms")


def loss_sentence(result: Result) -> str:
    """Return what a loss did to the run."""
    loss = result.loss or {}
    lost = f"{TITLES[loss['role']]} instance 0 lost at {loss['at_s']:g} s"
    if not loss["happened"]:
        return f"{lost}: after the run's end at {result.elapsed_s:.2f} s; ask for more --tokens"
    stalled = f"{loss['stalled_instances']} of {result.instances} attention instances stalled"
    if loss["resumed"]:
        pause_s = loss["longest_pause_s"] or 0.0
        return (
            f"{lost}: {stalled}; longest pause {pause_s:.2f} s, deadline {loss['deadline_s']:g} s"
        )
    if loss["nothing_left"]:
        return f"{lost}: {stalled}; nothing is left to take over, the run ends there"
    return f"{lost}: {stalled} and did not resume before the run's end; ask for more --tokens"
