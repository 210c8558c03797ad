"""Which stage runs on which device: resolved from the config, checked without opening anything."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from step3_hetero.backend import Backend, DeviceInfo
from step3_hetero.config import Config, stage_ranges
from step3_hetero.emulate.asked import asked_card
from step3_hetero.emulate.card import EmulatedCard
from step3_hetero.errors import PlacementError, UnsupportedOp
from step3_hetero.graph import Edge, GraphStage, Param, StageGraph
from step3_hetero.graph.sharding import role_stages
from step3_hetero.model.config import ModelConfig
from step3_hetero.registry import get_backend
from step3_hetero.runtime.blocks import blocks_for
from step3_hetero.runtime.heads import HeadsSplit, heads_split
from step3_hetero.specs import LOGICAL_BLOCK, AttentionSpec, Limits, itemsize, weight_bytes

DTYPE = {"fp32": "float32", "bf16": "bfloat16", "fp64": "float64", "fp8": "float8_e4m3fn"}
"""NumPy's names for the config's dtypes."""

KV_DTYPE = {"auto": "", "bf16": "bfloat16", "fp8": "float8_e4m3fn", "int8": "int8"}
"""A cache's dtype for ``runtime.kv_dtype``; empty is that of the activations."""

MOST_BLOCKS = (2**31 - 1) // LOGICAL_BLOCK
"""Slots are int32."""

KV_SHARE = 0.4
"""The part of the memory that weights leave which ``kv_blocks: auto`` may take."""


METHODS = {
    "int8": "codes with a float32 scale for each output row, made at load; "
    "activations are quantised for each token"
}

BLOCK_FP8 = "block float8_e4m3fn"


@dataclass(frozen=True, slots=True)
class Requantised:
    """What a role's backend makes of the checkpoint's weights at load: it holds them otherwise.

    ``to`` is the format held: INT8 as asked, or the activations' dtype where a device stores no
    FP8. ``weights`` counts the numbers in ``tensors`` of the checkpoint; ``nbytes`` are those held,
    scales included.
    """

    stored: str
    to: str
    tensors: int
    weights: int
    nbytes: int

    def to_json(self) -> dict[str, Any]:
        """Return what ``--json`` prints."""
        return {
            "stored": self.stored,
            "to": self.to,
            "tensors": self.tensors,
            "weights": self.weights,
            "bytes": self.nbytes,
            "method": METHODS.get(self.to, "decoded and rounded at load"),
        }


@dataclass(frozen=True, slots=True)
class RolePlan:
    """One role: where it runs and what it holds.

    ``weight_bytes`` are those of one process at ``weight_format``; where several share a stage,
    those of the one with the most.
    """

    name: str
    backend: Backend
    info: DeviceInfo
    index: int
    options: Mapping[str, Any]
    weight_format: str
    stages: tuple[str, ...]
    weight_bytes: int
    kv_bytes_per_block: int
    requantised: Requantised | None = None
    emulated: EmulatedCard | None = None
    instances: int = 1
    ep: int = 1
    tp: int = 1
    heads_split: HeadsSplit | None = None

    @property
    def sharers(self) -> int:
        """Return how many processes share each stage: a set of ``ep`` instances of ``tp``."""
        return self.ep * self.tp

    @property
    def memory_domain(self) -> str:
        """Return the name of the memory it lies in."""
        return self.info.memory_domain or f"{self.backend.name}:{self.index}"

    @property
    def device(self) -> tuple[str, int]:
        """Return what tells two roles on one device from two roles on two."""
        return self.info.name if self.emulated else self.backend.name, self.index

    @property
    def device_name(self) -> str:
        """Return ``cpu:0``, or which card is emulated on it."""
        return self.info.name if self.emulated else f"{self.backend.name}:{self.index}"


@dataclass(frozen=True)
class Placement:
    """Every stage's role, every role's device, and what has to cross between devices."""

    graph: StageGraph
    roles: Mapping[str, RolePlan]
    role_of: Mapping[str, str]
    limits: Limits
    kv_blocks: int

    def crossing(self) -> Iterator[Edge]:
        """Yield the edges whose ends lie on different devices."""
        for edge in self.graph.edges:
            ends = (self.roles[self.role_of[s]].device for s in (edge.source, edge.target))
            if len(set(ends)) > 1:
                yield edge

    def to_json(self) -> dict[str, Any]:
        """Return what ``--json`` prints."""
        return {
            "model": self.graph.name,
            "kv_blocks": self.kv_blocks,
            "overfull": overfull(self),
            "roles": [
                {
                    "role": r.name,
                    "backend": r.backend.name,
                    "device": r.device_name,
                    "emulated": r.emulated.asked.model_dump() if r.emulated else None,
                    "stages": stage_ranges(r.stages),
                    "instances": r.instances,
                    "ep": r.ep,
                    "tp": r.tp,
                    "weights": r.weight_format,
                    "weight_bytes": r.weight_bytes,
                    "heads_split": asdict(r.heads_split) if r.heads_split else None,
                    "requantised": r.requantised.to_json() if r.requantised else None,
                    "kv_bytes": r.kv_bytes_per_block * self.kv_blocks,
                    "memory_bytes": r.info.memory_bytes,
                }
                for r in self.roles.values()
            ],
            "crossing": [
                {
                    "kind": kind,
                    "source": source,
                    "target": target,
                    "edges": count,
                    "bytes_per_token": nbytes,
                    "members": self.members_at(source, target),
                    "sent_bytes_per_token": nbytes * self.members_at(source, target),
                }
                for (kind, source, target), (count, nbytes) in self.crossing_summary().items()
            ],
        }

    def crossing_summary(self) -> dict[tuple[str, str, str], tuple[int, int]]:
        """Return, by (kind, source role, target role), how many edges and their bytes a token."""
        found: dict[tuple[str, str, str], tuple[int, int]] = {}
        for edge in self.crossing():
            key = (edge.kind, self.role_of[edge.source], self.role_of[edge.target])
            count, nbytes = found.get(key, (0, 0))
            found[key] = (count + 1, nbytes + self.edge_bytes(edge))
        return found

    def members_at(self, source: str, target: str) -> int:
        """Return how many processes share the stages at an edge's sharded end: each carries it.

        A2F goes whole to every member of a set, and a partial sum of the whole F2A comes from each.
        Of the ranks of an attention instance the first one calls, and is answered.
        """
        ends = (self.roles[source], self.roles[target])
        return max(1 if role.heads_split else role.sharers for role in ends)

    def edge_bytes(self, edge: Edge) -> int:
        """Return the bytes of one token on an edge, as the activations' dtype has them."""
        sizes = _dimensions(self.graph)
        return sum(
            int(np.prod([sizes[d] for d in t.dims[1:]])) * itemsize(t.dtype) for t in edge.tensors
        )


def place(config: Config, model: ModelConfig, graph: StageGraph) -> Placement:
    """Resolve ``config`` over ``graph``.

    Raises:
        ConfigError: a stage is in two roles or in none, a layer is out of range.
        BackendNotFound: a role names a backend that is not installed.
        UnsupportedOp: a device cannot run a stage it was given.
    """
    role_of = config.assign([s.name for s in graph.stages])
    roles = {
        name: _role_plan(config, model, name, [s for s in graph.stages if role_of[s.name] == name])
        for name in config.roles
        if name in role_of.values()
    }
    limits = Limits(
        tokens=config.runtime.max_batch + config.runtime.prefill_chunk,
        seqs=config.runtime.max_batch,
        blocks_per_seq=blocks_for(model.text.max_positions),
    )
    placement = Placement(graph, roles, role_of, limits, _kv_blocks(config, roles, limits))
    check_emulated_memory(config, placement)
    return placement


def _role_plan(
    config: Config, model: ModelConfig, name: str, stages: Sequence[GraphStage]
) -> RolePlan:
    role = config.roles[name]
    backend = get_backend(role.backend)
    weight_format = DTYPE.get(role.weights, role.weights)
    card, info = asked_card(config, name, backend)
    try:
        last = role_stages(stages, model, role.ep * role.tp - 1, role.ep, role.tp)
        stages = role_stages(stages, model, 0, role.ep, role.tp)
    except PlacementError as cause:
        raise config.error(f"roles.{name}.{'ep' if role.ep > 1 else 'tp'}", str(cause)) from cause
    plan = RolePlan(
        name,
        backend,
        info,
        role.devices[0] if role.devices else 0,
        role.options,
        weight_format,
        tuple(s.name for s in stages),
        sum(_stage_bytes(s, weight_format) for s in stages),
        sum(_block_bytes(s) for s in stages),
        _requantised(stages, model, info, weight_format),
        card,
        role.instances,
        role.ep,
        role.tp,
        heads_split(last, role.tp, sum(_stage_bytes(s, weight_format) for s in last)),
    )
    check_supported(config, plan, stages)
    return plan


def check_supported(config: Config, role: RolePlan, stages: Sequence[GraphStage]) -> None:
    """Ask a role's backend whether its device can run every op of its stages.

    Raises:
        UnsupportedOp: naming the stage, the op and the backend's reason.
    """
    if config.runtime.batch_invariant and not role.info.batch_invariant:
        raise UnsupportedOp(
            f"{config.where('runtime.batch_invariant')}: backend {role.backend.name!r} of role "
            f"{role.name!r} is not batch-invariant; set runtime.batch_invariant: false or choose "
            "another backend"
        )
    where = config.where(f"roles.{role.name}.backend")
    for spec, stage in {s.spec: s for s in reversed(stages)}.items():
        for op in spec.ops(role.weight_format):
            refused = role.emulated.refuses(op) if role.emulated else None
            if reason := refused or role.backend.supports(role.info, op):
                raise UnsupportedOp(
                    f"{where}: roles.{role.name}: {role.backend.name} on {role.info.name} cannot "
                    f"run {stage.name}: {op}: {reason}"
                )


def _kv_blocks(config: Config, roles: Mapping[str, RolePlan], limits: Limits) -> int:
    """Return the logical blocks of every attention layer: as asked, or as memory allows."""
    wanted = config.runtime.kv_blocks
    if wanted != "auto":
        if int(wanted) > MOST_BLOCKS:
            raise config.error("runtime.kv_blocks", f"{wanted} refused; allowed: to {MOST_BLOCKS}")
        return int(wanted)
    most = limits.seqs * limits.blocks_per_seq
    for shared in _domains(roles):
        per_block = sum(r.kv_bytes_per_block for r in shared)
        left = shared[0].info.memory_bytes - sum(r.weight_bytes for r in shared)
        if per_block:
            most = min(most, int(max(left, 0) * KV_SHARE) // per_block)
    return max(most, 1)


def _domains(roles: Mapping[str, RolePlan]) -> list[list[RolePlan]]:
    """Return the roles that share one memory, memory by memory."""
    found: dict[str, list[RolePlan]] = {}
    for role in roles.values():
        found.setdefault(role.memory_domain, []).append(role)
    return list(found.values())


def overfull(placement: Placement) -> list[str]:
    """Say of each memory that cannot hold what is placed in it what is asked and what is there."""
    return [said for _, said in _overfull(placement)]


def _overfull(placement: Placement) -> Iterator[tuple[RolePlan, str]]:
    """Yield the first role of each such memory, and what is said of it."""
    for shared in _domains(placement.roles):
        weights = sum(r.weight_bytes for r in shared)
        kv = sum(r.kv_bytes_per_block for r in shared) * placement.kv_blocks
        there = shared[0].info.memory_bytes
        if weights + kv > there:
            names = ", ".join(r.name for r in shared)
            yield (
                shared[0],
                f"roles {names} on {shared[0].info.name}: {weights:,} bytes of weights and {kv:,} "
                f"of KV cache ({placement.kv_blocks} blocks) into {there:,} bytes",
            )


def check_memory(config: Config, placement: Placement) -> None:
    """Refuse a placement that some memory cannot hold.

    Raises:
        PlacementError: naming the roles, the bytes asked and the bytes there are.
    """
    for role, said in _overfull(placement):
        asked = config.runtime.kv_blocks != "auto"
        where = config.where("runtime.kv_blocks" if asked else "roles")
        todo = "lower runtime.kv_blocks or spread the stages" if asked else "spread the stages"
        if role.emulated:
            where = config.where(f"roles.{role.name}.emulate")
            todo = f"raise roles.{role.name}.emulate.memory, {todo}"
        raise PlacementError(f"{where}: does not fit: {said}; {todo} over more devices")


def check_emulated_memory(config: Config, placement: Placement) -> None:
    """Refuse what an emulated card cannot hold; of other memory here, this machine may be no judge.

    Raises:
        PlacementError: as ``check_memory``.
    """
    roles = {name: role for name, role in placement.roles.items() if role.emulated}
    check_memory(config, replace(placement, roles=roles))


def _stage_bytes(stage: GraphStage, weight_format: str) -> int:
    """Return the bytes of a stage's weights, scales included; the router is held in float32."""
    total = 0
    for param in stage.params:
        follows = param.compressible and weight_format != "auto"
        dtype = weight_format if follows else stage.spec.dtype
        if param.name == "router" and param.spec is not None:
            dtype = str(param.spec.parameters["out_dtype"])
        total += weight_bytes(param.elements, _rows(param), dtype)
    return total


def _rows(param: Param) -> int:
    """Return the output rows of a param's matrices: each has a scale of its own."""
    return sum(math.prod(shape[:-1]) for shape in param.shapes.values())


def _requantised(
    stages: Sequence[GraphStage], model: ModelConfig, info: DeviceInfo, weight_format: str
) -> Requantised | None:
    """Return what is held in another format than the checkpoint's, beyond a change of dtype."""
    params = [p for s in stages for p in s.params if p.compressible]
    decoded = model.fp8_blocks and "float8_e4m3fn" not in info.dtypes.stored
    if not params or not (weight_format == "int8" or decoded):
        return None
    held = stages[0].spec.dtype if weight_format == "auto" else weight_format
    weights = sum(p.elements for p in params)
    return Requantised(
        BLOCK_FP8 if model.fp8_blocks else model.dtype,
        held,
        sum(len(p.tensors) for p in params),
        weights,
        weight_bytes(weights, sum(map(_rows, params)), held),
    )


def _block_bytes(stage: GraphStage) -> int:
    spec = stage.spec
    if not isinstance(spec, AttentionSpec):
        return 0
    return spec.cache(1).nbytes


def _dimensions(graph: StageGraph) -> dict[str, int]:
    """Return the sizes of an edge's named dimensions."""
    sizes = {"hidden": graph.by_name["head"].spec.hidden}
    for stage in graph.stages:
        if isinstance(stage.spec, AttentionSpec) and stage.spec.router:
            sizes["top_k"] = stage.spec.router.top_k
    return sizes
