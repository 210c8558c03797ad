"""The pipeline that a plan predicts, in the form that `simulate` reads."""

from __future__ import annotations

from dataclasses import replace
from itertools import groupby

import numpy as np

from step3_hetero.placement.columns import AttentionColumn, FfnColumn, Problem
from step3_hetero.placement.edges import Edge
from step3_hetero.placement.layer_kinds import kinds
from step3_hetero.placement.pace import attention_seconds, ffn_seconds
from step3_hetero.placement.performance import AttentionStage
from step3_hetero.placement.pipeline import (
    LOCAL,
    REMOTE,
    AttentionGroup,
    FfnGroup,
    LayerRun,
    PredictedPipeline,
)
from step3_hetero.placement.plans import AnyPlan, ColocatedPlan, SplitPlan
from step3_hetero.placement.simulate import Scenario, simulate
from step3_hetero.placement.workload import Workload

FURTHER = 1024
"""Tokens of context over which the growth of attention's time is taken."""


def pipeline_of(plan: AnyPlan, problem: Problem, layers: tuple[str, ...] = ()) -> PredictedPipeline:
    """Return a plan's pipeline; ``layers`` names the kind of each layer in order, where known."""
    if isinstance(plan, ColocatedPlan):
        return _colocated(plan, problem, layers)
    return _split(plan, problem, layers)


def _runs(workload: Workload, layers: tuple[str, ...], ffn: str) -> tuple[LayerRun, ...]:
    if layers:
        return tuple(LayerRun(len(list(run)), kind, ffn) for kind, run in groupby(layers))
    return tuple(LayerRun(count, kind, ffn) for kind, (_, _, count) in kinds(workload).items())


def _per_context_token(stage: AttentionStage, tokens: float) -> float:
    later = AttentionStage(stage.workload, stage.roof, stage.tp, stage.context + FURTHER)
    batch = np.array([float(tokens)])
    grown = float((later.pass_s(batch) - stage.pass_s(batch))[0])
    return max(grown, 0.0) / FURTHER / stage.workload.layers


def shares(plan: SplitPlan) -> list[tuple[int, int, int]]:
    """Return which attention group feeds which FFN group with how many whole instances.

    Instances that divide themselves go to the partner that takes most of them.
    """
    found: list[tuple[int, int, int]] = []
    for n, (_, count) in enumerate(plan.attention):
        flow = plan.flow[n]
        wanted = count * flow / flow.sum() if flow.sum() else np.eye(1, len(flow))[0] * count
        whole = np.floor(wanted + 1e-9).astype(int)
        for place in np.argsort(whole - wanted)[: count - int(whole.sum())]:
            whole[place] += 1
        found += [(n, f, int(k)) for f, k in enumerate(whole) if k]
    return found


def _split(plan: SplitPlan, problem: Problem, layers: tuple[str, ...]) -> PredictedPipeline:
    fed = shares(plan)
    names_f = [_name(plan, c, k, plan.ffn) for k, (c, _) in enumerate(plan.ffn)]
    groups = [
        _attention_group(plan, problem, (n, f, count), names_f[f], index)
        for index, (n, f, count) in enumerate(fed)
    ]
    sets = []
    for f, (column, count) in enumerate(plan.ffn):
        tokens = np.array([max(1.0, plan.flow[:, f].sum() / count)])
        seconds = {kind: float(s[0]) for kind, s in ffn_seconds(column, tokens).items()}
        card = plan.pools[column.pool].card.name
        sets.append(FfnGroup(names_f[f], card, count, column.cards, seconds))
    between = max(
        float(c.stage.between_s(np.array([max(1.0, plan.flow[n].sum() / count)]))[0])
        for n, (c, count) in enumerate(plan.attention)
    )
    return PredictedPipeline(
        plan.micro_batches,
        problem.context,
        _runs(problem.workload, layers, REMOTE),
        tuple(groups),
        tuple(s for s in sets if s.name in {g.feeds for g in groups}),
        between,
    )


def _name(
    plan: SplitPlan,
    column: AttentionColumn | FfnColumn,
    index: int,
    columns: tuple[tuple[AttentionColumn, int], ...] | tuple[tuple[FfnColumn, int], ...],
) -> str:
    pool = plan.pools[column.pool].name
    alone = sum(c.pool == column.pool for c, _ in columns) == 1
    return pool if alone else f"{pool}-{index + 1}"


def _attention_group(
    plan: SplitPlan, problem: Problem, share: tuple[int, int, int], feeds: str, index: int
) -> AttentionGroup:
    n, f, count = share
    column, partner = plan.attention[n][0], plan.ffn[f][0]
    batch = max(1, round(plan.flow[n].sum() / plan.attention[n][1]))
    edge, pools = Edge.of(problem, column, partner, batch), plan.pools
    only = len(plan.attention) == 1 and len(plan.ffn) == 1
    name = pools[column.pool].name
    return AttentionGroup(
        name=name if only else f"{name}-{index + 1}",
        card=pools[column.pool].card.name,
        instances=count,
        cards=column.cards,
        batch=batch,
        seconds={
            kind: float(s[0])
            for kind, s in attention_seconds(column.stage, np.array([float(batch)])).items()
        },
        seconds_per_context_token=_per_context_token(column.stage, batch),
        feeds=feeds,
        a2f_s=edge.busy_s(edge.out_bytes),
        f2a_s=edge.busy_s(edge.back_bytes),
        latency_s=edge.latency_s + edge.other_hops_s,
    )


def _colocated(plan: ColocatedPlan, problem: Problem, layers: tuple[str, ...]) -> PredictedPipeline:
    """Return local layers only; what overlaps within an instance is already in its pass."""
    in_flight = max(column.in_flight for column, _ in plan.columns)
    between = max(
        float(c.stage.attention.between_s(np.array([float(c.batch)]))[0]) for c, _ in plan.columns
    )
    groups = []
    for index, (c, count) in enumerate(plan.columns):
        each = max(c.pass_s / in_flight - between, 0.0) / problem.workload.layers
        groups.append(
            AttentionGroup(
                name=f"{problem.pools[c.pool].name}-{index + 1}",
                card=c.stage.card.name,
                instances=count,
                cards=c.cards,
                batch=max(1, c.batch * c.stage.groups * c.in_flight // in_flight),
                seconds={kind: each for kind in kinds(problem.workload)},
            )
        )
    runs = _runs(problem.workload, layers, LOCAL)
    return PredictedPipeline(in_flight, problem.context, runs, tuple(groups), (), between)


SETTLING = 8
"""Tokens after which the pipeline repeats itself; its period is that of the last of them."""


def period_s(pipeline: PredictedPipeline) -> float:
    """Return the seconds of a token as the pipeline runs, layer after layer, without jitter.

    The planner holds the sums over all layers against the target. Between two tokens embedding and
    head keep attention busy while the FFN waits, which those sums do not see.
    """
    run = simulate(_one_of_each(pipeline), Scenario(tokens=SETTLING))
    return float(run.tpot_s["p50"])


def _one_of_each(pipeline: PredictedPipeline) -> PredictedPipeline:
    """Return a pipeline of the same period: like instances do the same at the same time.

    Where a group has fewer instances than sets to serve it, these take turns, and all stay.
    """
    fed = {g.name: sum(a.instances for a in pipeline.attention if a.feeds in ("", g.name))
           for g in pipeline.ffn}  # fmt: skip
    if any(fed[group.name] < group.instances for group in pipeline.ffn):
        return replace(pipeline, attention=_fixed(pipeline.attention))
    alone = tuple(replace(group, instances=1) for group in pipeline.attention)
    sets = tuple(replace(group, instances=1) for group in pipeline.ffn)
    return replace(pipeline, attention=_fixed(alone), ffn=sets)


def _fixed(groups: tuple[AttentionGroup, ...]) -> tuple[AttentionGroup, ...]:
    """Return groups whose context does not grow while the period is taken."""
    return tuple(replace(group, seconds_per_context_token=0.0) for group in groups)
