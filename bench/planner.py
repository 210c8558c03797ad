"""How the planner's time grows with the pools; its predictions beside `generate`, on request."""

from __future__ import annotations

import json
import shlex
import subprocess
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

import click
import numpy as np
from rich import box
from rich.console import Console
from rich.table import Table

from bench import machine
from bench.command import BenchCommand
from step3_hetero.placement.written import check_writable

KINDS = ("h800", "h20", "a800", "ascend-910b")
SIZES = (16, 64, 1_000, 10_000, 100_000, 1_000_000)
PAIRS = 5
BATCH, PROMPT, DECODE = 8, 32, 64
PLACEMENTS: dict[str, dict[str, Any]] = {
    "all on cpu": {"roles__f__backend": "cpu"},
    "all on reference": {"roles__a__backend": "reference"},
    "attention on cpu, FFN on reference": {},
}
WITHIN = 0.20
RACKS = 200

EPILOG = """\b
Examples:
  python -m bench.planner
  bench/setup_aiconfigurator.sh .venv-aiconfigurator
  python -m bench.planner --runs 1 --beside ".venv-aiconfigurator/bin/aiconfigurator cli default
      --model-path Qwen/Qwen3-30B-A3B --total-gpus 16 --system h200_sxm --serving-mode afd
      --isl 4000 --osl 500 --tpot 50 --ttft 5000"
  OMP_NUM_THREADS=1 python -m bench.planner --generate     # on a quiet machine
"""


@click.command(
    cls=BenchCommand, epilog=EPILOG, context_settings={"help_option_names": ["-h", "--help"]}
)
@click.option("--runs", type=click.IntRange(1), default=3, show_default=True)
@click.option("--beside", help="Command line of another planner, timed in the same run.")
@click.option("--generate", is_flag=True, help="Predict `generate` from profiles and measure it.")
@click.option("--config", default="examples/digits.yaml", show_default=True)
@click.option("--json", "file", type=click.Path(path_type=Path), help="Write the figures there.")
def main(runs: int, beside: str | None, generate: bool, config: str, file: Path | None) -> None:
    """Plan Step-3 on growing pools of one to four kinds of card, each with its certificate.

    With --generate: profile and run three placements in turn, five of each, and compare.
    """
    check_writable("--json", file)
    report: dict[str, Any] = {"machine": machine.describe()}
    if generate:
        report["generate"] = [predicted_and_measured(config, name) for name in PLACEMENTS]
        show("generate, tokens a second", report["generate"])
    else:
        report["growth"] = [row for size in SIZES for row in growth(size, runs)]
        show("plan, seconds (median)", report["growth"])
        report["racks"] = [unlike_racks(runs)]
        show("unlike racks, seconds (median)", report["racks"])
    if beside is not None:
        report["beside"] = timed(shlex.split(beside), runs)
        show("beside", [report["beside"]])
    Console().print(machine.sentence(report["machine"]), soft_wrap=True, highlight=False)
    if file is not None:
        file.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


def growth(size: int, runs: int) -> list[dict[str, Any]]:
    """Return the planner's seconds at one size, with one and with four kinds of card."""
    from step3_hetero.placement.asked import Asked
    from step3_hetero.placement.planner import plan

    rows = []
    for kinds in (KINDS[:1], KINDS):
        pools = [f"{kind}={size}" for kind in kinds]
        asked = Asked.of(model="step3", pools=pools, host_nic_gbit=400, host_nics_per_server=8)
        times, outcome = [], None
        for _ in range(runs):
            started = time.perf_counter()
            outcome = plan(asked.request)
            times.append(time.perf_counter() - started)
        assert outcome is not None, "there is at least one run"
        score = outcome.winner.score
        rows.append(
            {
                "kinds": len(kinds),
                "cards of each": size,
                "seconds": round(median(times), 2),
                "$/Mtok": round(score, 4),
                "gap": f"{max(0.0, 1 - outcome.bound / score):.1e}",
                "programs": outcome.split.programs,
            }
        )
    return rows


def unlike_racks(runs: int) -> dict[str, Any]:
    """Return the seconds to plan some 10,000 cards in racks of unlike contents and uplinks.

    Each rack has one to five servers of each of one to three kinds.
    """
    from step3_hetero.placement.asked import Asked
    from step3_hetero.placement.planner import plan
    from step3_hetero.placement.plans import SplitPlan
    from step3_hetero.placement.racks import place_on_racks

    times: dict[str, list[float]] = {"read": [], "plan": [], "place": []}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "hosts.yaml"
        path.write_text(json.dumps(drawn_racks()), encoding="utf-8")
        for _ in range(runs):
            started = time.perf_counter()
            asked = Asked.of(
                model="step3", pools=[], inventory=str(path),
                host_nic_gbit=400, host_nics_per_server=8,
            )  # fmt: skip
            read = time.perf_counter()
            outcome = plan(asked.request)
            planned = time.perf_counter()
            placed = place_on_racks(outcome, asked.servers).outcome
            times["read"].append(read - started)
            times["plan"].append(planned - read)
            times["place"].append(time.perf_counter() - planned)
    score = placed.winner.score
    return {
        "racks": RACKS,
        "cards": sum(pool.cards for pool in asked.request.problem.pools),
        **{part: round(median(each), 2) for part, each in times.items()},
        "whole": round(sum(median(each) for each in times.values()), 2),
        "gap": f"{max(0.0, 1 - placed.bound / score):.1e}",
        "split": isinstance(placed.plan, SplitPlan),
    }


def drawn_racks() -> dict[str, Any]:
    """Return the inventory of unlike racks, as its file says it."""
    draw = np.random.default_rng(0)
    racks, servers = [], []
    for rack in range(RACKS):
        name = f"r{rack}"
        racks.append({"name": name, "uplink_gbit_per_s": int(draw.integers(8, 65)) * 100})
        for kind in draw.permutation(KINDS)[: int(draw.integers(1, 4))]:
            count = int(draw.integers(1, 6))
            servers.append({"rack": name, "card": str(kind), "count": count})
    return {"version": 1, "racks": racks, "servers": servers}


def timed(command: Sequence[str], runs: int) -> dict[str, Any]:
    """Return the seconds of another program, its exit code and the last line it wrote.

    A search that finds nothing may say so by its exit code: it has searched all the same.
    """
    times, last, code = [], "", 0
    for _ in range(runs):
        started = time.perf_counter()
        done = subprocess.run(
            command, check=False, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        times.append(time.perf_counter() - started)
        last, code = (done.stdout.strip().splitlines() or [""])[-1], done.returncode
    return {
        "command": shlex.join(command),
        "seconds": round(median(times), 2),
        "exit code": code,
        "last line": last,
    }


def predicted_and_measured(config: str, name: str) -> dict[str, Any]:
    """Return predicted and measured decode speed of one placement; profile and runs take turns."""
    from step3_hetero import api
    from step3_hetero.placement.profile_predict import tokens_per_s
    from step3_hetero.runtime.resolving import read_config, resolve

    overrides = PLACEMENTS[name]
    predicted, measured = [], []
    with api.load(config, **overrides) as engine:
        for _ in range(PAIRS):
            resolved = resolve(read_config(config, overrides))
            profiles = profiles_of(resolved)
            predicted.append(tokens_per_s(resolved.placement, profiles, BATCH, PROMPT, DECODE))
            measured.append(decode_speed(engine))
    want, got = median(measured), median(predicted)
    return {
        "placement": name,
        "predicted": round(got, 1),
        "measured": round(want, 1),
        "error": f"{got / want - 1:+.1%}",
        "within": abs(got / want - 1) <= WITHIN,
    }


def profiles_of(resolved: Any) -> dict[str, Any]:
    """Measure a placement's stages in the order in which they run, each on its role's device."""
    from dataclasses import replace

    from step3_hetero.placement.profile_measure import Bench, Clock, measure
    from step3_hetero.placement.profile_predict import measure_engine
    from step3_hetero.placement.profile_stages import Seat, measure_stages, with_stages
    from step3_hetero.registry import get_backend

    dtype = resolved.graph.by_name["head"].spec.dtype
    around = measure_engine(resolved.model, resolved.placement, (BATCH,))
    seats: dict[str, Seat] = {}
    for role in resolved.placement.roles.values():
        if role.backend.name not in seats:
            device = get_backend(role.backend.name).open(role.index, role.options)
            seats[role.backend.name] = Seat(Bench(device, dtype, Clock()), role.weight_format)
    stages, placed = resolved.graph.stages, resolved.placement
    seat_of = {s.name: seats[placed.roles[placed.role_of[s.name]].backend.name] for s in stages}
    measured = measure_stages(stages, seat_of, PROMPT + DECODE, (BATCH,))
    found = {}
    for backend, seat in seats.items():
        mine = [s for s in stages if seat_of[s.name] is seat]
        device_alone = measure(seat.bench, backend, None)
        whole = with_stages(device_alone, seat, mine, measured[seat], (BATCH,))
        found[backend] = replace(whole, step_s=around)
    return found


def decode_speed(engine: Any) -> float:
    """Return decoded tokens a second: B·N / (time for N+1 tokens − time for 1)."""
    from step3_hetero import SamplingParams
    from step3_hetero.runtime.request import Request

    draw = np.random.default_rng(0)
    banned = engine.prompter.banned_id  # a prompt with the image token would need an image
    allowed = [n for n in range(engine.model.text.vocab_size) if n != banned]
    prompts = draw.choice(allowed, (BATCH, PROMPT)).tolist()
    times = []
    for tokens in (1, DECODE + 1):
        params = SamplingParams(max_tokens=tokens, ignore_eos=True)
        started = time.perf_counter()
        engine.generate_all([Request(prompt, params) for prompt in prompts])
        times.append(time.perf_counter() - started)
    return BATCH * DECODE / (times[1] - times[0])


def show(title: str, rows: Sequence[dict[str, Any]]) -> None:
    """Print a table."""
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD)
    for name in rows[0]:
        table.add_column(name, justify="right")
    for row in rows:
        table.add_row(*[str(value) for value in row.values()])
    Console().print(table)


if __name__ == "__main__":
    main()
