"""``step3-hetero plan``."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import click

from step3_hetero.cli.options import human_bytes, json_option, print_json, print_table

EPILOG = """\b
Examples:
  step3-hetero plan --model step3 --pool h800=32 --pool h20=32 --context 8192 --tpot-ms 50
  step3-hetero plan --model step3 --pool h800=32 --pool ascend-910b=64 --context 8192 \\
      --tpot-ms 50 --host-nic-gbit 400 --host-nics-per-server 8
  step3-hetero plan --model step3 --inventory hosts.yaml --tpot-ms 50 --out plan.yaml --json
\b
Exclusions: vendors:nvidia+ascend (no edge between the two), dtype:int8 (neither computed nor on
the wire), rack:r7 (of an inventory), attention:ascend-910b or ffn:h800 (not on these cards),
colocated (only plans that split).
"""


@click.command("plan", epilog=EPILOG)
@click.option("--model", required=True, help="step3, a model's folder, or a model of the paper.")
@click.option("--pool", "pools", multiple=True, metavar="CARD=N", help="Cards. May be repeated.")
@click.option("--inventory", metavar="FILE", help="Servers, racks and links, instead of --pool.")
@click.option("--context", type=int, default=8192, show_default=True, help="Tokens of context.")
@click.option(
    "--tpot-ms", type=float, default=50.0, show_default=True, help="Longest time a token."
)
@click.option("--jitter", type=float, default=0.10, show_default=True, help="Part of it kept free.")
@click.option("--demand", type=float, metavar="TOKENS/S", help="Serve this much, no more.")
@click.option(
    "--objective", type=click.Choice(["usd", "tokens", "cards"]), default="usd", show_default=True,
    help="Least dollars a token, most tokens a second, or fewest cards.",
)  # fmt: skip
@click.option("--host-nic-gbit", type=float, help="Rate of one host NIC; reaches any vendor.")
@click.option("--host-nics-per-server", type=int, help="Host NICs that a server's cards share.")
@click.option("--pcie-gbytes", type=float, help="PCIe of a card each way, GB/s; 20 assumed.")
@click.option("--exclude", multiple=True, metavar="KIND:WHAT", help="See below. May be repeated.")
@click.option("--profile", "profiles", multiple=True, metavar="FILE",
              help="A measured device for the data sheet. May be repeated.")  # fmt: skip
@click.option(
    "--catalogue", "catalogues", multiple=True, metavar="FILE",
    help="A catalogue file over the built-in cards. May be repeated.",
)  # fmt: skip
@click.option("--out", metavar="FILE", help="Write the plan as a config.")
@click.option("--html", metavar="FILE", help="Write a report.")
@json_option
def command(out: str | None, html: str | None, as_json: bool, **options: Any) -> None:
    """Say where attention and FFN should run, what a million tokens costs, and why.

    Where nothing is feasible: which constraint, by how much, and the nearest change that helps.
    """
    from step3_hetero.errors import PlacementError
    from step3_hetero.placement.asked import Asked
    from step3_hetero.placement.plan_file import write_plan
    from step3_hetero.placement.plan_json import plan_json
    from step3_hetero.placement.planner import plan
    from step3_hetero.placement.racks import place_on_racks
    from step3_hetero.placement.written import check_writable

    check_writable("--out", out)
    check_writable("--html", html)
    asked = Asked.of(**options)
    placed = place_on_racks(plan(asked.request), asked.servers)
    outcome = placed.outcome
    about = replace(asked.about_placed(placed), with_curves=as_json or html is not None)
    document = plan_json(outcome, about)
    if as_json:
        print_json(_finite(document))
    if not document["feasible"]:
        raise PlacementError(f"no feasible plan: {document['reason']}")
    if not as_json:
        _show(document)
    if out is not None:
        for file in write_plan(outcome, document, Path(out), options["model"]):
            click.echo(f"wrote {file}", err=True)
    if html is not None:
        from step3_hetero.placement.report import write_report

        write_report(document, Path(html))
        click.echo(f"wrote {html}", err=True)


def _finite(value: Any) -> Any:
    """Return plain values for JSON, which knows no infinity."""
    if isinstance(value, dict):
        return {key: _finite(v) for key, v in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _show(document: dict[str, Any]) -> None:
    from step3_hetero.placement.plans import money

    usd = document["objective_usd_per_mtok"]
    cost = "unpriced" if usd is None else f"{money(usd)} per million tokens"
    click.echo(f"{document['label']}")
    click.echo(
        f"{cost}, {document['tokens_per_s']:,.0f} tokens/s, "
        f"{document['tpot_ms']:.1f} ms a token (target {document['tpot_target_ms']:g} ms)"
    )
    if document["usd_per_mtok_range"]:
        low, high = document["usd_per_mtok_range"]
        click.echo(f"range over the uncalibrated constants: {money(low)} to {money(high)}")
    bound = document["lower_bound"]
    if bound is not None:
        paper = document["paper_bound"]
        click.echo(
            f"proven: no plan under {money(bound)} (gap {document['gap']:.2%}); "
            f"paper's roofline {money(paper)}"
        )
    click.echo(document["binding"])
    rows = [_row("attention", g) for g in document["attention"]["groups"]]
    if document["split"]:
        rows += [_row("FFN", g) for g in document["ffn"]["groups"]]
    header = ("role", "pool", "cards", "instances", "TP", "EP", "precision", "batch")
    print_table("placement", header, rows if document["split"] else [_both(r) for r in rows])
    _edges(document["edges"])
    _alternatives(document["alternatives"])
    _notes(document["notes"])


def _row(role: str, group: dict[str, Any]) -> tuple[str, ...]:
    keys = ("pool", "cards", "instances", "tp")
    found = [str(group[key]) for key in keys]
    return (role, *found, str(group.get("ep", 1)), group["precision"], f"{group['batch']:.0f}")


def _both(row: tuple[str, ...]) -> tuple[str, ...]:
    return ("attention and FFN", *row[1:])


def _edges(found: Sequence[dict[str, Any]]) -> None:
    """Print what one micro-batch in one layer takes on each edge; none where nothing is split."""
    rows = [
        (
            f"{e['attention']} - {e['ffn']}", e["over"], e["slowest_hop"], e["members"],
            *(_way(e, way) for way in ("a2f", "f2a")),
        )
        for e in found
    ]  # fmt: skip
    header = (
        "edge", "over", "slowest hop", "members", "a card to each, all in", "and back, all in"
    )  # fmt: skip
    if rows:
        print_table("edges, for one micro-batch in one layer", header, rows)


def _way(edge: dict[str, Any], way: str) -> str:
    pieces = edge[f"{way}_pieces"]
    cut = f" in {pieces} pieces" if pieces > 1 else ""
    return f"{human_bytes(edge[f'{way}_message_bytes'])}{cut}, {edge[f'{way}_s'] * 1e6:.0f} us"


def _alternatives(found: Sequence[dict[str, Any]]) -> None:
    from step3_hetero.placement.plans import money

    rows = [
        (
            a["label"],
            money(a["usd_per_mtok"]).lstrip("$"),
            a["loses_on"],
            a["detail"],
        )
        for a in found
    ]
    if rows:
        print_table("alternatives", ("placement", "$/Mtok", "loses on", "why"), rows)


def _notes(notes: Sequence[str]) -> None:
    for note in notes:
        click.echo(f"note: {note}")
