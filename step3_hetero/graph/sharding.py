"""How a stage is split over processes: a pure function from a stage to the shard of one of them.

A shard is an ordinary stage with fewer experts and a narrower FFN. The outputs of all shards add
up to the stage's own.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from step3_hetero.errors import PlacementError
from step3_hetero.graph.graph import GraphStage, Param, Share
from step3_hetero.model.config import ModelConfig
from step3_hetero.specs import FP8_BLOCK, Cut, FfnSpec


def run_of(number: int, ways: int, size: int, unit: int = 1) -> tuple[int, int]:
    """Return where run ``number`` of ``ways`` begins and ends if ``size`` things are dealt out.

    Runs end at multiples of ``unit``, the last one at ``size``; of unequal ones the first are the
    larger.

    >>> [run_of(n, 3, 8) for n in range(3)]
    [(0, 3), (3, 6), (6, 8)]
    >>> [run_of(n, 2, 320, 128) for n in range(2)]
    [(0, 256), (256, 320)]
    """
    least, rest = divmod(-(-size // unit), ways)
    start, stop = (n * least + min(n, rest) for n in (number, number + 1))
    return min(start * unit, size), min(stop * unit, size)


def process_stage(
    stage: GraphStage, model: ModelConfig, number: int, ep: int, tp: int
) -> GraphStage:
    """Return what process ``number`` of a role holds of a stage of ``model``.

    An instance is ``tp`` processes, a set ``ep`` instances, one after the other. The first process
    of a set holds the most, the last one the least.

    Raises:
        PlacementError: the stage cannot be split so far.
    """
    unit = FP8_BLOCK if model.fp8_blocks else 1
    instance, rank = divmod(number, tp)
    return rank_stage(member_stage(stage, instance % ep, ep, unit), rank, tp, unit)


def member_stage(stage: GraphStage, member: int, ep: int, unit: int = 1) -> GraphStage:
    """Return what member ``member`` of a set of ``ep`` instances holds of a stage.

    The experts are dealt out whole, the dense and the shared FFN by columns: the outputs of gate
    and up, the inputs of down. Bounds of columns are multiples of ``unit``: a block-FP8 checkpoint
    has one scale for 128 of them. Stages other than FFN stay whole. INT8 codes are made of the
    shard: a row of down then has a scale for each member.

    Raises:
        PlacementError: there are fewer experts, or pieces of ``unit`` columns, than members.
    """
    spec = stage.spec
    if ep == 1 or not isinstance(spec, FfnSpec):
        return stage
    if not spec.experts:
        return _narrower(stage, spec, "inter", member, ep, unit)
    _enough(stage, spec.experts, "experts", ep)
    first, last = run_of(member, ep, spec.experts)
    params = tuple(
        _cut(p, {key: Cut(-3, first, last) for key in p.shapes}) if p.shard == "experts" else p
        for p in stage.params
    )
    own = replace(stage, params=params, share=Share(first, spec.experts))
    fewer = replace(spec, experts=last - first)
    return _narrower(own, fewer, "shared_inter", member, ep, unit)


def rank_stage(stage: GraphStage, rank: int, tp: int, unit: int = 1) -> GraphStage:
    """Return what rank ``rank`` of an instance of ``tp`` holds of what the instance holds.

    Every FFN is split by columns, those of the experts too; bounds as in ``member_stage``.

    Raises:
        PlacementError: there are fewer pieces of ``unit`` columns than ranks.
    """
    spec = stage.spec
    if tp == 1 or not isinstance(spec, FfnSpec):
        return stage
    narrow = _narrower(stage, spec, "inter", rank, tp, unit)
    if not isinstance(narrow.spec, FfnSpec) or not spec.experts:
        return narrow
    return _narrower(narrow, narrow.spec, "shared_inter", rank, tp, unit)


def _narrower(
    stage: GraphStage, spec: FfnSpec, width: str, number: int, ways: int, unit: int
) -> GraphStage:
    """Return run ``number`` of ``ways`` of the columns that ``spec`` counts as ``width``.

    ``inter`` is the experts' width where there are any, else that of the one FFN.
    """
    columns = spec.shared_inter if width == "shared_inter" else spec.inter
    _enough(stage, -(-columns // unit), f"pieces of {unit} columns", ways)
    start, stop = run_of(number, ways, columns, unit)
    shards = {"experts"} if spec.experts and width == "inter" else {"columns", "rows"}
    params = tuple(
        _cut(p, {key: Cut(_axis(p, key), start, stop) for key in p.shapes})
        if p.shard in shards
        else p
        for p in stage.params
    )
    inter, shared = spec.inter, spec.shared_inter
    if width == "inter":
        inter = stop - start
    else:
        shared = stop - start
    return replace(stage, spec=replace(spec, inter=inter, shared_inter=shared), params=params)


def _axis(param: Param, key: str) -> int:
    """Return the axis of an FFN's columns: rows of gate and up, columns of down."""
    return -1 if param.shard == "rows" or key == "down" else -2


def _enough(stage: GraphStage, count: int, what: str, ways: int) -> None:
    if count < ways:
        raise PlacementError(
            f"{ways} refused: {stage.name} has {count} {what} to split; allowed: to {count}"
        )


def _cut(param: Param, cuts: Mapping[str, Cut]) -> Param:
    """Return a weight whose tensors are cut once more, each by its name."""
    shapes = dict(param.shapes)
    for key, cut in cuts.items():
        at = len(shapes[key]) + cut.axis
        shapes[key] = (*shapes[key][:at], cut.stop - cut.start, *shapes[key][at + 1 :])
    made = {**param.cuts, **{k: (*param.cuts.get(k, ()), cut) for k, cut in cuts.items()}}
    return replace(param, shapes=shapes, cuts=made)
