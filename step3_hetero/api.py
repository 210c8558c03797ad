"""The front door in Python: ``load`` a config, get an ``Engine``."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from step3_hetero.backend import Device
from step3_hetero.config import Config
from step3_hetero.errors import BackendNotFound, ConfigError, PlacementError, UnsupportedOp
from step3_hetero.graph import StageGraph, build_graph
from step3_hetero.model.ablate import Ablated
from step3_hetero.model.checkpoint import Checkpoint
from step3_hetero.model.config import FAMILIES, ModelConfig
from step3_hetero.model.image import ImageConfig
from step3_hetero.model.tokenizer import Tokenizer
from step3_hetero.registry import get_backend
from step3_hetero.runtime.engine import Engine
from step3_hetero.runtime.executor import Observer
from step3_hetero.runtime.loader import OnStage, load_stages
from step3_hetero.runtime.local import LocalExecutor
from step3_hetero.runtime.placing import (
    DTYPE,
    Placement,
    RolePlan,
    check_memory,
    check_supported,
    place,
)
from step3_hetero.runtime.prompting import Prompter
from step3_hetero.specs import TensorSource

if TYPE_CHECKING:
    from step3_hetero.conformance.shadow import ShadowCheck


@dataclass(frozen=True)
class Resolved:
    """A config with its model, graph and placement; nothing is opened yet."""

    config: Config
    model: ModelConfig
    graph: StageGraph
    placement: Placement


def load(
    config: str | Path | Mapping[str, Any] | Config,
    *,
    ablate: str | None = None,
    observer: Observer | None = None,
    on_stage: OnStage | None = None,
    shadow_folder: str | Path | None = None,
    **overrides: Any,
) -> Engine:
    """Load a model as a config file says and return an engine ready to generate.

    ``overrides`` are config keys with two underscores for each dot: ``roles__f__backend="cpu"``.
    ``ablate`` zeroes a part (attention, experts or vision), to see what it is worth. ``on_stage``
    is called with each stage's name once it is loaded. ``shadow_folder`` is where the shadow check
    puts excesses; ``shadow-excess`` beside the config unless given.

    Raises:
        ConfigError, BackendNotFound, UnsupportedOp, PlacementError, CheckpointError: what is wrong,
            where, and what to do.
    """
    read = read_config(config, overrides)
    folder = checkpoint_folder(read)
    checkpoint = Checkpoint.open(folder, model_config(read))
    resolved = resolve(read, checkpoint.config)
    source = Ablated(checkpoint, checkpoint.names(), ablate) if ablate else checkpoint
    shadow = _shadow(resolved, source, shadow_folder)
    observers = [o for o in (observer, shadow) if o is not None]
    executor = _executor(resolved, source, observers, on_stage)
    runtime = resolved.config.runtime
    return Engine(
        resolved.model,
        executor,
        open_prompter(resolved.model, folder),
        resolved.placement,
        max_batch=runtime.max_batch,
        prefill_chunk=runtime.prefill_chunk,
    )


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
    return Resolved(config, model, graph, place(config, model, graph))


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


def _executor(
    resolved: Resolved,
    source: TensorSource,
    observers: Sequence[Observer],
    on_stage: OnStage | None,
) -> LocalExecutor:
    placement = resolved.placement
    opened = open_devices(resolved)
    stages, caches = load_stages(
        resolved.graph,
        stage_devices(resolved, opened),
        source,
        placement.limits,
        placement.kv_blocks,
        on_stage,
    )
    return LocalExecutor(resolved.graph, stages, caches, placement.limits, observers)


def _shadow(
    resolved: Resolved, source: TensorSource, folder: str | Path | None
) -> ShadowCheck | None:
    """Make the shadow check that a config asks for, if it asks for one."""
    config, runtime = resolved.config, resolved.config.runtime
    if runtime.shadow_backend is None:
        return None
    from step3_hetero.conformance.shadow import ShadowCheck

    backend = get_backend(runtime.shadow_backend)
    if reason := backend.why_unavailable():
        key = "runtime.shadow_backend"
        raise PlacementError(
            f"{config.where(key)}: {key}: {backend.name!r} has no device here: {reason}"
        )
    roles = resolved.placement.roles
    formats = {s: roles[role].weight_format for s, role in resolved.placement.role_of.items()}
    place = Path(folder) if folder is not None else config._base / "shadow-excess"
    peer = None if backend.name == "reference" else backend.open(0)
    return ShadowCheck(resolved.graph, source, formats, runtime.shadow_sample, place, peer=peer)


def shadow_check(engine: Engine) -> ShadowCheck | None:
    """Return an engine's shadow check, whose ``report`` tells what it has seen; None without."""
    from step3_hetero.conformance.shadow import ShadowCheck

    return next((o for o in engine.executor.observers if isinstance(o, ShadowCheck)), None)


def shadow_report(engine: Engine) -> dict[str, Any] | None:
    """Return what an engine's shadow check has seen so far; None without one."""
    found = shadow_check(engine)
    return found.report() if found else None


def stage_devices(
    resolved: Resolved, opened: Mapping[tuple[str, int], Device]
) -> dict[str, tuple[str, Device, str]]:
    """Return, by stage, the name of its role, its device and its weight format."""
    roles = resolved.placement.roles
    return {
        stage: (role, opened[roles[role].device], roles[role].weight_format)
        for stage, role in resolved.placement.role_of.items()
    }


def open_devices(resolved: Resolved) -> dict[tuple[str, int], Device]:
    """Open each device once, however many roles share it, and hold the placement against it.

    Raises:
        PlacementError: a device is not on this machine, or cannot hold what is placed on it.
        UnsupportedOp: a device that is here cannot do what the one described could.
        ConfigError: a device does not know an option, or roles that share it give it two values.
    """
    check_memory(resolved.config, resolved.placement)
    opened: dict[tuple[str, int], Device] = {}
    first: dict[tuple[str, int], RolePlan] = {}
    for role in resolved.placement.roles.values():
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
    try:
        return role.backend.open(role.index, role.options)
    except ConfigError as cause:
        raise config.error(f"roles.{role.name}.options", str(cause)) from cause
    except PlacementError as cause:
        key = f"roles.{role.name}.devices"
        raise PlacementError(f"{config.where(key)}: {key}: {cause}") from cause


def open_prompter(model: ModelConfig, folder: Path) -> Prompter:
    """Read what turns a question into tokens and pixels from a checkpoint's folder.

    Raises:
        ConfigError: tokenizer or image constants are damaged.
    """
    size = model.vision.image_size if model.vision else None
    return Prompter(model, Tokenizer.read(folder), ImageConfig.read(folder, size))
