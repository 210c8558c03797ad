"""``step3-hetero up``."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from step3_hetero.cli.options import config_argument, set_option

if TYPE_CHECKING:
    from step3_hetero.afd.launcher import Launcher
    from step3_hetero.afd.loglines import OnLine
    from step3_hetero.runtime.resolving import Resolved

EPILOG = """\b
Examples:
  step3-hetero up run.yaml --attach /run/user/1000/roles.json
  step3-hetero generate run.yaml --attach /run/user/1000/roles.json --prompt-ids 1,2,3
  step3-hetero up run.yaml --log-dir logs --json
\b
Ctrl-C or SIGTERM: the roles finish what is under way, then all end with code 0.
"""


@click.command("up", epilog=EPILOG)
@config_argument
@click.option("--attach", type=click.Path(dir_okay=False), metavar="FILE",
              help="Write where the roles stand, for generate and eval.")  # fmt: skip
@click.option("--log-dir", type=click.Path(file_okay=False), metavar="FOLDER",
              help="Write what each role says to a file there, too.")  # fmt: skip
@click.option("--launcher", type=click.Choice(["local", "ray"]), default="local",
              show_default=True, help="Who starts the roles.")  # fmt: skip
@click.option("--timings", is_flag=True,
              help="At the end, print how long each role's work took.")  # fmt: skip
@click.option("--json", "as_json", is_flag=True, help="Print an event a line, as JSON.")
@set_option
def command(
    config: str,
    attach: str | None,
    log_dir: str | None,
    launcher: str,
    timings: bool,
    as_json: bool,
    overrides: tuple[str, ...],
) -> None:
    """Start every role of a config, loaded and warm, and keep them until Ctrl-C."""
    from step3_hetero.afd.loglines import LogFiles, to_all
    from step3_hetero.afd.up import Supervisor, first_addresses, write_attach
    from step3_hetero.cli.up_show import EventLines, Table
    from step3_hetero.placement.written import check_writable

    check_writable("--attach", attach)
    resolved = _resolved(config, overrides)
    files = LogFiles(Path(log_dir)) if log_dir is not None else None
    counts = {name: len(r.stages) for name, r in resolved.placement.roles.items()}
    with EventLines() if as_json else Table(counts) as shown:
        on_line = to_all(shown.line, files) if files is not None else shown.line
        members = _members(resolved)
        where = first_addresses(members, resolved.config.transport.kind)
        starts = _launcher(launcher, resolved, where, on_line)
        supervisor = Supervisor(
            members, starts, where, resolved.config.transport.deadline_s, shown.event
        )

        def up() -> None:
            if attach is not None:
                write_attach(Path(attach), resolved.config, supervisor.roles)
            shown.up(supervisor.roles, attach)

        def ask(number: int, frame: Any) -> None:
            supervisor.ask()

        before = {n: signal.signal(n, ask) for n in (signal.SIGTERM, signal.SIGINT)}
        try:
            supervisor.run(up)
            if timings:
                shown.paces(supervisor.paces)
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
            if attach is not None:
                Path(attach).unlink(missing_ok=True)
            if files is not None:
                files.close()


def _resolved(config: str, overrides: tuple[str, ...]) -> Resolved:
    """Read a config and refuse one without roles to start.

    Raises:
        ConfigError: with the key.
    """
    from step3_hetero.config import Config
    from step3_hetero.runtime.resolving import checkpoint_folder, resolve

    read = Config.read(config, overrides)
    if read.runtime.processes != "per-role":
        raise read.error("runtime.processes", "one has no roles to start; set it to per-role")
    if read.transport.kind == "inproc":
        raise read.error("transport.kind", "inproc reaches no other process; use shm or tcp")
    checkpoint_folder(read)
    return resolve(read)


def _members(resolved: Resolved) -> Any:
    from step3_hetero.afd.local import slots

    standing = {name for name, role in resolved.config.roles.items() if role.hosts}
    if standing:
        raise resolved.config.error(
            f"roles.{min(standing)}.hosts", "somebody else starts these; leave it out for up"
        )
    return slots(resolved.config, resolved.placement)


def _launcher(name: str, resolved: Resolved, where: dict[str, str], on_line: OnLine) -> Launcher:
    from step3_hetero.afd.local import Given, local_processes

    config = resolved.config
    if name == "ray":
        from step3_hetero.afd.ray_roles import RayRoles

        return RayRoles(resolved, None, stands=True, where=where)
    given = Given(config.values(), str(config.folder), stands=True)
    return local_processes(resolved, given, on_line, where)
