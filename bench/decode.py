"""Decode speed of the whole engine, beside vLLM's CPU build in the same run."""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from statistics import median
from typing import Any

import click
import numpy as np
from rich import box
from rich.console import Console
from rich.table import Table

from bench import machine, sides
from bench.checkpoint import CACHE, Sizes, checkpoint
from bench.command import BenchCommand
from step3_hetero.placement.written import check_writable

EPILOG = """\b
Examples:
  python -m bench.decode
  python -m bench.decode --batch 1 --pairs 3 --no-vllm
  python -m bench.decode --cores 1      # where others use the machine: no thread waits for another
  python -m bench.decode --vllm-python .venv-vllm/bin/python --json decode.json
"""


@click.command(
    cls=BenchCommand, epilog=EPILOG, context_settings={"help_option_names": ["-h", "--help"]}
)
@click.option(
    "--batch", "batches", type=click.IntRange(1, 64), multiple=True, default=(1, 8, 32),
    show_default=True, help="Sequences at once. May be repeated.",
)  # fmt: skip
@click.option("--prompt", type=click.IntRange(1, 512), default=64, show_default=True)
@click.option("--decode", type=click.IntRange(1, 511), default=64, show_default=True)
@click.option(
    "--pairs", type=click.IntRange(1), default=5, show_default=True, help="Measurements of a side."
)
@click.option("--cores", type=click.IntRange(1), help="Of each side; default: all.")
@click.option("--backend", default="cpu", show_default=True, help="The engine's backend.")
@click.option(
    "--vllm-python",
    type=click.Path(path_type=Path),
    default=sides.VLLM_PYTHON,
    show_default=True,
    help="Python of the environment that bench/setup_vllm.sh made.",
)
@click.option("--no-vllm", is_flag=True, help="Measure the engine alone.")
@click.option("--cache", type=click.Path(path_type=Path), default=CACHE, show_default=True)
@click.option("--json", "file", type=click.Path(path_type=Path), help="Write the figures there.")
def main(
    batches: tuple[int, ...],
    prompt: int,
    decode: int,
    pairs: int,
    cores: int | None,
    backend: str,
    vllm_python: Path,
    no_vllm: bool,
    cache: Path,
    file: Path | None,
) -> None:
    """Measure decode tokens a second, full engine, greedy, on a random bfloat16 checkpoint.

    B sequences of --decode tokens: B·N / (time for N+1 tokens − time for 1). The sides take turns,
    and the one that waits is stopped.
    """
    check_writable("--json", file)
    sides.end_politely()
    if not no_vllm:
        sides.find_vllm(vllm_python)
    sizes = Sizes()
    found = machine.describe()
    folder = checkpoint(sizes, cache)
    with ExitStack() as stack:
        running = [stack.enter_context(sides.engine(folder, backend, cores))]
        if not no_vllm:
            running.append(stack.enter_context(sides.vllm(vllm_python, folder, sizes.dtype, cores)))
        rows = [
            compare(running, batch, Prompts(sizes.vocab_size, prompt), decode, pairs)
            for batch in batches
        ]
        versions = {side.side: side.version for side in running}
    for row in rows:
        row |= ceiling(sizes, row["batch"], found["read_gb_s"])
    report = {
        "machine": found,
        "versions": versions,
        "sizes": sizes.config(),
        "prompt": prompt,
        "decode": decode,
        "cores": cores or found["cores"],
        "rows": rows,
    }
    show(report)
    if file is not None:
        file.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


class Prompts:
    """Random prompts, new ones for every call; both sides draw the same."""

    def __init__(self, vocab: int, length: int) -> None:
        self.vocab = vocab
        self.length = length

    def draw(self, batch: int, seed: int) -> list[list[int]]:
        """Return ``batch`` prompts."""
        rng = np.random.default_rng(seed)
        drawn: list[list[int]] = rng.integers(1, self.vocab - 1, (batch, self.length)).tolist()
        return drawn


def compare(
    running: Sequence[sides.Running], batch: int, prompts: Prompts, decode: int, pairs: int
) -> dict[str, Any]:
    """Measure each side ``pairs`` times in turn; who goes first alternates too."""
    for side in running:
        measure(side, batch, prompts, 4, seed=0)
    found: dict[str, list[tuple[float, float]]] = {side.side: [] for side in running}
    for pair in range(pairs):
        for side in running if pair % 2 == 0 else reversed(running):
            found[side.side].append(measure(side, batch, prompts, decode, seed=1 + pair))
    row: dict[str, Any] = {"batch": batch}
    for name, speeds in found.items():
        decoded, prefilled = ([round(v, 1) for v in part] for part in zip(*speeds, strict=True))
        row[name] = {"decode": median(decoded), "prefill": median(prefilled), "all": decoded}
    if "vllm" in row:
        each = zip(row["engine"]["all"], row["vllm"]["all"], strict=True)
        row["ratio"] = round(median(ours / theirs for ours, theirs in each), 2)
    return row


def measure(
    side: sides.Running, batch: int, prompts: Prompts, decode: int, *, seed: int
) -> tuple[float, float]:
    """Return tokens a second, decoded and prefilled (the first token's time, sampling and all)."""
    times = []
    for tokens in (1, decode + 1):
        asked = prompts.draw(batch, seed * 1000 + tokens)
        answer = side.ask("generate", prompts=asked, tokens=tokens)
        got = [len(ids) for ids in answer["result"]]
        if got != [tokens] * batch:
            raise click.ClickException(f"{side.side} gave {got} tokens, asked for {tokens} each")
        times.append(answer["seconds"])
    first, whole = times
    return batch * decode / (whole - first), batch * prompts.length / first


def ceiling(sizes: Sizes, batch: int, read_gb_s: float) -> dict[str, float]:
    """Return the bytes of weights a step reads as stored, and the speed that memory allows."""
    step = sizes.step_bytes(batch)
    return {"step_mb": round(step / 1e6), "ceiling": round(batch * read_gb_s * 1e9 / step)}


def show(report: dict[str, Any]) -> None:
    """Print the figures."""
    versions = report["versions"]
    table = Table(
        title="decode, tokens a second (median)", title_justify="left", box=box.SIMPLE_HEAD
    )
    columns = ["batch", versions["engine"]]
    columns += [versions["vllm"], "ratio"] if "vllm" in versions else []
    for name in [*columns, "memory allows", "weights read a step"]:
        table.add_column(name, justify="right")
    for row in report["rows"]:
        speeds = [f"{row[side]['decode']:.0f}" for side in versions]
        ratio = [f"{row['ratio']:.2f}"] if "vllm" in versions else []
        table.add_row(
            str(row["batch"]), *speeds, *ratio, f"{row['ceiling']:.0f}", f"{row['step_mb']:.0f} MB"
        )
    console = Console()
    console.print(table)
    console.print(f"{report['cores']} cores used", highlight=False)
    console.print(machine.sentence(report["machine"]), soft_wrap=True, highlight=False)


if __name__ == "__main__":
    main()
