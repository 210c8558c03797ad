"""The front door in Python: ``load`` a config, get an ``Engine``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from step3_hetero.config import Config
from step3_hetero.errors import ConfigError, PlacementError
from step3_hetero.model.ablate import Ablated
from step3_hetero.model.checkpoint import Checkpoint
from step3_hetero.model.config import ModelConfig
from step3_hetero.model.image import ImageConfig
from step3_hetero.model.tokenizer import Tokenizer
from step3_hetero.registry import get_backend
from step3_hetero.runtime.engine import Engine
from step3_hetero.runtime.executor import Executor, Observer
from step3_hetero.runtime.loader import OnStage, load_stages
from step3_hetero.runtime.local import LocalExecutor
from step3_hetero.runtime.prompting import Prompter
from step3_hetero.runtime.resolving import (
    Resolved,
    checkpoint_folder,
    model_config,
    open_devices,
    read_config,
    resolve,
    stage_devices,
)
from step3_hetero.runtime.timeline import Timeline
from step3_hetero.specs import TensorSource

if TYPE_CHECKING:
    from step3_hetero.conformance.shadow import ShadowCheck


def load(
    config: str | Path | Mapping[str, Any] | Config,
    *,
    ablate: str | None = None,
    observer: Observer | None = None,
    on_stage: OnStage | None = None,
    shadow_folder: str | Path | None = None,
    timeline: Timeline | None = None,
    launcher: str = "local",
    attach: str | Path | None = None,
    **overrides: Any,
) -> Engine:
    """Load a model as a config file says and return an engine ready to generate.

    ``overrides`` are config keys with two underscores for each dot: ``roles__f__backend="cpu"``.
    ``ablate`` zeroes a part (attention, experts or vision), to see what it is worth. ``on_stage``
    is called with each stage's name once it is loaded. ``shadow_folder`` is where the shadow check
    puts excesses; ``shadow-excess`` beside the config unless given. ``timeline`` takes what ran
    when, in every role. With ``runtime.processes: per-role``, ``launcher`` (local or ray) starts
    the roles; ``attach``, the file of a ``step3-hetero up``, takes its roles instead.

    Raises:
        ConfigError, BackendNotFound, UnsupportedOp, PlacementError, CheckpointError: what is wrong,
            where, and what to do.
    """
    read = read_config(config, overrides)
    folder = checkpoint_folder(read)
    checkpoint = Checkpoint.open(folder, model_config(read))
    resolved = resolve(read, checkpoint.config)
    runtime = resolved.config.runtime
    prompter = open_prompter(resolved.model, folder)  # what is damaged is told before roles stand
    if runtime.processes == "per-role":
        executor = _process_executor(
            resolved, ablate, observer, on_stage, timeline, launcher, attach
        )
    elif launcher != "local" or attach is not None:
        raise resolved.config.error(
            "runtime.processes", "one leaves no role to launch or attach to; set it to per-role"
        )
    else:
        source = Ablated(checkpoint, checkpoint.names(), ablate) if ablate else checkpoint
        shadow = _shadow(resolved, source, shadow_folder)
        observers = [o for o in (observer, shadow) if o is not None]
        executor = _executor(resolved, source, observers, on_stage, timeline)
    return Engine(
        resolved.model,
        executor,
        prompter,
        resolved.placement,
        max_batch=runtime.max_batch,
        prefill_chunk=runtime.prefill_chunk,
        prefix_reuse=runtime.prefix_reuse,
        max_waiting=runtime.max_waiting,
    )


def _executor(
    resolved: Resolved,
    source: TensorSource,
    observers: Sequence[Observer],
    on_stage: OnStage | None,
    timeline: Timeline | None,
) -> Executor:
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
    return LocalExecutor(resolved.graph, stages, caches, placement.limits, observers, timeline)


def _process_executor(
    resolved: Resolved,
    ablate: str | None,
    observer: Observer | None,
    on_stage: OnStage | None,
    timeline: Timeline | None,
    launcher: str,
    attach: str | Path | None,
) -> Executor:
    """Start the roles' processes; what looks at stages from inside cannot follow them there."""
    from step3_hetero.afd.launchers import launcher_of
    from step3_hetero.afd.local import executor
    from step3_hetero.afd.up import read_attach

    if observer is not None:
        raise ConfigError("an observer sees the stages of one process: set runtime.processes: one")
    if resolved.config.runtime.shadow_backend is not None:
        raise resolved.config.error(
            "runtime.shadow_backend", "is not available yet with runtime.processes: per-role"
        )
    hosts = None if attach is None else read_attach(Path(attach), resolved.config)
    started_by = launcher_of(launcher, resolved, ablate) if hosts is None else None
    return executor(resolved, ablate, on_stage, timeline=timeline, launcher=started_by, hosts=hosts)


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
    place = Path(folder) if folder is not None else config.folder / "shadow-excess"
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


def open_prompter(model: ModelConfig, folder: Path) -> Prompter:
    """Read what turns a question into tokens and pixels from a checkpoint's folder.

    Raises:
        ConfigError: tokenizer or image constants are damaged.
    """
    size = model.vision.image_size if model.vision else None
    return Prompter(model, Tokenizer.read(folder), ImageConfig.read(folder, size))
