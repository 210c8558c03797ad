"""One self-contained HTML page about a plan: what it costs, where it stands, why others lose.

The input is the planner's JSON; `report_data` names its keys. Nothing is fetched from a network.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from step3_hetero.errors import PlacementError
from step3_hetero.placement.gantt import gantt_values
from step3_hetero.placement.pipeline import PredictedPipeline
from step3_hetero.placement.plans import money
from step3_hetero.placement.report_charts import COLOURS, context_figures, pareto_figures
from step3_hetero.placement.report_data import PlanJson
from step3_hetero.placement.simulate import Scenario, simulate
from step3_hetero.placement.trace import SliceRecorder
from step3_hetero.placement.written import fill, write_whole

TOKENS = 8
"""Simulated for the drawing; it shows the second."""
INSTANCES = 4
MOST_SERVERS = 96
"""Drawn one by one; the page says how many more there are."""
MOST_ALTERNATIVES = 10
IN_USD = ("objective_usd_per_mtok", "lower_bound")
"""Numbers that only a plan of the least dollars has for sure: other objectives need no price."""
ROLES = ("attention", "ffn", "colocated")


def write_report(plan: Mapping[str, Any], path: str | Path) -> None:
    """Write the page of a plan, whole or not at all.

    Raises:
        PlacementError: a required key of `PlanJson` is missing or holds no number.
        RequestError: the file cannot be written.
        ConfigError: ``pipeline`` is no pipeline.
    """
    write_whole(Path(path), report_page(plan))


def report_page(plan: Mapping[str, Any]) -> str:
    """Return the page as text; raises as `write_report` does."""
    _check(plan)
    pipeline, racks = plan.get("pipeline"), _racks(plan.get("racks") or [])
    return fill(
        "report.html.j2",
        plan={**dict.fromkeys(PlanJson.__optional_keys__), **plan},
        headline=_headline(plan),
        proof=_proof(plan),
        money=money,
        roles=_roles(plan),
        racks=racks,
        racks_left=len(plan.get("racks") or []) - len(racks),
        breakdown=_breakdown(plan),
        context_figures=_context(plan),
        pareto_figures=pareto_figures(plan["pareto"]) if plan.get("pareto") else [],
        gantt=_gantt(pipeline) if pipeline else None,
        alternatives=_alternatives(plan),
        facts=_facts(plan),
    )


def _check(plan: Mapping[str, Any]) -> None:
    missing = sorted(PlanJson.__required_keys__ - set(plan))
    if missing:
        known = ", ".join(sorted(PlanJson.__required_keys__))
        raise PlacementError(f"plan: no key {', '.join(missing)}; a report needs {known}")
    in_usd = plan.get("objective", "usd") == "usd"
    for key in ("objective_usd_per_mtok", "lower_bound", "gap", "tpot_ms", "tokens_per_s"):
        value = plan[key]
        if value is None and not (plan["feasible"] and (in_usd or key not in IN_USD)):
            continue
        if not isinstance(value, int | float) or not math.isfinite(value):
            raise PlacementError(f"plan: {key}: expected a number, got {value!r}")


def _headline(plan: Mapping[str, Any]) -> str:
    """Return what the page is about in a few words."""
    if not plan["feasible"]:
        return ""
    cost = plan["objective_usd_per_mtok"]
    if cost is not None:
        return f"{money(cost)} per million tokens"
    return f"{plan['tokens_per_s']:,.0f} tokens/s, unpriced"


def _proof(plan: Mapping[str, Any]) -> str:
    """Return what is proven of the plan, and how long that took."""
    if not plan["feasible"]:
        return ""
    took = f"{plan['gap'] * 100:.2f} %, found in {plan['solve_s']:.2f} s."
    if plan["lower_bound"] is None:
        what = {"tokens": "serves more tokens a second", "cards": "takes fewer cards a token"}
        better = what.get(plan.get("objective", ""), "is better")
        return f"No placement within these limits {better}, but for a gap of {took}"
    bound = money(plan["lower_bound"])
    return (
        f"No placement within these limits costs less than {bound}: the gap to this plan is {took}"
    )


def _facts(plan: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Return the figures under the headline, name and value."""
    if not plan["feasible"]:
        return []
    target = plan.get("tpot_target_ms")
    tpot = f"{plan['tpot_ms']:.1f} ms" + (f" of {target:g}" if target else "")
    cards = sum(plan["cards"].values())
    found = [
        ("TPOT", tpot),
        ("tokens/s", f"{plan['tokens_per_s']:,.0f}"),
        ("tokens/s per card", f"{plan['tokens_per_s'] / cards:,.0f}" if cards else "–"),
        ("cards", f"{cards:,}"),
        ("lower bound", money(plan["lower_bound"])),
        ("gap", f"{plan['gap']:.2%}"),
        ("paper's roofline bound", money(plan["paper_bound"])),
    ]
    run = plan.get("run")
    if run:
        found.append(
            ("as its pipeline runs", f"{run['tpot_ms']:.1f} ms, {money(run['usd_per_mtok'])}")
        )
    for edge in plan.get("edges", ()):
        found.append((f"slowest hop, {edge['attention']} to {edge['ffn']}", edge["slowest_hop"]))
    spread = plan.get("usd_per_mtok_range")
    if spread:
        found.append(("low to high case", f"{money(spread[0])} to {money(spread[1])}"))
    return found


def _roles(plan: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return what stands where: a panel a role with its keys as text, one a group of several."""
    found = []
    for title, key in (("Attention", "attention"), ("FFN", "ffn")):
        whole = {k: v for k, v in (plan[key] or {}).items() if k != "groups" and v is not None}
        groups = (plan[key] or {}).get("groups") or []
        if whole:
            found.append({"title": title, "rows": _rows(whole)})
        for number, group in enumerate(groups if len(groups) > 1 else [], start=1):
            found.append({"title": f"{title}, group {number}", "rows": _rows(group)})
    return found


def _rows(values: Mapping[str, Any]) -> list[tuple[str, str]]:
    return [_row(key, value) for key, value in values.items()]


def _row(key: str, value: object) -> tuple[str, str]:
    """Return a key of the JSON and its value as a page writes them.

    >>> _row("tp", 4), _row("pass_s", 0.009), _row("largest_batch", 8), _row("micro_batches", 3)
    (('TP', '4'), ('pass, ms', '9.00'), ('largest batch', '8'), ('micro-batches', '3'))
    """
    if key in ("tp", "ep"):
        return key.upper(), _text(value)
    name = key.replace("micro_", "micro-").replace("_", " ")
    if key.endswith("_s") and not key.endswith("per_s") and isinstance(value, float):
        return f"{name.removesuffix(' s')}, ms", f"{value * 1e3:,.2f}"
    return name, _text(value)


def _text(value: object) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:,.6g}"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, Mapping):
        return ", ".join(f"{k} {_text(v)}" for k, v in value.items())
    if isinstance(value, list | tuple):
        return "; ".join(map(_text, value))
    return str(value)


def _racks(racks: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return racks with one cell a card: (css colour number or None, letter, title)."""
    found, drawn = [], 0
    for rack in racks:
        servers = rack["servers"][: max(0, MOST_SERVERS - drawn)]
        drawn += len(servers)
        more = len(rack["servers"]) - len(servers) + rack.get("more_servers", 0)
        if not servers:
            continue
        found.append({"name": rack["name"], "servers": [_server(s) for s in servers], "more": more})
    return found


def _server(server: Mapping[str, Any]) -> dict[str, Any]:
    cells: list[tuple[int | None, str, str]] = []
    for use in server["used"]:
        role = use["role"]
        colour = ROLES.index(role) if role in ROLES else len(ROLES)
        letter = f"{role[:1].upper()}{use['instance']}"
        cells += [(colour, letter, f"{role} {use['instance']}")] * use["cards"]
    idle = server["cards"] - len(cells)
    if idle < 0:
        raise PlacementError(
            f"plan: racks: server {server['name']!r} has {server['cards']} cards, {len(cells)} used"
        )
    cells += [(None, "", "unused")] * idle
    used = ", ".join(f"{u['cards']} of {u['role']} {u['instance']}" for u in server["used"])
    return {**server, "cells": cells, "said": used or "unused"}


def _breakdown(plan: Mapping[str, Any]) -> list[dict[str, Any]]:
    parts = plan.get("breakdown") or {}
    total = sum(parts.values())
    return [
        {"part": part, "usd": money(usd), "percent": round(100 * usd / total, 1) if total else 0}
        for part, usd in sorted(parts.items(), key=lambda item: -item[1])
    ]


def _context(plan: Mapping[str, Any]) -> dict[str, Any] | None:
    lines = plan.get("cost_by_context")
    if not lines:
        return None
    contexts = sorted({point["context"] for line in lines for point in line["points"]})
    rows = []
    for number, line in enumerate(lines):
        costs = {point["context"]: point["usd_per_mtok"] for point in line["points"]}
        cells = [money(costs.get(context)) for context in contexts]
        chosen = line.get("chosen", False)
        rows.append((line["label"], number % COLOURS, chosen, cells))
    return {"figures": context_figures(lines), "contexts": contexts, "rows": rows}


def _alternatives(plan: Mapping[str, Any]) -> list[dict[str, str]]:
    best = plan["objective_usd_per_mtok"]
    found = []
    for other in plan["alternatives"][:MOST_ALTERNATIVES]:
        usd = other.get("usd_per_mtok")
        more = f"+{usd / best - 1:.1%}" if usd is not None and best else ""
        found.append(
            {
                "label": other["label"],
                "usd": money(usd),
                "more": more,
                "loses_on": other["loses_on"],
                "detail": other["detail"],
            }
        )
    return found


def _gantt(pipeline: object) -> dict[str, Any]:
    """Simulate the pipeline without jitter and return what its part of the page needs."""
    read = PredictedPipeline.from_json(pipeline)
    recorder = SliceRecorder(read, TOKENS, most_instances=INSTANCES)
    result = simulate(read, Scenario(tokens=TOKENS), recorder=recorder)
    return gantt_values(recorder, result)
