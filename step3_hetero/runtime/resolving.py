"""A config with its model: read, placed over the graph, its devices opened. Nothing runs yet."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from step3_hetero.backend import Device
from step3_hetero.config import Config
from step3_hetero.emulate.device import EmulatedDevice
from step3_hetero.errors import BackendNotFound, ConfigError, PlacementError, UnsupportedOp
from step3_hetero.graph import StageGraph, build_graph
from step3_hetero.graph.sharding import role_stages
from step3_hetero.model.config import FAMILIES, ModelConfig
from step3_hetero.registry import get_backend
from step3_hetero.runtime.edges import check_edges
from step3_hetero.runtime.heads import check_groups
from step3_hetero.runtime.placing import (
    DTYPE,
    KV_DTYPE,
    Placement,
    RolePlan,
    check_memory,
    check_supported,
    place,
)
from step3_hetero.runtime.sums import check_sums


@dataclass(frozen=True)
class Resolved:
    """A config with its model, graph and placement; nothing is opened yet."""

    config: Config
    model: ModelConfig
    graph: StageGraph
    placement: Placement


def read_config(
    config: str | Path | Mapping[str, Any] | Config, overrides: Mapping[str, Any]
) -> Config:
    """Read a config from wherever it is, overrides applied.

    Raises:
        ConfigError: a key or a value is wrong, or a config already read is to be overridden.
    """
    settings = [f"{key.replace('__', '.')}={json.dumps(v)}" for key, v in overrides.items()]
    if isinstance(config, str | Path):
        return Config.read(config, settings)
    if settings:
        raise ConfigError(
            f"overrides go with a config file; set {', '.join(overrides)} in the value"
        )
    return config if isinstance(config, Config) else Config.from_dict(config, Path.cwd())


def resolve(config: Config, model: ModelConfig | None = None) -> Resolved:
    """Build the graph of a config's model and place it, without touching a device or a weight.

    Raises:
        ConfigError: the config or the model's config.json is wrong.
        BackendNotFound, UnsupportedOp, PlacementError: the placement is impossible.
    """
    model = model or model_config(config)
    graph = stage_graph(config, model)
    _check_backends(config)
    _check_shadow(config, graph)
    placement = place(config, model, graph)
    check_sums(config, placement)
    check_groups(config, placement)
    check_edges(config, placement)
    return Resolved(config, model, graph, placement)


def _check_backends(config: Config) -> None:
    for name, role in config.roles.items():
        try:
            get_backend(role.backend)
        except BackendNotFound as cause:
            raise BackendNotFound(f"{config.where(f'roles.{name}.backend')}: {cause}") from cause


def _check_shadow(config: Config, graph: StageGraph) -> None:
    """Refuse half a shadow check, and a backend that cannot run the model."""
    runtime = config.runtime
    if runtime.shadow_backend is None:
        if runtime.shadow_sample > 0:
            raise config.error(
                "runtime.shadow_sample",
                f"{runtime.shadow_sample} without runtime.shadow_backend; name a backend, such as "
                "reference",
            )
        return
    if runtime.shadow_sample == 0:
        raise config.error(
            "runtime.shadow_backend",
            f"{runtime.shadow_backend!r} without runtime.shadow_sample; give the part of runs to "
            "check, such as 0.01",
        )
    where = f"{config.where('runtime.shadow_backend')}: runtime.shadow_backend"
    try:
        backend = get_backend(runtime.shadow_backend)
    except BackendNotFound as cause:
        raise BackendNotFound(f"{where}: {cause}") from cause
    info = backend.reference_info(None)
    for spec, stage in {s.spec: s for s in reversed(graph.stages)}.items():
        for op in spec.ops("auto"):
            if reason := backend.supports(info, op):
                raise UnsupportedOp(
                    f"{where}: {backend.name} cannot run {stage.name}: {op}: {reason}"
                )


def stage_graph(config: Config, model: ModelConfig | None = None) -> StageGraph:
    """Build the graph of a config's model; backends have no say in it.

    Raises:
        ConfigError: the config or the model's config.json is wrong.
    """
    model = model or model_config(config)
    asked = config.runtime.dtype
    return build_graph(
        model,
        dtype=model.dtype if asked == "model" else DTYPE[asked],
        router_logits=config.runtime.router_logits,
        batch_invariant=config.runtime.batch_invariant,
        kv_dtype=KV_DTYPE[config.runtime.kv_dtype],
    )


def checkpoint_folder(config: Config) -> Path:
    """Return the folder of a config's checkpoint.

    Raises:
        ConfigError: the config names a family, which has no weights.
    """
    if config.model_path is None:
        model_config(config)  # refuses what is no family either
        raise config.error(
            "model",
            f"{config.model!r} is a family without weights: enough for check and graph; give a "
            "checkpoint's folder to run it",
        )
    return config.model_path


def model_config(config: Config) -> ModelConfig:
    """Read the model's own config, or take a family's."""
    if config.model_path is None:
        if config.model not in FAMILIES:
            known = ", ".join(FAMILIES)
            raise config.error(
                "model", f"{config.model!r} is no folder and no family; families: {known}"
            )
        return FAMILIES[config.model]()
    return ModelConfig.read(config.model_path)


def process_of(resolved: Resolved, name: str, number: int) -> Resolved:
    """Return a config as one process of a role sees it: its share of the stages, its own device.

    Of a role's stages the plan of the process names those that it holds.

    Of devices that are not named, processes take those there are from 0 on, in turn.
    """
    role, planned = resolved.config.roles[name], resolved.placement.roles[name]
    role_of, every = resolved.placement.role_of, resolved.graph.stages
    whole = [s for s in every if role_of[s.name] == name]
    held = role_stages(whole, resolved.model, number, role.ep, role.tp)
    shares = {s.name: s for s in held}
    stages = tuple(shares.get(s.name, s) for s in every)
    there = role.devices or range(max(1, len(planned.backend.devices())))
    mine = replace(planned, index=there[number % len(there)], stages=tuple(shares))
    graph = replace(resolved.graph, stages=stages)
    roles = {**resolved.placement.roles, name: mine}
    placement = replace(resolved.placement, graph=graph, roles=roles)
    return replace(resolved, graph=graph, placement=placement)


def stage_devices(
    resolved: Resolved, opened: Mapping[tuple[str, int], Device]
) -> dict[str, tuple[str, Device, str]]:
    """Return, by stage, the name of its role, its device and its weight format."""
    roles = resolved.placement.roles
    return {
        stage: (role, opened[roles[role].device], roles[role].weight_format)
        for stage, role in resolved.placement.role_of.items()
        if roles[role].device in opened
    }


def open_devices(
    resolved: Resolved, only: Collection[str] | None = None
) -> dict[tuple[str, int], Device]:
    """Open each device once, however many roles share it, and hold the placement against it.

    ``only`` are the names of the roles that run in this process; all of them unless given.

    Raises:
        PlacementError: a device is not on this machine, or cannot hold what is placed on it.
        UnsupportedOp: a device that is here cannot do what the one described could.
        ConfigError: a device does not know an option, or roles that share it give it two values.
    """
    check_memory(resolved.config, resolved.placement)
    opened: dict[tuple[str, int], Device] = {}
    first: dict[tuple[str, int], RolePlan] = {}
    here = [r for r in resolved.placement.roles.values() if only is None or r.name in only]
    for role in here:
        if role.device not in opened:
            opened[role.device] = _open(resolved.config, role)
            first[role.device] = role
        elif role.options != first[role.device].options:
            raise resolved.config.error(
                f"roles.{role.name}.options",
                f"{dict(role.options)} differ from {dict(first[role.device].options)} of role "
                f"{first[role.device].name!r} on the same device; write the same in both",
            )
        stages = [resolved.graph.by_name[name] for name in role.stages]
        check_supported(resolved.config, replace(role, info=opened[role.device].info), stages)
    return opened


def _open(config: Config, role: RolePlan) -> Device:
    """Open a role's device; whatever the backend refuses is told with its line of the config."""
    if (reason := role.backend.why_unavailable()) and not role.options:  # an option may bring one
        key, name = f"roles.{role.name}.backend", role.backend.name
        raise PlacementError(f"{config.where(key)}: {key}: {name!r} has no device here: {reason}")
    card = role.emulated
    try:
        device = role.backend.open(0 if card else role.index, role.options)
        return EmulatedDevice(device, card) if card else device
    except ConfigError as cause:
        raise config.error(f"roles.{role.name}.options", str(cause)) from cause
    except PlacementError as cause:
        key = f"roles.{role.name}.devices"
        raise PlacementError(f"{config.where(key)}: {key}: {cause}") from cause
