"""Holding a plan's config against the catalogue: what one card holds, and what crosses the edges.

A plan may ask for what this build cannot run yet: tensor parallelism, quantised weights, backends
that are not installed. Its cards are known all the same, so that memory, dtypes and edges can be
held against them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from step3_hetero.config import Config, stage_ranges
from step3_hetero.config.schema import Role
from step3_hetero.errors import ConfigError, PlacementError, UnsupportedOp
from step3_hetero.model.config import ModelConfig
from step3_hetero.placement.catalogue import Card, Catalogue
from step3_hetero.placement.network import a2f_bytes
from step3_hetero.placement.performance import KEPT_PRECISION, MEMORY_SHARE, kv_shards
from step3_hetero.placement.workload import ELEMENT_BYTES, Part, Workload, step3_workload
from step3_hetero.registry import backend_names
from step3_hetero.runtime.resolving import model_config, resolve, stage_graph


@dataclass(frozen=True, slots=True)
class PlannedRole:
    """One role on its card; bytes are those of one card."""

    name: str
    role: Role
    card: Card
    stages: tuple[str, ...]
    weight_bytes: float
    kv_bytes: float

    def to_json(self) -> dict[str, Any]:
        """Return what ``check --json`` prints of it."""
        return {
            "role": self.name,
            "backend": self.role.backend,
            "device": self.card.name,
            "instances": self.role.instances,
            "tp": self.role.tp,
            "ep": self.role.ep,
            "stages": stage_ranges(self.stages),
            "weights": self.role.weights,
            "weight_bytes": round(self.weight_bytes),
            "kv_bytes": round(self.kv_bytes),
            "memory_bytes": self.card.memory_bytes,
        }


def only_planned(config: Config) -> list[str]:
    """Return why this build cannot run a plan: keys, backends, ops or formats that it lacks."""
    said = [problem.message for problem in config.unready()]
    installed = backend_names()
    for name, role in config.roles.items():
        if role.backend not in installed:
            known = ", ".join(installed)
            said.append(f"roles.{name}.backend: no backend {role.backend!r}; installed: {known}")
    if config.predicted is None:
        return []
    return said or _unsupported(config)


def _unsupported(config: Config) -> list[str]:
    """Return what a backend refuses of a plan: a format of weights or cache that it lacks."""
    try:
        resolve(config)
    except UnsupportedOp as refused:
        return [str(refused)]
    return []


def check_plan(config: Config, catalogue: Catalogue | None = None) -> dict[str, Any]:
    """Return what a plan puts where, in the form of ``check --json``.

    Raises:
        ConfigError: a role has no card, an unknown one, or a degree or dtype that cannot be.
        PlacementError: one card cannot hold what is placed on it.
    """
    model = model_config(config)
    graph, work = stage_graph(config, model), step3_workload(model)
    cards = catalogue or Catalogue.read()
    role_of = config.assign([stage.name for stage in graph.stages])
    roles = {}
    for name, role in config.roles.items():
        stages = tuple(stage.name for stage in graph.stages if role_of[stage.name] == name)
        card = _card(config, name, role, cards)
        _check_degrees(config, name, role, card, model)
        weights = _weight_bytes(work, model, role, stages)
        roles[name] = PlannedRole(
            name, role, card, stages, weights, _kv_bytes(config, work, role, stages)
        )
        _check_memory(config, roles[name])
    crossing = list(_crossing(config, roles, role_of, work, model))
    return {
        "model": graph.name,
        "kv_blocks": None,
        "overfull": [],
        "roles": [role.to_json() for role in roles.values()],
        "crossing": crossing,
        "not_run_yet": only_planned(config),
    }


def _card(config: Config, name: str, role: Role, catalogue: Catalogue) -> Card:
    key = f"roles.{name}.card"
    if role.card is None:
        raise config.error(key, "is needed in a plan: the catalogue's name of the card")
    try:
        card = catalogue.card(role.card)
    except PlacementError as cause:
        raise config.error(key, str(cause)) from cause
    if role.weights != "auto" and role.weights not in (*card.flops_per_s, "fp32"):
        allowed = ", ".join(sorted(card.flops_per_s))
        raise config.error(
            f"roles.{name}.weights",
            f"{role.weights!r} on {card.name}: no such arithmetic; allowed: {allowed}",
        )
    return card


def _check_degrees(config: Config, name: str, role: Role, card: Card, model: ModelConfig) -> None:
    """Refuse groups of cards that no server holds, and sets that do not come out even."""
    if role.tp > card.server.cards:
        raise config.error(
            f"roles.{name}.tp", f"{role.tp}: a server holds {card.server.cards} {card.name}"
        )
    experts = model.text.moe_num_experts
    if experts % role.ep:
        raise config.error(f"roles.{name}.ep", f"{role.ep} does not divide {experts} experts")
    if role.instances % role.ep:
        raise config.error(
            f"roles.{name}.instances", f"{role.instances} is no multiple of ep, which is {role.ep}"
        )


def _parts(work: Workload, model: ModelConfig, stages: tuple[str, ...]) -> Iterator[Part]:
    """Yield what each stage is, as the planner counts it."""
    by_name = {part.name: part for part in work.parts}
    for stage in stages:
        kind, _, layer = stage.rstrip("]").partition("[")
        if not layer:
            if kind in by_name:
                yield by_name[kind]
            continue
        half = "moe" if model.text.is_moe(int(layer)) else "dense"
        yield by_name.get(f"{kind}-{half}") or by_name[kind]


def _weight_bytes(work: Workload, model: ModelConfig, role: Role, stages: tuple[str, ...]) -> float:
    """Return the bytes of weights on one card.

    Attention, embedding and head are split over ``tp``, experts over ``tp`` x ``ep``; so are the
    dense and the shared FFN, unless the role has its own attention: then each group has them whole.
    """
    each = ELEMENT_BYTES[KEPT_PRECISION if role.weights == "auto" else role.weights]
    alone = not any(stage.startswith("attention") for stage in stages)
    total = 0.0
    for part in _parts(work, model, stages):
        routed = part.experts * part.expert_elements
        kept = part.stage in ("embed", "head")
        size = ELEMENT_BYTES[KEPT_PRECISION] if kept else each
        ways = role.tp * role.ep if part.stage == "ffn" and alone else role.tp
        total += size * ((part.weight_elements - routed) / ways + routed / (role.tp * role.ep))
    return total


def _kv_bytes(config: Config, work: Workload, role: Role, stages: tuple[str, ...]) -> float:
    """Return the bytes of KV on one card: all sequences of an instance at the planned context."""
    context = (config.predicted or {}).get("context")
    layers = sum(stage.startswith("attention[") for stage in stages)
    if not layers or not isinstance(context, int):
        return 0.0
    dtype = config.runtime.kv_dtype
    each = ELEMENT_BYTES[KEPT_PRECISION if dtype == "auto" else dtype]
    core = work.of("attention")[0].core
    assert core is not None, "attention has a core"
    held = core.held_bytes(context, each) / kv_shards(core, role.tp)
    return layers * held * config.runtime.max_batch


def _check_memory(config: Config, planned: PlannedRole) -> None:
    need, card = planned.weight_bytes + planned.kv_bytes, planned.card
    have = card.memory_bytes * MEMORY_SHARE
    if need > have:
        key = f"roles.{planned.name}.card"
        raise PlacementError(
            f"{config.where(key)}: {key}: does not fit: {planned.weight_bytes / 1e9:.1f} GB of "
            f"weights and {planned.kv_bytes / 1e9:.1f} GB of KV on one {card.name}, which offers "
            f"{have / 1e9:.1f} GB ({MEMORY_SHARE:.0%}); more tp or ep, or a smaller max_batch"
        )


def _crossing(
    config: Config,
    roles: Mapping[str, PlannedRole],
    role_of: Mapping[str, str],
    work: Workload,
    model: ModelConfig,
) -> Iterator[dict[str, Any]]:
    """Yield the edges between attention and FFN of two roles, by direction, with their dtype."""
    found: dict[tuple[str, str], int] = {}
    for layer in range(model.text.num_hidden_layers):
        ends = role_of[f"attention[{layer}]"], role_of[f"ffn[{layer}]"]
        if ends[0] != ends[1]:
            found[ends] = found.get(ends, 0) + 1
    for (a, f), edges in found.items():
        for kind, key, source, target in (
            ("a2f", "a2f_dtype", a, f), ("f2a", "f2a_dtype", f, a)
        ):  # fmt: skip
            dtype = getattr(config.transport, key)
            dtype = KEPT_PRECISION if dtype == "auto" else dtype
            _check_wire(config, key, dtype, roles[source].card, roles[target].card)
            members = roles[f].role.ep * roles[f].role.tp  # a set: each gets, and gives, all rows
            row = a2f_bytes(work, dtype) if kind == "a2f" else work.hidden * ELEMENT_BYTES[dtype]
            yield {
                "kind": kind, "source": source, "target": target, "edges": edges,
                "dtype": dtype, "bytes_per_token": round(row * edges), "members": members,
                "sent_bytes_per_token": round(row * edges) * members,
                "slowest_hop": _slowest_hop(config, roles[a].card, roles[f].card),
            }  # fmt: skip


def _slowest_hop(config: Config, a: Card, f: Card) -> str | None:
    """Return what a plan says binds its edge between two cards; None: it says nothing of it."""
    found = (config.predicted or {}).get("edges")
    for edge in found if isinstance(found, list) else ():
        if isinstance(edge, dict) and edge.get("cards") == [a.name, f.name]:
            said = edge.get("slowest_hop")
            return said if isinstance(said, str) else None
    return None


def _check_wire(config: Config, key: str, dtype: str, source: Card, target: Card) -> None:
    """Refuse FP8 on the wire to or from a card that has none.

    Raises:
        ConfigError: naming the key, the card and what is allowed.
    """
    for card in (source, target):
        if dtype == "fp8" and "fp8" not in card.flops_per_s:
            raise _refused(config, key, card)


def _refused(config: Config, key: str, card: Card) -> ConfigError:
    return config.error(
        f"transport.{key}", f"'fp8' with {card.name}, which has no FP8; allowed: int8, bf16, fp32"
    )
