"""``step3-hetero role``: one role of a config as a process of its own."""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING, Any

import click

from step3_hetero.cli.options import set_option

if TYPE_CHECKING:
    from step3_hetero.afd.local import Given
    from step3_hetero.config import Config

EPILOG = """\b
Examples:
  step3-hetero role run.yaml --name f --listen 10.0.0.7:7001
  step3-hetero role run.yaml --name a --number 1 --listen 127.0.0.1:7002
\b
The front's config has the same roles, and roles.f.hosts: [10.0.0.7:7001].
Beyond loopback a key is needed: transport.key_file, or STEP3_HETERO_KEY.
SIGTERM: what is under way is answered, then the role ends with code 0.
"""


@click.command("role", epilog=EPILOG)
@click.argument("config")
@click.option("--name", required=True, help="The role, as the config names it.")
@click.option("--number", default=0, show_default=True,
              help="Which process of it: instance x tp + rank.")  # fmt: skip
@click.option("--listen", "address", default="", metavar="ADDRESS",
              help="Where to listen; a free address of this machine unless given.")  # fmt: skip
@click.option("--report", type=int, hidden=True, help="Descriptor to write facts to.")
@click.option("--cores", hidden=True, help="Cores to stay on, with commas.")
@set_option
def command(
    config: str,
    name: str,
    number: int,
    address: str,
    report: int | None,
    cores: str | None,
    overrides: tuple[str, ...],
) -> None:
    """Be one process of a role: load, then serve one front after another until SIGTERM."""
    if cores:
        os.sched_setaffinity(0, map(int, cores.split(",")))
    from step3_hetero.afd.drain import Drain

    drain = Drain(0.0)
    drain.on_sigterm()
    with drain.idle():
        from step3_hetero.afd.launcher import tell
        from step3_hetero.afd.local import serve_role

        read, given = _given(config, overrides)
        if read.runtime.processes != "per-role":
            raise read.error("runtime.processes", "one has no roles to start; set it to per-role")

    def say(**facts: Any) -> None:
        if report is not None:
            tell(report, **facts)
            return
        said = {"address": "listens at {}", "state": "is {}", "said": "{}"}
        for key, value in facts.items():
            if key in said:
                click.echo(f"{name}:{number} {said[key].format(value)}", err=True)

    if report is not None:
        os.set_blocking(report, False)
    serve_role(read, name, number, address, say, drain, ablate=given.ablate, stands=given.stands)


def _given(config: str, overrides: tuple[str, ...]) -> tuple[Config, Given]:
    """Return what to be: from a front, on whose life this process hangs, or from a file."""
    from step3_hetero.afd.launch import end_with
    from step3_hetero.afd.local import Given
    from step3_hetero.config import Config

    if config == "-":
        given = Given.read(sys.stdin.readline())
        end_with(sys.stdin)
        return given.config(), given
    read = Config.read(config, overrides)
    return read, Given(read.values(), str(read.folder), stands=True)
