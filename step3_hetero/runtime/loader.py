"""From checkpoint to devices: prepare each stage's weights, reserve its cache, build its code."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from step3_hetero.backend import Array, Device, KVCache, Reduce, Weights
from step3_hetero.errors import PlacementError
from step3_hetero.graph import GraphStage, Param, StageGraph
from step3_hetero.runtime.executor import LoadedStage
from step3_hetero.specs import AttentionSpec, Limits, TensorSource

OnStage = Callable[[str], None]
"""Called with a stage's name once it is loaded."""


def load_stages(
    graph: StageGraph,
    devices: Mapping[str, tuple[str, Device, str]],
    source: TensorSource,
    limits: Limits,
    kv_blocks: int,
    on_stage: OnStage | None = None,
    reduce: Reduce | None = None,
) -> tuple[dict[str, LoadedStage], list[KVCache]]:
    """Load the stages of ``graph`` that have a device here.

    ``devices`` gives, by stage, the role's name, the device and the weight format. ``reduce`` adds
    up what the ranks of an attention instance make of their heads.

    Raises:
        CheckpointError: a weight is not finite.
        UnsupportedOp: a device has no form for a weight.
        PlacementError: a device has no room for a stage's weights or cache.
    """
    loaded: dict[str, LoadedStage] = {}
    caches: list[KVCache] = []
    for node in graph.stages:
        if node.name not in devices:
            continue
        role, device, weight_format = devices[node.name]
        try:
            weights = stage_weights(device, node, source, weight_format)
            cache = open_cache(device, node, kv_blocks)
        except PlacementError as full:
            raise PlacementError(f"role {role}, stage {node.name}: {full}") from full
        caches += [cache] if cache else []
        split = {"reduce": reduce} if reduce is not None and node.kind == "attention" else {}
        stage = device.build(node.spec, weights, cache, limits, **split)
        loaded[node.name] = LoadedStage(node, stage, device, role, cache)
        if on_stage is not None:
            on_stage(node.name)
    return loaded, caches


def stage_weights(
    device: Device, node: GraphStage, source: TensorSource, weight_format: str
) -> dict[str, Weights | Array]:
    """Return a stage's weights by name, as its device wants them."""
    return {p.name: _prepare(device, node, p, source, weight_format) for p in node.params}


def _prepare(
    device: Device, node: GraphStage, param: Param, source: TensorSource, weight_format: str
) -> Weights | Any:
    tensors = {
        key: source.tensor(name, param.cuts.get(key, ())) for key, name in param.tensors.items()
    }
    if param.spec is None:
        return device.from_host(tensors["value"].data, node.spec.dtype)
    held = weight_format if param.compressible else "auto"
    return device.prepare(param.spec.op, tensors, replace(param.spec, weight_format=held))


def open_cache(device: Device, node: GraphStage, kv_blocks: int) -> KVCache | None:
    """Reserve the cache of an attention stage; other stages have none."""
    spec = node.spec
    if not isinstance(spec, AttentionSpec):
        return None
    return device.open_cache(spec.cache(kv_blocks))
