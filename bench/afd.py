"""``python -m bench.afd``: decode speed with attention and FFN in processes of their own.

The same engine, the same random model, the same two cores: colocated (one process, both cores) and
apart (attention on one core, FFN on the other) with one to three micro-batches under way, in turns.
Beside each way apart stand the ideal, which the max-plus recurrence gives for the stage and edge
times of that very run, and what the attention instance lost: by the clock on the wall less its
work, and by the gaps in its row of the trace. ``--predict`` also measures profiles and says what
the planner would have expected of each way before anything ran.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import click
import numpy as np
from rich import box
from rich.console import Console
from rich.table import Table

from bench.afd_ideal import Stretch, equal_context, ideal_tokens_per_s
from bench.checkpoint import Sizes, checkpoint
from bench.command import BenchCommand
from bench.machine import describe, sentence
from step3_hetero import SamplingParams, load
from step3_hetero.runtime.engine import Engine
from step3_hetero.runtime.timeline import Timeline
from step3_hetero.specs import LOGICAL_BLOCK

MICROBATCHES = (1, 2, 3)
LEAST_CONTEXT, MOST_CONTEXT = 144, 1552
PAGE_COLUMNS = 110
"""A row stands on one line, in a file as on a terminal."""
MOST_FILLING_STEPS = 128
"""The first sequences decode this long at most while the last ones are still prefilled."""
OWN_TAIL = 16
"""Tokens of a prompt beyond the whole blocks that all prompts share; these are computed once."""


@dataclass(frozen=True)
class Way:
    """One way of running the model; ``microbatches`` 0 is one process for all."""

    microbatches: int

    @property
    def name(self) -> str:
        """Return what the table calls it."""
        return f"apart, m = {self.microbatches}" if self.microbatches else "colocated"

    def config(self, folder: Path, batch: int, context: int, transport: str) -> dict[str, Any]:
        """Return the config; a micro-batch takes its share of the batch."""
        return {
            "version": 1,
            "model": str(folder),
            "roles": {
                "a": {"stages": ["embed", "attention", "head", "ffn[0]"], "backend": "cpu"},
                "f": {"stages": ["ffn"], "backend": "cpu"},
            },
            "runtime": {
                "processes": "per-role" if self.microbatches else "one",
                "microbatches": max(1, self.microbatches),
                "max_batch": -(-batch // max(1, self.microbatches)),
                "prefill_chunk": 2048,
                "kv_blocks": batch * -(-(context + 256) // LOGICAL_BLOCK) + 8,
            },
            "transport": {"kind": transport, "deadline_s": 20.0},
        }


WAYS = tuple(Way(m) for m in (0, *MICROBATCHES))


@dataclass
class Opened:
    """A way whose engine is loaded."""

    way: Way
    engine: Engine
    timeline: Timeline

    def decode(self, prompts: Sequence[list[int]], tokens: int) -> Stretch:
        """Decode all prompts side by side; return what ``tokens`` steps of all of them took.

        Time counts from the first step in which every sequence decodes. None may end before the
        last step: it would leave a smaller batch behind. So they are asked for more, and cancelled.
        """
        engine, told = self.engine, [0] * len(prompts)

        def count(number: int) -> Any:
            def add(_: object) -> None:
                told[number] += 1

            return add

        params = SamplingParams(max_tokens=tokens + MOST_FILLING_STEPS, ignore_eos=True)
        engine.run([engine.submit(prompts[0], SamplingParams(max_tokens=1, ignore_eos=True))])
        asked = [
            engine.submit(prompt, params, on_token=count(number))
            for number, prompt in enumerate(prompts)
        ]
        while min(told) == 0:
            engine.step()
        before, done, last = Stretch.begin(engine.executor), sum(told), min(told) + tokens
        while min(told) < last:
            engine.step()
        stretch = before.end(engine.executor, sum(told) - done, self.timeline)
        assert max(told) < params.max_tokens, "a sequence ended before the last step"
        for number in asked:
            engine.cancel(number)
        engine.step()
        return stretch


def prompts_of(batch: int, context: int) -> list[list[int]]:
    """Return prompts that end each in its own way; their whole blocks are the same."""
    draw = np.random.default_rng(0)
    shared = draw.integers(10, 8000, context - 1 - (context - 1) % LOGICAL_BLOCK).tolist()
    return [shared + draw.integers(10, 8000, context - len(shared)).tolist() for _ in range(batch)]


def found_context(folder: Path, batch: int, transport: str) -> int:
    """Return the context at which attention and FFN take equal time, one micro-batch under way.

    To whole blocks and a tail, as `prompts_of` shares them.
    """
    way, points = Way(1), []
    for context in (LEAST_CONTEXT, 4 * LOGICAL_BLOCK + OWN_TAIL):
        config, timeline = way.config(folder, batch, context, transport), Timeline()
        with load(config, timeline=timeline) as engine:
            points.append(
                (context, Opened(way, engine, timeline).decode(prompts_of(batch, context), 6))
            )
    blocks = round((equal_context(points) - OWN_TAIL) / LOGICAL_BLOCK)
    return int(np.clip(blocks * LOGICAL_BLOCK + OWN_TAIL, LEAST_CONTEXT, MOST_CONTEXT))


def measure(
    folder: Path, batch: int, context: int, tokens: int, pairs: int, transport: str
) -> list[dict[str, Any]]:
    """Run every way in turns and return a row of figures for each."""
    prompts = prompts_of(batch, context)
    runs: dict[Way, list[Stretch]] = {way: [] for way in WAYS}
    with ExitStack() as stack:
        opened = []
        for way in WAYS:
            config, timeline = way.config(folder, batch, context, transport), Timeline()
            engine = stack.enter_context(load(config, timeline=timeline))
            opened.append(Opened(way, engine, timeline))
        for _ in range(pairs):
            for one in opened:
                runs[one.way].append(one.decode(prompts, tokens))
    together = [run.tokens_per_s for run in runs[WAYS[0]]]
    transit_s = median(run.transit_s for run in runs[Way(1)])
    return [_row(way, found, together, transit_s, batch) for way, found in runs.items()]


def _row(
    way: Way, found: Sequence[Stretch], together: Sequence[float], transit_s: float, batch: int
) -> dict[str, Any]:
    ratios = [run.tokens_per_s / other for run, other in zip(found, together, strict=True)]
    row: dict[str, Any] = {
        "way": way.name,
        "tokens_per_s": median(run.tokens_per_s for run in found),
        "to_colocated": median(ratios),
    }
    if way.microbatches:
        share = -(-batch // way.microbatches)
        ideals = [ideal_tokens_per_s(r, way.microbatches, share, transit_s) for r in found]
        reached = [r.tokens_per_s / ideal for r, ideal in zip(found, ideals, strict=True)]
        row |= {
            "ideal": median(ideals),
            "of_ideal": median(reached),
            "attention_s": median(run.attention_s for run in found),
            "ffn_s": median(run.ffn_s for run in found),
            "lost_s": median(run.lost_s for run in found),
            "bubbles_s": median(run.bubbles_s for run in found),
        }
    return row


def show(title: str, rows: Sequence[dict[str, Any]]) -> None:
    """Print a table; a row without a figure has a gap there."""
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD)
    names = list(dict.fromkeys(name for row in rows for name in row))
    for name in names:
        table.add_column(name.replace("_", " "), justify="right")
    for row in rows:
        cells = [row.get(name, "") for name in names]
        table.add_row(
            *[f"{c:.3g}" if isinstance(c, float) and c < 100 else _whole(c) for c in cells]
        )
    Console(width=PAGE_COLUMNS).print(table)


def _whole(cell: object) -> str:
    return f"{cell:,.0f}" if isinstance(cell, float) else str(cell)


EPILOG = """\b
Examples:
  python -m bench.afd
  python -m bench.afd --batch 32 --context 512        # small batches re-read the experts' weights
  python -m bench.afd --predict --json > afd.json
"""


@click.command(
    cls=BenchCommand, epilog=EPILOG, context_settings={"help_option_names": ["-h", "--help"]}
)
@click.option("--batch", type=click.IntRange(1), default=192, show_default=True,
              help="Sequences that decode at a time.")  # fmt: skip
@click.option("--context", type=click.IntRange(2), help="Tokens of a prompt; found when left out.")
@click.option("--tokens", type=click.IntRange(1), default=24, show_default=True,
              help="Decode steps that are timed.")  # fmt: skip
@click.option("--pairs", type=click.IntRange(1), default=3, show_default=True,
              help="Turns of every way.")  # fmt: skip
@click.option("--transport", default="shm", show_default=True, help="transport.kind: shm or tcp.")
@click.option("--predict", is_flag=True, help="Measure profiles, too, and predict each way.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of a table.")
def main(
    batch: int, context: int | None, tokens: int, pairs: int, transport: str, predict: bool,
    as_json: bool,
) -> None:  # fmt: skip
    """Measure every way in turns: tokens a second, beside colocated and beside the ideal."""
    started = time.monotonic()
    machine, folder = describe(), checkpoint(Sizes())
    context = context or found_context(folder, batch, transport)
    report: dict[str, Any] = {"machine": machine, "batch": batch, "context": context}
    report["ways"] = measure(folder, batch, context, tokens, pairs, transport)
    if predict:
        from bench.afd_predict import predictions

        configs = {way.name: way.config(folder, batch, context, transport) for way in WAYS}
        report["predicted"] = predictions(configs, batch, context, tokens)
    report["took_s"] = round(time.monotonic() - started, 1)
    if as_json:
        click.echo(json.dumps(report, indent=1))
        return
    show(f"decode, batch {batch}, context {context}, {transport}", report["ways"])
    if predict:
        show("predicted from profiles", report["predicted"])
    click.echo(sentence(machine))


if __name__ == "__main__":
    main()
