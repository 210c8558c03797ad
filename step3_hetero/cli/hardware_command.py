"""``step3-hetero hardware``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from step3_hetero.cli.options import json_option, print_json, print_table

if TYPE_CHECKING:
    from step3_hetero.placement.catalogue import Card

EPILOG = """\b
Examples:
  step3-hetero hardware
  step3-hetero hardware ascend-910b
  step3-hetero hardware h800 --catalogue mine.yaml --json
\b
A catalogue file holds what it changes or adds, key by key:
  cards:
    h800: {usd_per_hour: 1.80}
"""

UNITS = {
    "memory_bytes": ("GB", 1e9),
    "memory_bandwidth_bytes_per_s": ("GB/s", 1e9),
    "flops_per_s.bf16": ("TFLOP/s", 1e12),
    "flops_per_s.fp8": ("TFLOP/s", 1e12),
    "flops_per_s.int8": ("TFLOP/s", 1e12),
    "scale_up_bytes_per_s": ("GB/s each way", 1e9),
    "nic_bytes_per_s": ("Gb/s each way", 1e9 / 8),
    "usd_per_hour": ("USD per hour", 1.0),
    "usd_per_hour_range": ("USD per hour", 1.0),
    "server.cards": ("cards a server", 1.0),
    "server.host_nics": ("host NICs a server", 1.0),
    "server.host_nic_bytes_per_s": ("Gb/s each way, one host NIC", 1e9 / 8),
    "server.pcie_bytes_per_s": ("GB/s each way, each card", 1e9),
}
"""Each number of a card: the unit that people use, and its size in the field's own."""


@click.command("hardware", epilog=EPILOG)
@click.argument("name", required=False)
@click.option(
    "--catalogue",
    multiple=True,
    type=click.Path(dir_okay=False),
    help="Lay a catalogue file over the built-in cards. May be repeated.",
)
@json_option
def command(name: str | None, catalogue: tuple[str, ...], as_json: bool) -> None:
    """Show the device catalogue, or one card with the source of every number."""
    from step3_hetero.placement.catalogue import Catalogue

    known = Catalogue.read(*catalogue)
    cards = [known.card(n) for n in ([name] if name else known.names())]
    if as_json:
        shown = [card_json(card) for card in cards]
        print_json(shown[0] if name else shown)
    elif name:
        _print_card(cards[0])
    else:
        _print_cards(cards)


def card_json(card: Card) -> dict[str, Any]:
    """Return a card as plain data, in the catalogue's own units, with its sources."""
    from dataclasses import asdict, fields

    plain = {field.name: getattr(card, field.name) for field in fields(card)}
    return {
        **plain,
        "driver_names": list(card.driver_names),
        "flops_per_s": dict(card.flops_per_s),
        "server": asdict(card.server),
        "sources": dict(card.sources),
    }


def _value(card: Card, field: str) -> Any:
    section, _, name = field.rpartition(".")
    if section == "flops_per_s":
        return card.flops_per_s.get(name)
    return getattr(card.server if section else card, name)


def _shown(card: Card, field: str) -> str:
    """Write a number in people's units; a dash where there is none."""
    value, size = _value(card, field), UNITS[field][1]
    if value is None:
        return "-"
    if isinstance(value, tuple):
        return " to ".join(f"{bound:.2f}" for bound in value)
    return f"{value:.4g}" if field == "usd_per_hour" else f"{value / size:,.10g}"


def _source(card: Card, field: str) -> str:
    """Return where a number is from, or why there is none."""
    if field.startswith("flops_per_s") and card.flops_per_s and _value(card, field) is None:
        return card.sources.get(field, "the card has none")
    return card.sources.get(field, "not known")


def _print_cards(cards: list[Card]) -> None:
    columns = {
        "bf16 TFLOP/s": "flops_per_s.bf16",
        "fp8": "flops_per_s.fp8",
        "int8": "flops_per_s.int8",
        "memory GB": "memory_bytes",
        "GB/s": "memory_bandwidth_bytes_per_s",
        "scale-up GB/s": "scale_up_bytes_per_s",
        "NIC Gb/s": "nic_bytes_per_s",
        "$/h": "usd_per_hour",
        "$/h range": "usd_per_hour_range",
        "cards a server": "server.cards",
        "host NICs": "server.host_nics",
    }
    rows = [(card.name, *(_shown(card, field) for field in columns.values())) for card in cards]
    print_table("device catalogue", ("card", *columns), rows)
    click.echo("dense arithmetic; links count one direction; -: none, or not known")
    click.echo("one card with the source of every number: step3-hetero hardware NAME")


def _print_card(card: Card) -> None:
    rows = [
        (field, _shown(card, field), unit, _source(card, field))
        for field, (unit, _) in UNITS.items()
        if field != "usd_per_hour_range" or card.usd_per_hour_range
    ]
    print_table(f"{card.name}: {card.title}", ("figure", "value", "unit", "source"), rows)
    click.echo(f"vendor {card.vendor}, backend {card.backend}")
    click.echo(f"as drivers report it: {', '.join(card.driver_names) or 'not known'}")
