"""``step3-hetero cost``."""

from __future__ import annotations

import csv
import re
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from step3_hetero.cli.options import F, json_option, print_json, print_table

if TYPE_CHECKING:
    from step3_hetero.placement.cost_table import CostTable

EPILOG = """\b
Examples:
  step3-hetero cost --paper
  step3-hetero cost --model step3 --context 8K --context 64K
  step3-hetero cost --model models/tiny-step3-digits --hardware h200 --hardware a100 --csv
  step3-hetero cost --model step3 --model deepseek --chart cost.html
\b
Policies, joined by commas: paper (the paper's own card figures and counts), int8 (INT8
arithmetic on cards without FP8), mla-512 (MLA's second product over 512), catalogue (the
device catalogue's figures for every card; the default with --catalogue).
"""

LONGEST = 100_000_000
"""Tokens: ten times the longest context that any published model claims."""


def _tokens(ctx: click.Context, param: click.Parameter, values: Sequence[str]) -> list[int]:
    """Read contexts; K is 1024 and M 1024².

    Raises:
        BadParameter: one is no whole number of tokens, or out of range.
    """
    counts = []
    for value in values:
        found = re.fullmatch(r"([0-9]{1,9})([KM]?)", value.strip().upper())
        count = int(found[1]) * {"": 1, "K": 1024, "M": 1 << 20}[found[2]] if found else 0
        if not 1 <= count <= LONGEST:
            said = f"{value!r}: expected tokens, from 1 to {LONGEST:,}, as in 8192 or 8K"
            raise click.BadParameter(said, ctx, param)
        counts.append(count)
    return counts


def _repeated(flag: str, name: str, text: str, **options: Any) -> Callable[[F], F]:
    return click.option(flag, name, multiple=True, help=f"{text} May be repeated.", **options)


@click.command("cost", epilog=EPILOG)
@_repeated("--model", "models", "A model of the paper, step3, or a folder; all of the paper's.")
@_repeated("--context", "contexts", "Context in tokens; 8K and 32K.", callback=_tokens)
@_repeated("--hardware", "hardware", "A card; the paper's four, or all that have a price.")
@click.option("--policy", help="How to count; paper.")
@_repeated("--catalogue", "catalogue", "Lay a catalogue file over the built-in cards.")
@click.option("--paper", is_flag=True, help="Tables 2, 3, 5, 6 and 7 and the AFD totals.")
@json_option
@click.option("--csv", "as_csv", is_flag=True, help="Print CSV, unrounded.")
@click.option("--chart", help="Write cost against context to FILE.html or FILE.png.")
@click.pass_context
def command(
    ctx: click.Context, /, paper: bool, as_json: bool, as_csv: bool, chart: str | None, **asked: Any
) -> None:
    """Price a million decoded tokens by roofline: attention, FFN, and each where it is cheapest."""
    if as_json and as_csv:
        raise click.UsageError("--json and --csv exclude each other", ctx)
    if paper:
        given = [f"--{name.removesuffix('s')}" for name, value in asked.items() if value]
        if given:
            raise click.UsageError(
                f"--paper takes no {', '.join(given)}: its inputs are fixed", ctx
            )
    if chart is not None:
        from step3_hetero.placement.chart import check_suffix

        check_suffix(Path(chart))
    if chart is not None or not paper:
        table = _table(**asked)
    if chart is not None:
        from step3_hetero.placement.chart import write_chart

        write_chart(table, Path(chart))
        click.echo(f"wrote {chart}", err=True)
    if paper:
        _show_paper(as_json, as_csv)
    else:
        _show(table, as_json, as_csv)


def _table(
    models: Sequence[str],
    contexts: Sequence[int],
    hardware: Sequence[str],
    policy: str | None,
    catalogue: Sequence[str],
) -> CostTable:
    """Resolve names; the first thing that is wrong is told before anything is printed."""
    from step3_hetero.placement.catalogue import Catalogue
    from step3_hetero.placement.cost import Policy, accelerators, unpriced
    from step3_hetero.placement.cost_table import CostTable
    from step3_hetero.placement.workload import paper_names, workload

    counted = Policy.parse(policy or ("catalogue" if catalogue else "paper"))
    known = Catalogue.read(*catalogue)
    wanted = dict.fromkeys(models or paper_names())
    return CostTable(
        models=tuple(workload(m, mla_value_dim=counted.mla_value_dim) for m in wanted),
        contexts=tuple(dict.fromkeys(contexts or (8192, 32768))),
        accelerators=tuple(accelerators(hardware, counted, known)),
        policy=counted,
        left_out=tuple(unpriced(known)) if counted.catalogue and not hardware else (),
        files=tuple(catalogue),
    )


def _show(table: CostTable, as_json: bool, as_csv: bool) -> None:
    if as_json:
        print_json(table.to_json())
        return
    rows = table.rows()
    if as_csv:
        afd = {(s["model"], s["context"]): s for s in table.splits()}
        _print_csv([_with_afd(row, afd[row["model"], row["context"]]) for row in rows])
        return
    _print_costs(table, rows)
    for note in table.notes():
        click.echo(f"note: {note}")


def _with_afd(row: Mapping[str, Any], afd: Mapping[str, Any]) -> dict[str, Any]:
    added = {
        "afd_attention_on": afd["attention_on"],
        "afd_ffn_on": afd["ffn_on"],
        "afd_usd_per_mtok": afd["usd_per_mtok"],
    }
    return {**row, **added}


def _print_costs(table: CostTable, rows: Iterable[Mapping[str, Any]]) -> None:
    header = ("model", "context", "hardware", "attention", "ffn", "both", "core waits for")
    lines: dict[tuple[str, int], list[tuple[str, ...]]] = {}
    for row in rows:
        usd = (row[f"{part}_usd_per_mtok"] for part in ("attention", "ffn", "total"))
        line = (row["model"], f"{row['context']:,}", row["hardware"], *map(_usd, usd), row["bound"])
        lines.setdefault((row["model"], row["context"]), []).append(line)
    for afd in table.splits():
        place = f"{afd['attention_on']} + {afd['ffn_on']}"
        line = (afd["model"], f"{afd['context']:,}", f"AFD: {place}", "", "")
        lines[afd["model"], afd["context"]].append((*line, _usd(afd["usd_per_mtok"]), ""))
    flat = [line for group in lines.values() for line in group]
    print_table("USD per million decoded tokens", header, flat)


def _usd(value: float) -> str:
    """Write dollars with three decimals, or as many as leave three digits."""
    return f"{value:.3f}" if value >= 0.0095 else f"{value:.3g}"


def _show_paper(as_json: bool, as_csv: bool) -> None:
    from step3_hetero.placement.cost_tables import cells, paper_tables

    tables = paper_tables()
    if as_json:
        print_json(tables)
    elif as_csv:
        _print_csv([{"cell": name, "value": value} for name, value in cells(tables)])
    else:
        _print_paper(tables)


def _print_paper(tables: Mapping[str, Any]) -> None:
    from step3_hetero.placement.cost import LEFT_OUT
    from step3_hetero.placement.cost_tables import afd_places

    cards = tuple(tables["table7"])
    for table, context in (("table2", "8K"), ("table3", "32K")):
        counts = [(m, *(f"{n:.3e}" for n in row.values())) for m, row in tables[table].items()]
        header = ("model", "KV bytes", "attention FLOPs", "linear FLOPs", "FFN FLOPs")
        print_table(f"Table {table[-1]}: one token at {context}", header, counts)
    prices = [(u, *(f"{tables['table5'][c][u]:.4e}" for c in cards)) for u in ("u_flop", "u_byte")]
    print_table("Table 5: USD per FLOP and per byte", ("", *cards), prices)
    columns = ("attention_8k", "attention_32k", "ffn")
    costs = [
        (model, *(f"{row[column][card]:.3f}" for column in columns for card in cards))
        for model, row in tables["table6"].items()
    ]
    names = [f"{short} {card}" for short in ("8K", "32K", "ffn") for card in cards]
    print_table("Table 6: USD per million decoded tokens", ("model", *names), costs)
    places = afd_places()
    totals = [
        (m, f"{row['8k']:.3f}", places[m]["8k"], f"{row['32k']:.3f}", places[m]["32k"])
        for m, row in tables["afd"].items()
    ]
    header = ("model", "8K", "attention + ffn", "32K", "attention + ffn")
    print_table("AFD: each half where it costs least, USD per million", header, totals)
    sparsity = [tuple(f"{tables['table7'][c]:.3f}" for c in cards)]
    print_table("Table 7: least sparsity", cards, sparsity)
    click.echo(
        "note: Table 7 is for hidden 7168 and 61 layers, the shape of DeepSeek-V3 and Step-3"
    )
    click.echo(f"note: policy paper; {LEFT_OUT}")


def _print_csv(rows: Sequence[Mapping[str, Any]]) -> None:
    writer = csv.DictWriter(sys.stdout, rows[0].keys(), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
