"""``step3-hetero check``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from step3_hetero.cli.options import (
    config_argument,
    human_bytes,
    json_option,
    print_json,
    print_table,
    set_option,
)

EPILOG = """\b
Examples:
  step3-hetero check examples/digits.yaml
  step3-hetero check examples/digits.yaml --set roles.f.backend=cpu --json
  step3-hetero check examples/digits.yaml --here
"""


@click.command("check", epilog=EPILOG)
@config_argument
@click.option("--here", is_flag=True, help="Also demand that every device is on this machine.")
@set_option
@json_option
def command(config: str, here: bool, overrides: tuple[str, ...], as_json: bool) -> None:
    """Show placement, edges and bytes of a config, without any hardware.

    A plan is held against the cards of the catalogue.
    """
    from step3_hetero.afd.addresses import check_addresses
    from step3_hetero.config import Config
    from step3_hetero.placement.plan_check import check_plan, only_planned
    from step3_hetero.runtime.resolving import open_devices, resolve

    read = Config.read(Path(config), list(overrides), planned=not here)
    if only_planned(read) and not here:
        _show_plan(check_plan(read), as_json)
        return
    check_addresses(read)
    resolved = resolve(read)
    if here:
        open_devices(resolved)
    placement = resolved.placement
    report = {**placement.to_json(), "here": True if here else None}
    if as_json:
        print_json(report)
        return
    _print_roles(report)
    _print_crossing(report)
    blocks = report["kv_blocks"]
    said = "1 block" if blocks == 1 else f"{blocks} blocks"
    click.echo(f"KV cache: {said} of 128 tokens in every layer")
    for role in report["roles"]:
        for said in filter(None, (_emulated(role), _heads_split(role), _requantised(role))):
            click.echo(f"note: {said}")
    for said in report["overfull"]:
        click.echo(f"note: does not fit: {said}")
    if here:
        click.echo("every device is on this machine and has the memory")


def _show_plan(report: dict[str, Any], as_json: bool) -> None:
    """Print a plan that this build cannot run yet, held against the catalogue's cards."""
    if as_json:
        print_json({**report, "here": None})
        return
    _print_roles(report)
    _print_crossing(report)
    for said in report["not_run_yet"]:
        click.echo(f"note: a plan, which this build cannot run: {said}")


def _emulated(role: dict[str, Any]) -> str:
    """Say what is emulated of a role's card; empty if it is no such role."""
    if not (asked := role["emulated"]):
        return ""
    told = [f"{asked['memory']:.3g} of its memory"] if asked["memory"] < 1 else []
    told += [f"stages slower by {asked['slow']:g}"] if asked["slow"] > 1 else []
    told += [f"edges late by {asked['latency_s']:g} s"] if asked["latency_s"] else []
    for key, what in (("bytes_per_s", "edges"), ("copy_bytes_per_s", "copies")):
        told += [f"{what} of {human_bytes(asked[key])} a second"] if asked[key] else []
    return (
        f"role {role['role']}: {', '.join([role['device'], *told])}; dtypes and memory are the "
        "card's, the arithmetic is the host's"
    )


def _heads_split(role: dict[str, Any]) -> str:
    """Say what each rank of an attention instance holds; empty if it is one process."""
    if not (split := role.get("heads_split")):
        return ""
    return (
        f"role {role['role']}: each of {split['ranks']} ranks holds {split['heads']} of the query "
        f"heads and {split['kv_heads']} of the KV heads, {human_bytes(split['weight_bytes'])} and "
        f"the KV cache; rank 0 holds the other stages too, {human_bytes(role['weight_bytes'])}"
    )


def _requantised(role: dict[str, Any]) -> str:
    """Say what a role's backend requantises at load; empty if nothing."""
    if not (made := role["requantised"]):
        return ""
    return (
        f"role {role['role']}: {role['backend']} requantises {made['tensors']} tensors of the "
        f"checkpoint from {made['stored']} to {made['to']}, {human_bytes(made['bytes'])}: "
        f"{made['method']}"
    )


def _print_roles(report: dict[str, Any]) -> None:
    rows = [
        (
            r["role"],
            r["backend"],
            r["device"],
            r["stages"],
            human_bytes(r["weight_bytes"]),
            human_bytes(r["kv_bytes"]),
            human_bytes(r["memory_bytes"]),
            _instances(r),
        )
        for r in report["roles"]
    ]
    header = (
        "role", "backend", "device", "stages", "weights", "KV cache", "memory", "instances"
    )  # fmt: skip
    print_table(f"placement of {report['model']}", header, rows)


def _instances(role: dict[str, Any]) -> str:
    """Say how many instances there are, and in which sets and groups they share their stages."""
    degrees = [f"{key} {role[key]}" for key in ("ep", "tp") if role.get(key, 1) > 1]
    return ", ".join([str(role["instances"]), *degrees])


def _print_crossing(report: dict[str, Any]) -> None:
    over = report.get("transport")  # a plan's cards are devices
    between = "devices" if over is None else "processes"
    if not report["crossing"]:
        click.echo(f"no edge crosses between {between}")
        return
    rows = [
        (
            c["kind"].upper(), c["source"], c["target"], c["edges"],
            human_bytes(c["bytes_per_token"]), c["members"],
            human_bytes(c["sent_bytes_per_token"]), c["dtype"],
        )
        for c in report["crossing"]
    ]  # fmt: skip
    header = (
        "edge", "from", "to", "edges", "bytes per token", "members", "sent per token", "dtype"
    )  # fmt: skip
    how = "" if over is None else f", over {over}"
    print_table(f"edges between {between}{how}", header, rows)
    for hop in dict.fromkeys(c["slowest_hop"] for c in report["crossing"] if c.get("slowest_hop")):
        click.echo(f"note: the slowest hop of these edges, as planned, is {hop}")
