"""How a stage is split over processes: a pure function from a stage to the shard of one of them.

A shard is an ordinary stage with fewer experts and a narrower FFN, or with fewer heads. The outputs
of all shards of an FFN, and of the output projections of attention, add up to the whole's own.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from step3_hetero.errors import PlacementError
from step3_hetero.graph.graph import GraphStage, Param, Share
from step3_hetero.model.config import ModelConfig
from step3_hetero.specs import FP8_BLOCK, AttentionSpec, Cut, FfnSpec


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


def role_stages(
    stages: Sequence[GraphStage], model: ModelConfig, number: int, ep: int, tp: int
) -> list[GraphStage]:
    """Return what process ``number`` of a role holds of the role's stages.

    Of a role with attention every process of an instance holds some of the heads. Its first, rank
    0, leads the others and holds every other stage whole. In other roles each process holds a share
    of each stage: see ``process_stage``.

    Raises:
        PlacementError: a stage cannot be split so far.
    """
    if not any(isinstance(s.spec, AttentionSpec) for s in stages):
        return [process_stage(s, model, number, ep, tp) for s in stages]
    unit, rank = _unit(model), number % tp
    held = [s for s in stages if rank == 0 or isinstance(s.spec, AttentionSpec)]
    return [attention_rank(s, rank, tp, unit) for s in held]


def process_stage(
    stage: GraphStage, model: ModelConfig, number: int, ep: int, tp: int
) -> GraphStage:
    """Return what process ``number`` of a role holds of a stage of ``model``.

    An instance is ``tp`` processes, a set ``ep`` instances, one after the other. The first process
    of a set holds the most, the last one the least.

    Raises:
        PlacementError: the stage cannot be split so far.
    """
    unit = _unit(model)
    instance, rank = divmod(number, tp)
    return rank_stage(member_stage(stage, instance % ep, ep, unit), rank, tp, unit)


def _unit(model: ModelConfig) -> int:
    """Return of how many rows, or columns, a cut of a linear map holds a multiple."""
    return FP8_BLOCK if model.fp8_blocks else 1


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


def attention_rank(stage: GraphStage, rank: int, tp: int, unit: int = 1) -> GraphStage:
    """Return what rank ``rank`` of an attention instance of ``tp`` holds of a stage.

    Every rank has ``heads / tp`` query heads, their outputs of ``wq`` and their inputs of
    ``o_proj``, and the KV heads that these read: some of them, or one that ranks share. The
    low-rank query, all norms and the router are whole on each. Other stages stay whole.

    Raises:
        PlacementError: the heads cannot be split so, or a cut would part a block scale.
    """
    spec = stage.spec
    if tp == 1 or not isinstance(spec, AttentionSpec):
        return stage
    _whole_heads(stage, spec, tp, unit)
    first, last = run_of(rank, tp, spec.heads)
    group = spec.heads // spec.kv_heads
    first_kv, last_kv = first // group, -(-last // group)
    query, key = (
        (a * spec.head_dim, b * spec.head_dim) for a, b in ((first, last), (first_kv, last_kv))
    )
    cuts = {
        "qkv": {"k_proj": Cut(-2, *key), "v_proj": Cut(-2, *key)},
        "wq": {"wq": Cut(-2, *query)},
        "o_proj": {"o_proj": Cut(-1, *query)},
    }
    params = tuple(_cut(p, cuts.get(p.name, {})) for p in stage.params)
    fewer = replace(spec, heads=last - first, kv_heads=last_kv - first_kv)
    return replace(stage, spec=fewer, params=params)


def _whole_heads(stage: GraphStage, spec: AttentionSpec, tp: int, unit: int) -> None:
    """Refuse a degree that parts a head, or the columns of one block scale."""
    splits = [n for n in range(1, spec.heads + 1) if _splits(spec, n, unit)]
    if tp not in splits:
        blocks = f", cut at multiples of {unit} columns" if unit > 1 else ""
        raise PlacementError(
            f"{tp} refused: {stage.name} has {spec.heads} query and {spec.kv_heads} KV heads of "
            f"{spec.head_dim}{blocks}; allowed: {', '.join(map(str, splits))}"
        )


def _splits(spec: AttentionSpec, tp: int, unit: int) -> bool:
    """Say whether every one of ``tp`` ranks gets whole heads, and whole blocks of their columns."""
    cuts = [(spec.heads, tp), (spec.kv_heads, min(tp, spec.kv_heads))]
    if any(heads % ways for heads, ways in cuts) or tp % cuts[1][1]:
        return False
    return all(ways == 1 or heads // ways * spec.head_dim % unit == 0 for heads, ways in cuts)


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
