"""``step3-hetero role``: one role of a config as a process of its own."""

from __future__ import annotations

import json
import os
import sys

import click

from step3_hetero.cli.options import set_option

EPILOG = """\b
Examples:
  step3-hetero role run.yaml --name f --listen tcp://10.0.0.7:7001
"""


@click.command("role", epilog=EPILOG)
@click.argument("config")
@click.option("--name", required=True, help="The role, as the config names it.")
@click.option("--number", default=0, show_default=True, help="Which instance of it.")
@click.option("--listen", "address", default="", metavar="ADDRESS",
              help="Where to listen; a free address of this machine unless given.")  # fmt: skip
@click.option("--report", type=int, hidden=True, help="Descriptor to write the address to.")
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
    """Run one instance of a role until its front says stop."""
    if cores:
        os.sched_setaffinity(0, map(int, cores.split(",")))
    from step3_hetero.afd.launch import end_with
    from step3_hetero.afd.local import Given, serve_role
    from step3_hetero.config import Config

    ablate, traced = None, False
    if config == "-":  # started by a front, on whose life this process hangs
        given = Given.read(sys.stdin.readline())
        read = Config.from_dict(given.values, given.folder)
        ablate, traced = given.ablate, given.traced
        end_with(sys.stdin)
    else:
        read = Config.read(config, overrides)

    def tell(where: str) -> None:
        if report is None:
            click.echo(f"{name}:{number} listens at {where}", err=True)
            return
        with os.fdopen(report, "w") as pipe:
            pipe.write(json.dumps({"address": where}) + "\n")

    serve_role(read, name, number, address, tell, ablate=ablate, traced=traced)
