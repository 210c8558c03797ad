"""Roles on this machine: the front's executor, and the same role seen from its own process."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from step3_hetero.afd.contract import edge_contract, part_bytes
from step3_hetero.afd.front import Member, OnReady, ProcessExecutor
from step3_hetero.afd.key import shared_key
from step3_hetero.afd.launch import OnLine, RoleProcess, start
from step3_hetero.afd.link import Link, limits
from step3_hetero.afd.members import cores_for, members
from step3_hetero.afd.role import RoleProcessSettings, serve
from step3_hetero.afd.tls import transport_of
from step3_hetero.afd.wire import Wire
from step3_hetero.config import Config
from step3_hetero.model.ablate import Ablated
from step3_hetero.model.checkpoint import Checkpoint
from step3_hetero.runtime.loader import load_stages
from step3_hetero.runtime.resolving import (
    Resolved,
    checkpoint_folder,
    model_config,
    open_devices,
    resolve,
    stage_devices,
)
from step3_hetero.runtime.timeline import Timeline
from step3_hetero.specs import TensorSource
from step3_hetero.transport.base import FrameLimits


@dataclass(frozen=True)
class Given:
    """What a role's process is told on its standard input, one line of JSON."""

    values: Mapping[str, Any]
    folder: str
    ablate: str | None = None
    traced: bool = False

    def line(self) -> str:
        """Return the line."""
        return json.dumps(asdict(self))

    @classmethod
    def read(cls, line: str) -> Given:
        """Read the line."""
        return cls(**json.loads(line))


def executor(
    resolved: Resolved,
    ablate: str | None = None,
    on_ready: OnReady | None = None,
    on_line: OnLine | None = None,
    timeline: Timeline | None = None,
) -> ProcessExecutor:
    """Start every role of a config in processes of their own and wait until they are ready.

    Raises:
        ConfigError: the roles cannot be cut so.
        EdgeMismatch, RoleLost, TransportTimeout: a role did not come up.
    """
    config, placement = resolved.config, resolved.placement
    every = members(config, placement)
    traced = timeline is not None
    given = Given(config.values(), str(config.folder), ablate, traced).line()
    transport = transport_of(config)
    allowed, key = frame_limits(resolved), shared_key(config)

    def launch(member: Member) -> RoleProcess:
        arguments = ["role", "-", "--name", member.role, "--number", str(member.number)]
        cores = cores_for(every.index(member), len(every))
        return start(member.name, arguments, given, on_line or _to_stderr, cores)

    def connect(name: str, address: str) -> Link:
        deadline_s = config.transport.deadline_s
        return Link(transport.connect(address, allowed, deadline_s, key), name)

    return ProcessExecutor(
        every,
        launch,
        connect,
        edge_contract(config, placement, checkpoint_folder(config)),
        placement.limits,
        placement.kv_blocks,
        config.runtime.microbatches,
        config.transport.deadline_s,
        on_ready,
        timeline,
    )


def serve_role(
    config: Config,
    name: str,
    number: int,
    address: str,
    report: Callable[[str], None],
    *,
    ablate: str | None = None,
    traced: bool = False,
) -> None:
    """Be one instance of a role until the front says stop. ``report`` is told where it listens.

    Raises:
        ConfigError: there is no such role or instance.
        EdgeMismatch: the front has another config or checkpoint.
    """
    if name not in config.roles:
        raise config.error("roles", f"no role {name!r}; roles: {', '.join(config.roles)}")
    instances = config.roles[name].instances
    if not 0 <= number < instances:
        raise config.error(f"roles.{name}.instances", f"no instance {number} of {instances}")
    folder = checkpoint_folder(config)
    checkpoint = Checkpoint.open(folder, model_config(config))
    resolved = resolve(config, checkpoint.config)
    source: TensorSource = checkpoint
    if ablate:
        source = Ablated(checkpoint, checkpoint.names(), ablate)
    placement, transport = resolved.placement, transport_of(config)
    (me,) = (m for m in members(config, placement) if (m.role, m.number) == (name, number))
    settings = RoleProcessSettings(
        name=name,
        number=number,
        leads=me.leads,
        graph=resolved.graph,
        role_of=placement.role_of,
        contract=edge_contract(config, placement, folder),
        transport=transport,
        limits=frame_limits(resolved),
        tokens=placement.limits.tokens,
        deadline_s=config.transport.deadline_s,
        a2f=Wire.of(config.transport.a2f_dtype),
        f2a=Wire.of(config.transport.f2a_dtype),
        key=shared_key(config),
        traced=traced,
    )
    listener = transport.listen(address, settings.limits, settings.key)
    report(listener.address)
    try:
        serve(settings, listener, lambda: _load(resolved, name, source))
    finally:
        listener.close()


def _load(resolved: Resolved, name: str, source: TensorSource) -> Any:
    placement = resolved.placement
    devices = stage_devices(resolved, open_devices(resolved, [name]))
    mine = {stage: d for stage, d in devices.items() if placement.role_of[stage] == name}
    return load_stages(resolved.graph, mine, source, placement.limits, placement.kv_blocks)


def frame_limits(resolved: Resolved) -> FrameLimits:
    """Return what one frame between two processes of this config may hold."""
    tokens = resolved.placement.limits.tokens
    logits = 8 * tokens * resolved.model.text.vocab_size
    return limits(max(part_bytes(resolved.graph, tokens), logits))


def _to_stderr(name: str, line: str) -> None:
    print(f"{name} | {line}", file=sys.stderr)
