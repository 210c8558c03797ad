"""How a stage is split over processes: a pure function from a stage to the shard of one of them.

A shard is an ordinary stage with fewer experts and a narrower FFN. The outputs of all shards add
up to the stage's own.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from step3_hetero.errors import PlacementError
from step3_hetero.graph.graph import GraphStage, Param, Shard, Share
from step3_hetero.specs import Cut, FfnSpec


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
    columns = spec.shared_inter if spec.experts else spec.inter
    pieces = {"experts": spec.experts or ep, f"pieces of {unit} FFN columns": -(-columns // unit)}
    for what, count in pieces.items():
        if count < ep:
            said = f"{ep} refused: {stage.name} has {count} {what}"
            raise PlacementError(f"{said}; allowed: to {count}")
    start, stop = run_of(member, ep, columns, unit)
    cuts: dict[Shard, tuple[int, tuple[int, int]]] = {
        "columns": (-2, (start, stop)),
        "rows": (-1, (start, stop)),
    }
    if not spec.experts:
        params = tuple(_cut(p, cuts) for p in stage.params)
        return replace(stage, spec=replace(spec, inter=stop - start), params=params)
    first, last = run_of(member, ep, spec.experts)
    cuts["experts"] = (-3, (first, last))
    params = tuple(_cut(p, cuts) for p in stage.params)
    own = replace(spec, experts=last - first, shared_inter=stop - start)
    return replace(stage, spec=own, params=params, share=Share(first, spec.experts))


def _cut(param: Param, cuts: Mapping[Shard, tuple[int, tuple[int, int]]]) -> Param:
    """Return a weight cut as its ``shard`` says."""
    if param.shard not in cuts:
        return param
    axis, (start, stop) = cuts[param.shard]
    shapes = {}
    for key, shape in param.shapes.items():
        at = len(shape) + axis
        shapes[key] = (*shape[:at], stop - start, *shape[at + 1 :])
    cut = dict.fromkeys(shapes, (Cut(axis, start, stop),))
    return replace(param, shapes=shapes, cuts=cut)
