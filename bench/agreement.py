"""Log-probabilities of the engine beside vLLM's, on the same float32 checkpoints."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

import click
import numpy as np
import numpy.typing as npt
from rich import box
from rich.console import Console
from rich.table import Table

from bench import sides
from bench.checkpoint import CACHE, Sizes, checkpoint
from bench.command import BenchCommand
from step3_hetero.api import load
from step3_hetero.runtime.engine import Engine
from step3_hetero.runtime.request import SamplingParams

LARGEST = 5e-5
"""Of a log-probability: some eight times the largest difference seen, 6e-6 (docs/benchmarks.md)."""

LENGTHS = (1, 2, 17, 64, 127, 130)
"""Tokens of the prompts: around one KV block of 128 as well."""

DECODE = 12

EPILOG = """\b
Examples:
  python -m bench.agreement
  python -m bench.agreement --backend reference --vllm-python .venv-vllm/bin/python
"""

Float64 = npt.NDArray[np.float64]


@click.command(
    cls=BenchCommand, epilog=EPILOG, context_settings={"help_option_names": ["-h", "--help"]}
)
@click.option(
    "--backend", "backends", multiple=True, default=("cpu", "reference"), show_default=True
)
@click.option(
    "--vllm-python",
    type=click.Path(path_type=Path),
    default=sides.VLLM_PYTHON,
    show_default=True,
    help="Python of the environment that bench/setup_vllm.sh made.",
)
@click.option("--cache", type=click.Path(path_type=Path), default=CACHE, show_default=True)
def main(backends: tuple[str, ...], vllm_python: Path, cache: Path) -> None:
    """Compare the whole vocabulary's log-probabilities after every token; exit 1 over 5e-5.

    Prefill: every token of prompt and answer at once. Decode: the answer's tokens one by one.
    """
    sides.end_politely()
    sides.find_vllm(vllm_python)
    table = Table(title="largest difference", title_justify="left", box=box.SIMPLE_HEAD)
    for name in ("backend", "router weights", "prefill", "decode", "rms"):
        table.add_column(name)
    worst = 0.0
    for renormalised in (False, True):
        folder = checkpoint(small(renormalised), cache)
        prompts = draw_prompts()
        answers, wanted = ask_vllm(vllm_python, folder, prompts)
        for backend in backends:
            with open_engine(folder, backend) as engine:
                prefill, decode, rms = differences(engine, prompts, answers, wanted)
            router = "sum to 1" if renormalised else "as they are"
            table.add_row(backend, router, f"{prefill:.1e}", f"{decode:.1e}", f"{rms:.1e}")
            worst = max(worst, prefill, decode)
    Console().print(table)
    within = bool(worst <= LARGEST)  # not-a-number is not within
    click.echo(f"largest {worst:.1e}, allowed {LARGEST:.0e}: {'agrees' if within else 'DIFFERS'}")
    sys.exit(not within)


def small(renormalised: bool) -> Sizes:
    """Return sizes that vLLM takes and a reference in NumPy runs in seconds."""
    return Sizes(
        hidden_size=256,
        num_hidden_layers=4,
        intermediate_size=512,
        num_attention_heads=8,
        head_dim=64,
        share_q_dim=128,
        moe_num_experts=8,
        moe_top_k=2,
        moe_intermediate_size=128,
        share_expert_dim=128,
        norm_expert_weight=renormalised,
        vocab_size=512,
        dtype="float32",
    )


def draw_prompts() -> list[list[int]]:
    """Return one random prompt of each length."""
    rng = np.random.default_rng(7)
    return [rng.integers(1, 511, length).tolist() for length in LENGTHS]


def ask_vllm(
    python: Path, folder: Path, prompts: Sequence[Sequence[int]]
) -> tuple[list[list[int]], list[Float64]]:
    """Return vLLM's greedy answers and, for each, its log-probabilities after every token."""
    with TemporaryDirectory() as scratch, sides.vllm(python, folder, "float32") as vllm:
        out = f"{scratch}/logprobs"
        answers = vllm.ask("logprobs", prompts=prompts, tokens=DECODE, out=out)["result"]
        return answers, [np.load(f"{out}-{n}.npy") for n in range(len(prompts))]


def open_engine(folder: Path, backend: str) -> Engine:
    """Load every stage on one backend."""
    roles = {"all": {"stages": ["embed", "attention", "ffn", "head"], "backend": backend}}
    runtime = {"kv_blocks": 8, "prefill_chunk": 48}  # prompts run in several parts
    return load({"version": 1, "model": str(folder), "roles": roles, "runtime": runtime})


def differences(
    engine: Engine,
    prompts: Sequence[list[int]],
    answers: Sequence[list[int]],
    wanted: Sequence[Float64],
) -> tuple[float, float, float]:
    """Return the largest difference of prefill and of decode, and the root mean square."""
    prefill, decode = [], []
    for prompt, answer, want in zip(prompts, answers, wanted, strict=True):
        got = log_softmax(engine.logits([*prompt, *answer[:-1]]))
        prefill.append(np.abs(got - want).ravel())
        decode.append(np.abs(decoded(engine, prompt, answer) - want[len(prompt) - 1 :]).ravel())
    whole = np.concatenate([*prefill, *decode])
    rms = float(np.sqrt(np.mean(whole**2)))
    return float(np.concatenate(prefill).max()), float(np.concatenate(decode).max()), rms


def decoded(engine: Engine, prompt: list[int], answer: Sequence[int]) -> Float64:
    """Return the log-probabilities with which the engine chooses each token of its answer.

    Raises:
        click.ClickException: it chooses another token than vLLM.
    """
    vocab = engine.model.text.vocab_size
    params = SamplingParams(max_tokens=len(answer), ignore_eos=True, logprobs=vocab)
    done = engine.generate(prompt, params)
    if list(done.token_ids) != list(answer):
        raise click.ClickException(
            f"after {len(prompt)} tokens the engine goes on with {list(done.token_ids)}, vLLM with "
            f"{list(answer)}"
        )
    table = np.empty((len(answer), vocab))
    for row, found in zip(table, done.logprobs or (), strict=True):
        for token, value in found.top:
            row[token] = value
    return table


def log_softmax(logits: npt.NDArray[np.float32]) -> Float64:
    """Return log-probabilities, summed in float64.

    Shapes: logits (tokens, vocab) -> the same.
    """
    wide = logits.astype(np.float64)
    wide -= wide.max(-1, keepdims=True)
    result: Float64 = wide - np.log(np.exp(wide).sum(-1, keepdims=True))
    return result


if __name__ == "__main__":
    main()
