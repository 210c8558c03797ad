"""What the planner expects of each way of `bench.afd`, from measured profiles and a measured link.

Every profile is measured in a process of its own that is kept on the cores which the role has: both
for the colocated way, one for each role apart. Nothing of the ways that are predicted runs.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import click
import yaml

from step3_hetero.placement.profile_apart import apart_pipeline, apart_tokens_per_s
from step3_hetero.placement.profile_file import Links, Profile
from step3_hetero.placement.profile_predict import tokens_per_s

LEAD, AWAY = "a", "f"


def predictions(
    configs: Mapping[str, Mapping[str, Any]], batch: int, context: int, tokens: int
) -> list[dict[str, Any]]:
    """Return a row for each way: tokens a second and the ratio to colocated, as predicted.

    ``configs`` are by name; the first is the colocated one.
    """
    cores = sorted(os.sched_getaffinity(0))
    with tempfile.TemporaryDirectory() as folder:
        files = {}
        for number, (name, config) in enumerate(configs.items()):
            files[name] = Path(folder) / f"{number}.yaml"
            files[name].write_text(yaml.safe_dump(dict(config)), encoding="utf-8")
        names = list(configs)
        whole = profile(files[names[0]], cores, [batch], context + tokens)
        shares = sorted({-(-batch // _microbatches(configs[name])) for name in names[1:]})
        longest = context + tokens
        near = profile(files[names[1]], cores[:1], shares, longest)
        far = profile(files[names[1]], cores[1:2] or cores, shares, longest)
        link = measured_link(files[names[1]], cores)
        speeds = {names[0]: together(files[names[0]], whole, batch, context, tokens)}
        for name in names[1:]:
            made = apart_pipeline(
                _placement(files[name]), {LEAD: near, AWAY: far}, link, batch,
                context + tokens // 2, _microbatches(configs[name]), on_cores=True,
            )  # fmt: skip
            speeds[name] = apart_tokens_per_s(made)
    first = speeds[names[0]]
    return [{"way": n, "tokens_per_s": s, "to_colocated": s / first} for n, s in speeds.items()]


def together(file: Path, whole: Profile, batch: int, context: int, tokens: int) -> float:
    """Return the predicted speed of one process for all roles."""
    return tokens_per_s(_placement(file), {whole.backend: whole}, batch, context, tokens)


def profile(file: Path, cores: Sequence[int], rows: Sequence[int], longest: int) -> Profile:
    """Measure a config's stages in a process that is kept on some cores."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "profile.yaml"
        command = [
            sys.executable, "-m", "bench.afd_predict", str(file), str(out), str(longest),
            *map(str, rows),
        ]  # fmt: skip
        _on(cores, command)
        return Profile.read(out)


def measured_link(file: Path, cores: Sequence[int]) -> Links:
    """Measure the way to a listening role with ``profile --edge``."""
    tool = [sys.executable, "-m", "step3_hetero.cli"]
    role = subprocess.Popen(
        [*tool, "role", str(file), "--name", AWAY], stderr=subprocess.PIPE, text=True
    )
    try:
        assert role.stderr is not None
        while " listens at " not in (line := role.stderr.readline()):
            if not line:
                raise click.ClickException(f"role {AWAY} of {file} ended before it listened")
        address = line.split()[-1]
        edge = [*tool, "profile", "--edge", address, "--config", str(file), "--json"]
        said = json.loads(_on(cores[:1], edge))
        return Links((address,), said["bytes_per_s"], said["message_s"])
    finally:
        role.terminate()
        role.wait(20)


def _on(cores: Sequence[int], command: Sequence[str]) -> str:
    """Run a command on some cores and return what it prints."""
    env = {**os.environ, "OMP_NUM_THREADS": str(len(cores))}
    pinned = ["taskset", "--cpu-list", ",".join(map(str, cores)), *command]
    return subprocess.run(pinned, check=True, env=env, stdout=subprocess.PIPE, text=True).stdout


def _microbatches(config: Mapping[str, Any]) -> int:
    return int(config["runtime"]["microbatches"])


def _placement(file: Path) -> Any:
    from step3_hetero.config import Config
    from step3_hetero.runtime.resolving import resolve

    return resolve(Config.read(file)).placement


@click.command()
@click.argument("config", type=click.Path(path_type=Path))
@click.argument("out", type=click.Path(path_type=Path))
@click.argument("longest", type=click.IntRange(1))
@click.argument("rows", type=click.IntRange(1), nargs=-1, required=True)
def main(config: Path, out: Path, longest: int, rows: tuple[int, ...]) -> None:
    """Measure the stages of CONFIG on this process's cores at ROWS and up to LONGEST tokens."""
    from dataclasses import replace

    from step3_hetero.config import Config
    from step3_hetero.placement.profile_measure import Bench, Clock, measure
    from step3_hetero.placement.profile_predict import measure_engine
    from step3_hetero.placement.profile_stages import Seat, measure_stages, with_stages
    from step3_hetero.registry import get_backend
    from step3_hetero.runtime.resolving import resolve

    resolved = resolve(Config.read(config))
    stages = [s for s in resolved.graph.stages if s.kind != "vision"]
    dtype = resolved.graph.by_name["head"].spec.dtype
    seat = Seat(Bench(get_backend("cpu").open(0), dtype, Clock()))
    measured = measure_stages(stages, {s.name: seat for s in stages}, longest, rows)[seat]
    held = with_stages(measure(seat.bench, "cpu", None), seat, stages, measured, rows)
    around = measure_engine(resolved.model, resolved.placement, rows)
    replace(held, step_s=around).write(out)


if __name__ == "__main__":
    main()
