"""A plan as ``plan --json`` prints it; `report_data.PlanJson` names every key."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from step3_hetero.placement.curves import curves
from step3_hetero.placement.edges import edges_json
from step3_hetero.placement.efficiency import CASES
from step3_hetero.placement.explain import Alternative, alternatives, binding, label_of
from step3_hetero.placement.infeasible import why_infeasible
from step3_hetero.placement.network import ASSUMED_PCIE_BYTES_PER_S, HOST, Wire
from step3_hetero.placement.performance import prefill_s
from step3_hetero.placement.pipeline import unfed
from step3_hetero.placement.plan_pipeline import period_s, pipeline_of
from step3_hetero.placement.planner import Outcome, plan
from step3_hetero.placement.plans import (
    MILLION,
    SECONDS_PER_HOUR,
    AnyPlan,
    ColocatedPlan,
    Request,
    SplitPlan,
    money,
)
from step3_hetero.placement.pools import Pool, with_case
from step3_hetero.placement.solve import SAME
from step3_hetero.placement.workload import ELEMENT_BYTES


@dataclass(frozen=True, slots=True)
class About:
    """What the caller knows beyond the outcome: names, layer kinds in order, notes."""

    model: str
    layers: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    more: Mapping[str, Any] = field(default_factory=dict)
    with_curves: bool = False


def plan_json(outcome: Outcome, about: About) -> dict[str, Any]:
    """Return the whole document, feasible or not."""
    request = outcome.request
    best = outcome.plan
    problem = request.problem
    usd = usd_per_mtok(best, problem.pools)
    priced = request.objective == "usd"
    bound = _usd_bound(outcome)
    document: dict[str, Any] = {
        "feasible": best is not None,
        "objective_usd_per_mtok": usd,
        "lower_bound": bound if priced else None,
        "gap": None if best is None else _gap(outcome),
        "paper_bound": paper_bound(problem.pools, request),
        "tpot_ms": None if best is None else best.pass_s * 1e3,
        "tokens_per_s": None if best is None else best.tokens_per_s,
        "cards": {p.name: 0 for p in problem.pools} if best is None else best.cards(problem.pools),
        "attention": {} if best is None else role_json(best, problem.pools, "attention"),
        "ffn": {} if best is None else role_json(best, problem.pools, "ffn"),
        "split": isinstance(best, SplitPlan),
        "alternatives": [] if best is None else _alternatives(outcome),
        "solve_s": outcome.solve_s,
        "objective": request.objective,
        "score": None if best is None else outcome.winner.score,
        "score_bound": outcome.bound if np.isfinite(outcome.bound) else None,
        "model": about.model,
        "context": problem.context,
        "tpot_target_ms": request.tpot_s * 1e3,
        "jitter": request.jitter,
        "demand_tokens_per_s": request.demand,
        "integer_programs": outcome.split.programs,
        "notes": [*about.notes, *notes(outcome)],
        **about.more,
    }
    if best is None:
        return document | {"reason": why_infeasible(request)}
    pipeline = pipeline_of(best, problem, about.layers)
    run = run_json(best, problem.pools, period_s(pipeline))
    document["notes"] += run_notes(best, run, request)
    for said in filter(None, (unfed(pipeline, group) for group in pipeline.ffn)):
        document["notes"].append(f"{said}: {UNFED}")
    return document | {
        "label": label_of(best),
        "binding": binding(outcome),
        "usd_per_mtok_range": _range(outcome),
        "breakdown": breakdown(best, problem.pools),
        "prefill": prefill_json(best, request),
        "run": run,
        "edges": edges_json(best, problem) if isinstance(best, SplitPlan) else [],
        **(curves(outcome) if about.with_curves else {}),
        "pipeline": pipeline.to_json(),
    }


UNFED = (
    "each would have to be divided over several sets, which no role does and simulate refuses; "
    "the price is a lower bound"
)


def run_json(best: AnyPlan, pools: Sequence[Pool], period: float) -> dict[str, Any]:
    """Return what the plan gives as its pipeline runs, ``period`` seconds a token.

    The objective and its bound count sums over all layers; this is what `simulate` says, too.
    """
    slower = period / best.pass_s
    if isinstance(best, SplitPlan):
        most = float(best.flow.sum()) * best.micro_batches / best.pass_s
    else:
        most = sum(c.tokens_per_s * n for c, n in best.columns)
    in_all = best.tokens_per_s >= most * (1 - SAME)  # else a demand, which is all that is asked
    served = most / slower if in_all else min(best.tokens_per_s, most / slower)
    usd = usd_per_mtok(best, pools)
    return {
        "tpot_ms": best.pass_s * slower * 1e3,
        "tokens_per_s": served,
        "usd_per_mtok": None if usd is None else usd * best.tokens_per_s / served,
    }


RUN_TELLING = 0.01
"""A pipeline that runs slower by less than this part is not worth a note."""


def run_notes(best: AnyPlan, run: Mapping[str, Any], request: Request) -> list[str]:
    """Return what is to be said where the pipeline runs slower than the sums over its layers."""
    tpot_ms, target_ms = run["tpot_ms"], request.tpot_s * 1e3
    if tpot_ms <= best.pass_s * 1e3 * (1 + RUN_TELLING):
        return []
    kept = "within" if tpot_ms <= target_ms else "beyond"
    usd = (
        "" if run["usd_per_mtok"] is None else f", {money(run['usd_per_mtok'])} per million tokens"
    )
    return [
        f"as the pipeline runs: {tpot_ms:.1f} ms a token, {run['tokens_per_s']:,.0f} tokens/s{usd}"
        " (attention and FFN wait for each other between layers and between tokens, which the "
        f"objective does not count); {kept} the target of {target_ms:g} ms"
    ]


def usd_per_mtok(best: AnyPlan | None, pools: Sequence[Pool]) -> float | None:
    """Return dollars per million tokens: all cards used, over tokens served; None: unpriced."""
    if best is None:
        return None
    cards = best.cards(pools)
    if any(p.card.usd_per_hour is None for p in pools if cards[p.name]):
        return None
    hourly = sum(p.card.price() * cards[p.name] for p in pools if cards[p.name])
    return hourly / SECONDS_PER_HOUR / best.tokens_per_s * MILLION


def _usd_bound(outcome: Outcome) -> float | None:
    if not np.isfinite(outcome.bound) or outcome.request.objective != "usd":
        return None
    demand = outcome.request.demand
    return outcome.bound if demand is None else outcome.bound / demand


def _gap(outcome: Outcome) -> float:
    """Return (score - bound) / score; 0 is a proof."""
    score = outcome.winner.score
    return max(0.0, (score - outcome.bound) / abs(score))


def paper_bound(pools: Sequence[Pool], request: Request) -> float | None:
    """Return the paper's roofline: the cheapest card for attention plus the cheapest for FFN.

    No efficiency, network, weight reads, memory or embedding; each card at its fastest arithmetic
    and one byte a value, so that no plan of these pools can be cheaper.
    """
    workload, context = request.problem.workload, request.problem.context
    found = []
    for pool in pools:
        if pool.card.usd_per_hour is None:
            return None
        usd_per_s = pool.card.usd_per_hour / SECONDS_PER_HOUR * MILLION
        flops = max(pool.card.flops_per_s.values())
        moved = workload.kv_bytes(context) / pool.card.memory_bandwidth_bytes_per_s
        core = max(workload.attention_flops(context) / flops, moved)
        attention = usd_per_s * (core + workload.linear_flops / flops)
        found.append((attention, usd_per_s * workload.ffn_flops / flops))
    return min(a for a, _ in found) + min(f for _, f in found)


def role_json(best: AnyPlan, pools: Sequence[Pool], role: str) -> dict[str, Any]:
    """Return what runs one role; several groups stand under ``groups``, the largest at the top."""
    if isinstance(best, ColocatedPlan):
        groups = [_colocated_group(best, pools, n) for n in range(len(best.columns))]
    elif role == "attention":
        groups = [_attention_group(best, n) for n in range(len(best.attention))]
    else:
        groups = [_ffn_group(best, n) for n in range(len(best.ffn))]
    top = max(groups, key=lambda group: int(group["cards"]))
    return top | {"groups": groups}


def _colocated_group(best: ColocatedPlan, pools: Sequence[Pool], n: int) -> dict[str, Any]:
    column, count = best.columns[n]
    return {
        "pool": pools[column.pool].name,
        "instances": count,
        "cards": count * column.cards,
        "tp": column.tp,
        "ep": column.cards // column.tp,
        "precision": column.precision,
        "batch": column.batch,
        "micro_batches": column.in_flight,
        "pass_s": column.pass_s,
    }


def _attention_group(best: SplitPlan, n: int) -> dict[str, Any]:
    column, count = best.attention[n]
    tokens = float(best.flow[n].sum() / count)
    return {
        "pool": best.pools[column.pool].name,
        "instances": count,
        "cards": count * column.cards,
        "tp": column.tp,
        "precision": column.precision,
        "batch": tokens,
        "largest_batch": float(column.capacity[best.clock]),
        "largest_batch_by_memory": float(column.by_memory[best.clock]),
        "micro_batches": best.micro_batches,
        "pass_s": float(column.stage.pass_s(np.array([tokens]))[0]),
    }


def _ffn_group(best: SplitPlan, n: int) -> dict[str, Any]:
    column, count = best.ffn[n]
    tokens = float(best.flow[:, n].sum() / count)
    return {
        "pool": best.pools[column.pool].name,
        "instances": count * column.ep,
        "sets": count,
        "cards": count * column.cards,
        "tp": column.tp,
        "ep": column.ep,
        "precision": column.precision,
        "batch": tokens,
        "largest_batch": float(column.capacity[best.clock]),
        "pass_s": float(column.stage.pass_s(np.array([tokens]))[0]),
    }


def _alternatives(outcome: Outcome) -> list[dict[str, Any]]:
    pools = outcome.request.problem.pools
    return [_alternative(a, pools) for a in alternatives(outcome)]


def _alternative(a: Alternative, pools: Sequence[Pool]) -> dict[str, Any]:
    return {
        "label": a.label,
        "usd_per_mtok": usd_per_mtok(a.plan, pools),
        "loses_on": a.loses_on,
        "detail": a.detail,
        "tpot_ms": None if a.plan is None else a.plan.pass_s * 1e3,
        "tokens_per_s": None if a.plan is None else a.plan.tokens_per_s,
        "cards": {} if a.plan is None else a.plan.cards(pools),
    }


def breakdown(best: AnyPlan, pools: Sequence[Pool]) -> dict[str, float] | None:
    """Return dollars per million tokens by role and pool; they sum to the objective."""
    if usd_per_mtok(best, pools) is None:
        return None
    if isinstance(best, ColocatedPlan):
        used = [("colocated", c.pool, n * c.cards) for c, n in best.columns]
    else:
        used = [("attention", c.pool, n * c.cards) for c, n in best.attention]
        used += [("FFN", c.pool, n * c.cards) for c, n in best.ffn]
    parts: dict[str, float] = {}
    for role, p, cards in used:
        name = f"{role} on {pools[p].name}"
        cost = cards * pools[p].card.price() / SECONDS_PER_HOUR / best.tokens_per_s * MILLION
        parts[name] = parts.get(name, 0.0) + cost
    return parts


RANGE_STEP = 10
"""In the third digit of a pace: 1 % to 10 %."""


def _range(outcome: Outcome) -> list[float] | None:
    """Return the objective when assumed constants are at their high and at their low case.

    Planned anew for each, at fewer paces: other constants may make another placement the best.
    """
    request = outcome.request
    if all(pool.efficiency.calibrated for pool in request.problem.pools):
        return None
    found = []
    for case in (CASES[-1], CASES[0]):
        pools = tuple(with_case(request.problem.pools, case))
        problem = replace(request.problem, pools=pools)
        other = plan(replace(request, problem=problem, pace_step=RANGE_STEP))
        usd = usd_per_mtok(other.plan, pools)
        if usd is None:
            return None
        found.append(usd)
    nominal = usd_per_mtok(outcome.plan, request.problem.pools)
    assert nominal is not None, "priced, since the others are"
    return [min(nominal, *found), max(nominal, *found)]


def prefill_json(best: AnyPlan, request: Request) -> dict[str, Any]:
    """Return the time to the first token of a prompt as long as the context, and its cost.

    One attention instance and one FFN set work on it; every instance is taken to do the same.
    """
    if isinstance(best, ColocatedPlan):
        column, _ = best.columns[0]
        stage = column.stage
        tokens = np.array([request.problem.context / stage.groups])
        total = float(stage.compute_s(tokens)[0] + stage.exchange_s(tokens)[0])
        served = request.problem.context / total * sum(n for _, n in best.columns)
    else:
        a, f = best.attention[0][0].stage, best.ffn[0][0].stage
        attention_s, ffn_s = prefill_s(a, f, request.problem.context)
        total = attention_s + ffn_s
        busiest = max(
            attention_s / sum(n for _, n in best.attention), ffn_s / sum(n for _, n in best.ffn)
        )
        served = request.problem.context / busiest
    usd = None
    if request.objective == "usd":
        usd = best.cost / served
    return {
        "prompt_tokens": request.problem.context,
        "ttft_s": total,
        "usd_per_mtok": usd,
    }


def notes(outcome: Outcome) -> list[str]:
    """Return what was assumed, and what is missing."""
    request, said = outcome.request, []
    pools = request.problem.pools
    loose = [p.name for p in pools if not p.efficiency.calibrated]
    if loose:
        shown = "the range shows the low and the high case of"
        unpriced = usd_per_mtok(outcome.plan, pools) is None
        said.append(
            f"uncalibrated: no measurement of {', '.join(loose)} is at hand; "
            f"{'see' if unpriced else shown} docs/calibration.md"
        )
    for p in pools:
        if "fp8" not in p.card.flops_per_s:
            said.append(
                f"{p.name} has no FP8 arithmetic: a stage placed on it is requantised to "
                f"{_fallback(p, request)} and priced so"
            )
    host = [w for w in request.problem.wires.values() if isinstance(w, Wire) and w.kind == HOST]
    if host and any(p.card.server.pcie_bytes_per_s is None for p in pools):
        rate = ASSUMED_PCIE_BYTES_PER_S / 1e9
        said.append(
            f"no PCIe rate in the catalogue: {rate:g} GB/s assumed for host-bounced edges "
            "(--pcie-gbytes gives it)"
        )
    if isinstance(outcome.plan, ColocatedPlan) and len(pools) > 1:
        said.append("do not split: the colocated plan is the cheapest")
    return said


def _fallback(pool: Pool, request: Request) -> str:
    held = [d for d in ("int8", "bf16") if d in pool.card.flops_per_s]
    allowed = [d for d in held if d not in request.problem.excluded_dtypes]
    return min(allowed, key=lambda d: ELEMENT_BYTES[d], default="nothing that is allowed")
