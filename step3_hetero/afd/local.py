"""A config's roles, from both sides: the front's executor, and one role seen from where it runs."""

from __future__ import annotations

import itertools
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from step3_hetero.afd.addresses import check_addresses
from step3_hetero.afd.contract import Contract, edge_contract, part_bytes
from step3_hetero.afd.drain import Drain
from step3_hetero.afd.elsewhere import Standing, Threads
from step3_hetero.afd.front import OnReady, ProcessExecutor
from step3_hetero.afd.key import shared_key
from step3_hetero.afd.launch import LocalProcesses
from step3_hetero.afd.launcher import Launcher, Launchers, Member
from step3_hetero.afd.link import Link, limits
from step3_hetero.afd.loglines import OnLine
from step3_hetero.afd.members import cores_for, members
from step3_hetero.afd.ranks import Reduction
from step3_hetero.afd.role import Loaded, RoleProcessSettings, Tell, serve, stand
from step3_hetero.afd.tls import transport_of
from step3_hetero.afd.wire import Wire
from step3_hetero.backend import Reduce
from step3_hetero.config import Config
from step3_hetero.emulate.asked import links_from
from step3_hetero.model.ablate import Ablated
from step3_hetero.model.checkpoint import Checkpoint
from step3_hetero.runtime.loader import load_stages
from step3_hetero.runtime.placing import Placement
from step3_hetero.runtime.resolving import (
    Resolved,
    checkpoint_folder,
    model_config,
    open_devices,
    process_of,
    resolve,
    stage_devices,
)
from step3_hetero.runtime.timeline import Timeline
from step3_hetero.specs import TensorSource
from step3_hetero.transport.base import FrameLimits

Hosts = Mapping[str, Sequence[str]]
"""Where roles stand that somebody else started: by role, an address for each process."""


@dataclass(frozen=True)
class Given:
    """What a role's process is told on its standard input, one line of JSON."""

    values: Mapping[str, Any]
    folder: str
    ablate: str | None = None
    stands: bool = False
    """It serves one front after another, and loads before the first has come."""

    def line(self) -> str:
        """Return the line."""
        return json.dumps(asdict(self))

    @classmethod
    def read(cls, line: str) -> Given:
        """Read the line."""
        return cls(**json.loads(line))

    def config(self) -> Config:
        """Return the config as whoever started the role read it."""
        return Config.from_dict(self.values, self.folder)


def slots(config: Config, placement: Placement) -> list[Member]:
    """Return every process of every role, and behind a role's own its spares.

    Raises:
        ConfigError: as ``members``.
    """
    found: list[Member] = []
    for member in members(config, placement):
        found.append(member)
        role = config.roles[member.role]
        if member.number == role.processes - 1:
            numbers = range(role.processes, role.processes + role.spares)
            found += [Member(member.role, n, member.leads) for n in numbers]
    return found


def executor(
    resolved: Resolved,
    ablate: str | None = None,
    on_ready: OnReady | None = None,
    on_line: OnLine | None = None,
    timeline: Timeline | None = None,
    launcher: Launcher | None = None,
    hosts: Hosts | None = None,
) -> ProcessExecutor:
    """Start every role of a config elsewhere and wait until all are ready.

    ``launcher`` starts those that have no address in ``hosts`` or the config; without it they are
    processes of this machine, or threads of this process where the transport goes no further.

    Raises:
        ConfigError: the roles cannot be cut so.
        EdgeMismatch, RoleLost, TransportTimeout: a role did not come up.
    """
    config, placement = resolved.config, resolved.placement
    check_addresses(config)
    transport, key = transport_of(config), shared_key(config)
    allowed, deadline_s = frame_limits(resolved), config.transport.deadline_s
    standing = {name: role.hosts for name, role in config.roles.items() if role.hosts}
    standing |= {name: tuple(addresses) for name, addresses in (hosts or {}).items()}
    if launcher is None:
        launcher = _own_launcher(resolved, ablate, on_line or to_stderr, set(standing))
    reach = Standing(standing, transport, allowed, deadline_s, key)

    def connect(name: str, address: str) -> Link:
        return Link(transport.connect(address, allowed, deadline_s, key), name)

    return ProcessExecutor(
        slots(config, placement),
        {name: role.processes for name, role in config.roles.items()},
        Launchers(dict.fromkeys(standing, reach), launcher),
        connect,
        contract(resolved, ablate),
        placement.limits,
        placement.kv_blocks,
        config.runtime.microbatches,
        deadline_s,
        on_ready,
        timeline,
        on_line or to_stderr,
    )


def _own_launcher(
    resolved: Resolved, ablate: str | None, on_line: OnLine, elsewhere: set[str]
) -> Launcher:
    config = resolved.config
    if config.transport.kind == "inproc":

        def serve_here(member: Member, tell: Tell, drain: Drain) -> None:
            serve_role(config, member.role, member.number, "", tell, drain, ablate=ablate)

        return Threads(serve_here)
    given = Given(config.values(), str(config.folder), ablate)
    return local_processes(resolved, given, on_line, elsewhere=elsewhere)


def local_processes(
    resolved: Resolved,
    given: Given,
    on_line: OnLine,
    listen: Mapping[str, str] | None = None,
    elsewhere: set[str] | None = None,
) -> LocalProcesses:
    """Return what starts roles here, each on cores of its own where there are enough.

    ``listen`` gives, by member's name, where to listen; ``elsewhere`` are roles of other launchers.
    """
    every = slots(resolved.config, resolved.placement)
    here = [m for m in every if m.role not in (elsewhere or ())]
    where = listen or {}

    def listening(member: Member) -> list[str]:
        return ["--listen", where[member.name]] if member.name in where else []

    return LocalProcesses(
        given.line(), lambda m: cores_for(here.index(m), len(here)), on_line, listening
    )


def contract(resolved: Resolved, ablate: str | None) -> Contract:
    """Return the edge contract, with what a command line changes of the weights."""
    config = resolved.config
    agreed = edge_contract(config, resolved.placement, checkpoint_folder(config))
    return {**agreed, "ablate": ablate}


def serve_role(
    config: Config,
    name: str,
    number: int,
    address: str,
    tell: Tell,
    drain: Drain,
    *,
    ablate: str | None = None,
    stands: bool = False,
) -> None:
    """Be one process of a role: for one front, or with ``stands`` for one after another.

    ``tell`` is told where it listens and how far it is.

    Raises:
        ConfigError: there is no such role or instance.
        TransportTimeout: the front did not come.
    """
    with drain.idle():
        check_member(config, name, number)
        folder = checkpoint_folder(config)
        checkpoint = Checkpoint.open(folder, model_config(config))
        resolved = resolve(config, checkpoint.config)
        source: TensorSource = checkpoint
        if ablate:
            source = Ablated(checkpoint, checkpoint.names(), ablate)
        settings = _settings(resolved, name, number, ablate)
        drain.deadline_s = settings.deadline_s
        listener = settings.transport.listen(address, settings.limits, settings.key)
        tell(address=listener.address)
    try:
        (stand if stands else serve)(
            settings,
            listener,
            lambda: _load(
                process_of(resolved, name, number), name, source, tell, settings.reduction
            ),
            drain,
            tell,
        )
    finally:
        listener.close()


def check_member(config: Config, name: str, number: int) -> None:
    """Refuse a role or an instance that a config does not have.

    Raises:
        ConfigError: with those that it has.
    """
    if name not in config.roles:
        raise config.error("roles", f"no role {name!r}; roles: {', '.join(config.roles)}")
    role = config.roles[name]
    count = role.processes + role.spares
    if not 0 <= number < count:
        allowed = "0" if count == 1 else f"0 to {count - 1}"
        raise config.error(
            f"roles.{name}.instances", f"no process {number}, there are {count}; allowed: {allowed}"
        )


def _settings(
    resolved: Resolved, name: str, number: int, ablate: str | None
) -> RoleProcessSettings:
    config, placement = resolved.config, resolved.placement
    (me,) = (m for m in slots(config, placement) if (m.role, m.number) == (name, number))
    return RoleProcessSettings(
        name=name,
        number=number,
        leads=me.leads,
        graph=resolved.graph,
        role_of=placement.role_of,
        set_of={role: plan.sharers for role, plan in placement.roles.items()},
        contract=contract(resolved, ablate),
        transport=transport_of(config),
        limits=frame_limits(resolved),
        batch=placement.limits,
        deadline_s=config.transport.deadline_s,
        a2f=Wire.of(config.transport.a2f_dtype),
        f2a=Wire.of(config.transport.f2a_dtype),
        reduction=Reduction(number % me.tp, me.tp) if placement.roles[name].heads_split else None,
        key=shared_key(config),
        links=links_from(config, name),
    )


def _load(
    resolved: Resolved, name: str, source: TensorSource, tell: Tell, reduce: Reduce | None
) -> Loaded:
    placement, count = resolved.placement, itertools.count(1)
    devices = stage_devices(resolved, open_devices(resolved, [name]))
    mine = {stage: devices[stage] for stage in placement.roles[name].stages}

    def on_stage(stage: str) -> None:
        tell(loaded=next(count))

    return load_stages(
        resolved.graph, mine, source, placement.limits, placement.kv_blocks, on_stage, reduce
    )


def frame_limits(resolved: Resolved) -> FrameLimits:
    """Return what one frame between two processes of this config may hold."""
    tokens = resolved.placement.limits.tokens
    logits = 8 * tokens * resolved.model.text.vocab_size
    return limits(max(part_bytes(resolved.graph, tokens), logits))


def to_stderr(name: str, line: str) -> None:
    """Print a role's line behind its name."""
    print(f"{name} | {line}", file=sys.stderr)
