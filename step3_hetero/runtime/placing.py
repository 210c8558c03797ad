"""Which stage runs on which device: resolved from the config, checked without opening anything."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from step3_hetero.backend import Backend, DeviceInfo
from step3_hetero.config import Config, stage_ranges
from step3_hetero.emulate.asked import asked_card
from step3_hetero.emulate.card import EmulatedCard
from step3_hetero.errors import PlacementError, UnsupportedOp
from step3_hetero.graph import Edge, GraphStage, StageGraph
from step3_hetero.graph.sharding import role_stages
from step3_hetero.model.config import ModelConfig
from step3_hetero.registry import get_backend
from step3_hetero.runtime.apart import Apart, token_bytes
from step3_hetero.runtime.blocks import blocks_for
from step3_hetero.runtime.heads import HeadsSplit, heads_split
from step3_hetero.runtime.held import Requantised, requantised, stage_bytes
from step3_hetero.specs import LOGICAL_BLOCK, AttentionSpec, Limits

DTYPE = {"fp32": "float32", "bf16": "bfloat16", "fp64": "float64", "fp8": "float8_e4m3fn"}
"""NumPy's names for the config's dtypes."""

KV_DTYPE = {"auto": "", "bf16": "bfloat16", "fp8": "float8_e4m3fn", "int8": "int8"}
"""A cache's dtype for ``runtime.kv_dtype``; empty is that of the activations."""

MOST_BLOCKS = (2**31 - 1) // LOGICAL_BLOCK
"""Slots are int32."""

KV_SHARE = 0.4
"""The part of the memory that weights leave which ``kv_blocks: auto`` may take."""


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
    """Every stage's role, every role's device, and what has to cross between them.

    ``apart`` is None where all roles are in one process.
    """

    graph: StageGraph
    roles: Mapping[str, RolePlan]
    role_of: Mapping[str, str]
    limits: Limits
    kv_blocks: int
    apart: Apart | None = None

    def crossing(self) -> Iterator[Edge]:
        """Yield the edges whose ends lie in different processes, or on different devices of one."""
        for edge in self.graph.edges:
            roles = (self.roles[self.role_of[s]] for s in (edge.source, edge.target))
            ends = {r.device if self.apart is None else r.name for r in roles}
            if len(ends) > 1:
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
            "transport": self.apart.transport if self.apart else None,
            "crossing": [
                {
                    "kind": kind,
                    "source": source,
                    "target": target,
                    "edges": count,
                    "dtype": self.edge_dtype(kind),
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
        """Return the bytes of one token on an edge, as it travels."""
        wire = self.apart.wires.get(edge.kind, "") if self.apart else ""
        return token_bytes(edge.tensors, _dimensions(self.graph), wire)

    def edge_dtype(self, kind: str) -> str:
        """Return the config's name of the dtype in which hidden states cross on a kind of edge."""
        own = self.graph.by_name["head"].spec.dtype
        dtype = (self.apart.wires.get(kind, "") if self.apart else "") or own
        return next((said for said, name in DTYPE.items() if name == dtype), dtype)


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
    blocks = _kv_blocks(config, roles, limits)
    placement = Placement(graph, roles, role_of, limits, blocks, Apart.of(config))
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
        sum(stage_bytes(s, weight_format) for s in stages),
        sum(_block_bytes(s) for s in stages),
        requantised(stages, model, info, weight_format),
        card,
        role.instances,
        role.ep,
        role.tp,
        heads_split(last, role.tp, sum(stage_bytes(s, weight_format) for s in last)),
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
