"""Stages, the tensors they own, and the edges between them: frozen data, checked once."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal

from step3_hetero.errors import EdgeMismatch
from step3_hetero.specs import Cut, OpSpec, StageSpec, TensorSpec

Shard = Literal["replicate", "columns", "rows", "experts"]
"""How tensor or expert parallelism splits a weight.

columns: by outputs (q heads, gate and up); rows: by inputs, partial sums are added (o_proj, down);
experts: whole experts each; replicate: every rank holds it all.
"""

EdgeKind = Literal["A2F", "F2A", "residual", "image", "embedding"]


@dataclass(frozen=True, slots=True)
class Param:
    """One weight of a stage: checkpoint tensors and what the device makes of them.

    ``tensors`` maps the name the op knows a tensor by to the checkpoint's; ``spec`` is None for a
    plain array (norm scales), which is only cast. ``compressible`` weights follow the role's
    ``weights`` key; the others (router, lm_head, embeddings, vision) keep the activations' dtype,
    as the published block-FP8 checkpoint keeps them. ``cuts`` say, by the op's name of a tensor,
    what a shard holds of it; ``shapes`` are then those of the shard.
    """

    name: str
    tensors: Mapping[str, str]
    shapes: Mapping[str, tuple[int, ...]]
    spec: OpSpec | None = None
    shard: Shard = "replicate"
    compressible: bool = False
    cuts: Mapping[str, tuple[Cut, ...]] = field(default_factory=dict)

    @property
    def elements(self) -> int:
        """Return the number of weights."""
        total = 0
        for shape in self.shapes.values():
            count = 1
            for n in shape:
                count *= n
            total += count
        return total


@dataclass(frozen=True, slots=True)
class Share:
    """The experts of a layer that a shard holds: as many as its spec says from ``first`` on."""

    first: int
    total: int


@dataclass(frozen=True, slots=True)
class GraphStage:
    """One stage: its name (``attention[3]``), what it computes, what it holds, its ports.

    ``share`` is None in a stage that holds all of its layer's experts, or has none.
    """

    name: str
    layer: int | None
    spec: StageSpec
    params: tuple[Param, ...]
    takes: tuple[TensorSpec, ...]
    gives: tuple[TensorSpec, ...]
    share: Share | None = None

    @property
    def kind(self) -> str:
        """Return embed, vision, attention, ffn or head."""
        return self.spec.kind

    @property
    def elements(self) -> int:
        """Return the number of weights."""
        return sum(p.elements for p in self.params)


@dataclass(frozen=True, slots=True)
class Edge:
    """What flows from one stage to another."""

    source: str
    target: str
    kind: EdgeKind
    tensors: tuple[TensorSpec, ...]


@dataclass(frozen=True)
class StageGraph:
    """A model cut into stages, in the order in which they run."""

    name: str
    stages: tuple[GraphStage, ...]
    edges: tuple[Edge, ...]

    @cached_property
    def by_name(self) -> Mapping[str, GraphStage]:
        """Return the stages by name."""
        return {s.name: s for s in self.stages}

    def into(self, stage: str) -> Iterator[Edge]:
        """Yield the edges that end at ``stage``."""
        return (e for e in self.edges if e.target == stage)

    def groups(self) -> list[list[GraphStage]]:
        """Return runs of consecutive layers whose stages are alike, for people to read.

        Each group is the stages of one layer span with equal specs: attention[4]..attention[59]
        and their FFNs are two groups.
        """
        found: dict[tuple[StageSpec, int], list[GraphStage]] = {}
        last: dict[StageSpec, tuple[int, int]] = {}
        for stage in self.stages:
            layer = stage.layer or 0
            run, previous = last.get(stage.spec, (0, layer - 1))
            run += previous != layer - 1
            last[stage.spec] = (run, layer)
            found.setdefault((stage.spec, run), []).append(stage)
        return list(found.values())


def check_graph(graph: StageGraph) -> StageGraph:
    """Return ``graph`` when every port is fed once, by an earlier stage, with the type it takes.

    Raises:
        EdgeMismatch: naming the stages, the tensor and both types.
    """
    order = {s.name: i for i, s in enumerate(graph.stages)}
    for edge in graph.edges:
        _check_edge(graph, edge, order)
    for stage in graph.stages:
        _check_ports(stage, [t.name for e in graph.into(stage.name) for t in e.tensors])
    return graph


def _check_edge(graph: StageGraph, edge: Edge, order: Mapping[str, int]) -> None:
    for end in (edge.source, edge.target):
        if end not in order:
            raise EdgeMismatch(f"edge {edge.source} -> {edge.target}: no stage {end!r}")
    if order[edge.source] >= order[edge.target]:
        raise EdgeMismatch(f"edge {edge.source} -> {edge.target} runs backwards")
    gives = {t.name: t for t in graph.by_name[edge.source].gives}
    takes = {t.name: t for t in graph.by_name[edge.target].takes}
    for tensor in edge.tensors:
        ends = gives.get(tensor.name), tensor, takes.get(tensor.name)
        if len(set(ends)) != 1:
            raise EdgeMismatch(
                f"edge {edge.source} -> {edge.target}, tensor {tensor.name!r}: the source gives "
                f"{ends[0]}, the edge carries {ends[1]}, the target takes {ends[2]}"
            )


def _check_ports(stage: GraphStage, fed: Sequence[str]) -> None:
    for port in stage.takes:
        if fed.count(port.name) != 1:
            raise EdgeMismatch(
                f"{stage.name}: tensor {port.name!r} is fed by {fed.count(port.name)} edges, not 1"
            )
