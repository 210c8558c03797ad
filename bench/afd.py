"""``python -m bench.afd``: decode speed with attention and FFN in processes of their own.

The same engine, the same random model, the same two cores: colocated (one process, both cores) and
disaggregated (attention on one core, FFN on the other) with one to three micro-batches under way.
Beside each stands how long attention waited for answers: the bubbles.
"""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import click
import numpy as np

from bench.checkpoint import Sizes, checkpoint
from bench.machine import describe, sentence
from step3_hetero import SamplingParams, load
from step3_hetero.runtime.engine import Engine


@dataclass(frozen=True)
class Way:
    """One way of running the model."""

    name: str
    microbatches: int
    apart: bool

    def open(self, folder: Path, batch: int, transport: str) -> Engine:
        """Load the model; a micro-batch takes its share of the batch."""
        share = -(-batch // self.microbatches)
        values = {
            "version": 1,
            "model": str(folder),
            "roles": {
                "a": {"stages": ["embed", "attention", "head", "ffn[0]"], "backend": "cpu"},
                "f": {"stages": ["ffn"], "backend": "cpu"},
            },
            "runtime": {
                "processes": "per-role" if self.apart else "one",
                "microbatches": self.microbatches,
                "max_batch": share,
                "prefill_chunk": 4096,
                "kv_blocks": 4 * batch + 8,
            },
            "transport": {"kind": transport, "deadline_s": 10.0},
        }
        return load(values)


WAYS = (Way("colocated", 1, False), *(Way(f"apart, m = {m}", m, True) for m in (1, 2, 3)))


def decode_s(engine: Engine, prompts: list[list[int]], tokens: int) -> float:
    """Return the seconds that ``tokens`` decode steps of the whole batch take."""

    def run(count: int) -> float:
        params = SamplingParams(max_tokens=count, ignore_eos=True)
        start = time.perf_counter()
        engine.run([engine.submit(prompt, params) for prompt in prompts])
        return time.perf_counter() - start

    return run(tokens + 1) - run(1)


def stage_seconds(engine: Engine) -> dict[str, float]:
    """Return the seconds of each stage kind so far."""
    return {
        f"{e['role']} {e['stage']}": round(e["seconds"], 3) for e in engine.executor.clock.to_json()
    }


@click.command()
@click.option("--batch", default=192, show_default=True)
@click.option("--context", default=64, show_default=True, help="Tokens of each prompt.")
@click.option("--tokens", default=16, show_default=True, help="Decode steps that are timed.")
@click.option("--pairs", default=3, show_default=True, help="Turns of every way.")
@click.option("--transport", default="shm", show_default=True)
@click.option("--json", "as_json", is_flag=True)
def main(batch: int, context: int, tokens: int, pairs: int, transport: str, as_json: bool) -> None:
    """Measure every way in turns and print tokens a second and the ratio to colocated."""
    machine = describe()
    folder = checkpoint(Sizes())
    rng = np.random.default_rng(0)
    prompts = rng.integers(10, 8000, (batch, context)).tolist()
    speeds: dict[str, list[float]] = {way.name: [] for way in WAYS}
    stages: dict[str, Any] = {}
    for _ in range(pairs):
        for way in WAYS:
            with way.open(folder, batch, transport) as engine:
                seconds = decode_s(engine, prompts, tokens)
                stages[way.name] = stage_seconds(engine)
            speeds[way.name].append(batch * tokens / seconds)
    together = median(speeds["colocated"])
    rows = [
        {"way": name, "tokens_per_s": median(found), "ratio": median(found) / together,
         "stages": stages[name]}
        for name, found in speeds.items()
    ]  # fmt: skip
    if as_json:
        click.echo(json.dumps({"machine": machine, "batch": batch, "rows": rows}, indent=1))
        return
    click.echo(sentence(machine))
    for row in rows:
        click.echo(f"{row['way']:<14} {row['tokens_per_s']:7.1f} tokens/s, {row['ratio']:.2f}")


if __name__ == "__main__":
    main()
