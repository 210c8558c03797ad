"""``step3-hetero profile``."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from step3_hetero.cli.options import json_option, print_json, print_table
from step3_hetero.cli.profile_edge import kept_profile, measured_link, show_link, with_link
from step3_hetero.errors import RequestError

if TYPE_CHECKING:
    from step3_hetero.placement.profile_file import Profile

EPILOG = """\b
Examples:
  step3-hetero profile --backend cpu
  step3-hetero profile --backend cpu --config examples/digits.yaml --out cpu.yaml
  step3-hetero profile --edge 10.0.0.7:7001 --config run.yaml --out h800.yaml
  step3-hetero plan --model step3 --pool h800=32 --profile h800.yaml
"""

DTYPES = {"bf16": "bfloat16", "fp32": "float32"}


@click.command("profile", epilog=EPILOG)
@click.option("--backend", help="The backend to measure.")
@click.option("--device", type=click.IntRange(0), default=0, show_default=True, help="Its number.")
@click.option("--dtype", type=click.Choice(list(DTYPES)), default="bf16", show_default=True,
              help="Of products and attention; stages have that of --config.")  # fmt: skip
@click.option("--config", help="Measure the stages of this config's model, too.")
@click.option("--card", help="The catalogue's name of the card; found by the driver's name.")
@click.option("--edge", metavar="ADDRESS",
              help="Measure the link to an idle role that stands there, of --config.")  # fmt: skip
@click.option("--out", help="Write the profile there; without --backend, its link alone.")
@json_option
def command(
    backend: str | None,
    device: int,
    dtype: str,
    edge: str | None,
    out: str | None,
    as_json: bool,
    **more: Any,
) -> None:
    """Measure a device: products, attention, bandwidth, and the stages of a config's model.

    The planner takes the file instead of the data sheet. Measure on a quiet machine.
    """
    from step3_hetero.placement.written import check_writable

    check_writable("--out", out)
    if backend is None and edge is None:
        raise RequestError("give --backend with what to measure, or --edge with a role's address")
    if backend is None:
        _edge_alone(str(edge), out, as_json, more["config"])
        return
    link = measured_link(edge, more["config"]) if edge is not None else None
    profile = _measured(backend, device, DTYPES[dtype], **more)
    if edge is not None and link is not None:
        profile = with_link(profile, edge, link)
    _write(profile, out)
    if as_json:
        print_json(profile.to_json())
    else:
        _show(profile)
        if edge is not None and link is not None:
            show_link(edge, link)


def _edge_alone(edge: str, out: str | None, as_json: bool, config: str | None) -> None:
    """Measure a link, and fill it into a profile that is there."""
    held = kept_profile(edge, out) if out is not None else None
    link = measured_link(edge, config)
    if held is not None:
        _write(with_link(held, edge, link), out)
    if as_json:
        print_json({"peers": [edge], **asdict(link)})
    else:
        show_link(edge, link)


def _write(profile: Profile, out: str | None) -> None:
    if out is not None:
        profile.write(Path(out))
        click.echo(f"wrote {out}", err=True)


def _measured(
    backend: str, device: int, dtype: str, config: str | None, card: str | None
) -> Profile:
    from step3_hetero.errors import PlacementError
    from step3_hetero.placement.catalogue import Catalogue
    from step3_hetero.placement.profile_measure import Bench, Clock, measure
    from step3_hetero.registry import get_backend

    found = get_backend(backend)
    if reason := found.why_unavailable():
        raise PlacementError(f"--backend {backend!r} has no device here: {reason}")
    opened = found.open(device)
    catalogue = Catalogue.read()
    if card is not None:
        named: str | None = catalogue.card(card).name
    else:
        known = catalogue.by_driver_name(opened.info.description)
        named = known.name if known else None
    bench = Bench(opened, dtype, Clock())
    if config is None:
        return measure(bench, backend, named)
    return _with_model(measure(bench, backend, named), bench, backend, config)


def _with_model(profile: Profile, bench: Any, backend: str, config: str) -> Profile:
    """Add the stages of a config's model, as this backend would run all of them."""
    from step3_hetero.config import Config
    from step3_hetero.placement.profile_predict import measure_engine
    from step3_hetero.placement.profile_stages import Seat, measure_stages, with_stages
    from step3_hetero.runtime.resolving import resolve

    resolved = resolve(Config.read(Path(config)))
    dtype = resolved.graph.by_name["head"].spec.dtype
    formats = [
        r.weight_format for r in resolved.placement.roles.values() if r.backend.name == backend
    ]
    longest = min(resolved.model.text.max_positions, LONGEST)
    stages = [stage for stage in resolved.graph.stages if stage.kind != "vision"]
    seat = Seat(replace(bench, dtype=dtype), formats[0] if formats else "auto")
    measured = measure_stages(stages, {s.name: seat for s in stages}, longest)[seat]
    held = with_stages(profile, seat, stages, measured)
    return replace(held, step_s=measure_engine(resolved.model, resolved.placement))


LONGEST = 2048
"""Tokens of the longest context measured."""


def _show(profile: Profile) -> None:
    click.echo(f"{profile.device['name']} ({profile.device['description']}), {profile.dtype}")
    click.echo(
        f"{profile.bandwidth_bytes_per_s / 1e9:.1f} GB/s, {profile.flops_per_s / 1e9:.1f} GFLOP/s, "
        f"{profile.call_s * 1e6:.1f} us a call"
    )
    rows = [
        (f"linear {e['inner']} x {e['columns']}", e["rows"], "-", f"{e['seconds'] * 1e6:.1f}")
        for e in profile.linear
    ]
    rows += [("attention", e["rows"], e["context"], _us(e)) for e in profile.attention]
    rows += [(_stage(e), e["rows"], e["context"], _us(e)) for e in profile.stages]
    print_table("measured", ("what", "rows", "context", "us"), rows)


def _stage(entry: Any) -> str:
    """Name a stage of a model so that it is told from its like, and from the op.

    >>> _stage({"kind": "ffn", "key": "FfnSpec(dtype='bfloat16', experts=48)"})
    'stage ffn, MoE'
    >>> _stage({"kind": "attention", "key": "AttentionSpec(adds=False, router=None)"})
    'stage attention, first layer'
    """
    key = entry["key"]
    said = {
        "ffn": ["dense" if "experts=0" in key else "MoE"],
        "attention": ["first layer"] * ("adds=False" in key)
        + ["with router"] * ("router=None" not in key),
    }.get(entry["kind"], [])
    return ", ".join([f"stage {entry['kind']}", *said])


def _us(entry: Any) -> str:
    return f"{entry['seconds'] * 1e6:.1f}"
