"""The pipeline of attention and FFN in processes of their own, predicted from measured profiles.

What `profile_predict` sums up for one process overlaps here: several micro-batches are under way,
and `simulate` says how long a token takes. An edge is priced by the measured link: a message's
latency, and its bytes at the link's pace. Where host cores carry the bytes (``on_cores``), sending
and taking keep attention and FFN from computing meanwhile.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby

from step3_hetero.errors import PlacementError
from step3_hetero.graph import GraphStage, StageGraph
from step3_hetero.placement.pipeline import (
    LOCAL,
    REMOTE,
    AttentionGroup,
    FfnGroup,
    LayerRun,
    PredictedPipeline,
)
from step3_hetero.placement.profile_file import Links, Profile
from step3_hetero.placement.profile_predict import at, stage_seconds
from step3_hetero.placement.simulate import Scenario, simulate
from step3_hetero.runtime.placing import Placement

SETTLED = 16
"""Tokens after which a pipeline without jitter has long found its pace."""


def apart_tokens_per_s(pipeline: PredictedPipeline) -> float:
    """Return the decoded tokens per second of a pipeline at its own context."""
    result = simulate(pipeline, Scenario(tokens=SETTLED))
    share = sum(group.batch * group.instances for group in pipeline.attention)
    return pipeline.micro_batches * share / result.tpot_s["p50"]


def apart_pipeline(
    placement: Placement,
    profiles: Mapping[str, Profile],
    links: Links,
    batch: int,
    context: int,
    microbatches: int,
    *,
    on_cores: bool,
) -> PredictedPipeline:
    """Return the pipeline of one attention and one FFN instance that share ``batch`` sequences.

    ``profiles`` are by role, each measured on the cores that the role has. The activations travel
    as they are computed.

    Raises:
        PlacementError: the placement keeps every FFN with attention, or has it on several roles; a
            stage or the link was not measured.
    """
    share = -(-batch // microbatches)
    lead, away = _roles(placement)
    message_s, out_s, back_s = _edges(placement, links, share)
    carried = (out_s + back_s) if on_cores else 0.0
    attention: dict[str, float] = {}
    ffn: dict[str, float] = {}
    kinds = []
    for first, second in _layers(placement.graph.stages):
        role = placement.role_of[second.name]
        kind = f"{first.spec!r} {second.spec!r} {role}"
        own = stage_seconds(profiles[lead], first, share, context)
        other = stage_seconds(profiles[role], second, share, context)
        kinds.append((kind, LOCAL if role == lead else REMOTE))
        attention[kind] = own + (other if role == lead else carried)
        if role != lead:
            ffn[kind] = other + carried
    group = AttentionGroup(
        lead, lead, 1, 1, share, attention, feeds=away,
        a2f_s=0.0 if on_cores else out_s, f2a_s=0.0 if on_cores else back_s, latency_s=message_s,
    )  # fmt: skip
    return PredictedPipeline(
        microbatches,
        context,
        tuple(LayerRun(len(list(run)), kind, where) for (kind, where), run in groupby(kinds)),
        (group,),
        (FfnGroup(away, away, 1, 1, ffn),),
        _between(placement.graph, profiles[lead], share, context),
    )


def _roles(placement: Placement) -> tuple[str, str]:
    """Return the role that leads and the one that has FFNs away from it."""
    lead = placement.role_of["embed"]
    ffns = (s.name for s in placement.graph.stages if s.kind == "ffn")
    away = sorted({placement.role_of[name] for name in ffns} - {lead})
    if len(away) != 1:
        found = ", ".join(away) or "none"
        raise PlacementError(f"expected one role with FFNs away from {lead!r}, found {found}")
    return lead, away[0]


def _layers(stages: Sequence[GraphStage]) -> Iterator[tuple[GraphStage, GraphStage]]:
    """Yield the two halves of each layer."""
    halves = [[s for s in stages if s.kind == kind] for kind in ("attention", "ffn")]
    yield from zip(*halves, strict=True)


def _between(graph: StageGraph, profile: Profile, rows: int, context: int) -> float:
    """Return the seconds of what comes between two tokens: head, choice, engine, embedding."""
    ends = (stage_seconds(profile, graph.by_name[n], rows, context) for n in ("head", "embed"))
    return sum(ends) + at(profile.choose, rows, 1) + at(profile.step_s, rows, 1)


def _edges(placement: Placement, links: Links, rows: int) -> tuple[float, float, float]:
    """Return a message's latency, and the seconds that the link takes for A2F and for F2A."""
    if links.bytes_per_s is None or links.message_s is None:
        raise PlacementError(
            f"links {links.bytes_per_s} B/s, {links.message_s} s a message: not measured; give "
            "both, as step3-hetero profile writes them"
        )
    role_of, widest = placement.role_of, {"A2F": 0, "F2A": 0}
    for edge in placement.graph.edges:
        if edge.kind in widest and role_of[edge.source] != role_of[edge.target]:
            widest[edge.kind] = max(widest[edge.kind], placement.edge_bytes(edge))
    out_s, back_s = (rows * nbytes / links.bytes_per_s for nbytes in widest.values())
    return links.message_s, out_s, back_s
