"""The command line. Commands are imported when they are called: ``--help`` must be quick."""

from __future__ import annotations

import sys
import traceback
from importlib import import_module

import click

from step3_hetero import __version__
from step3_hetero.cli.stopping import TERMINATED_CODE, Terminated
from step3_hetero.errors import Step3HeteroError

COMMANDS = {
    "generate": "Answer a prompt, with images if there are any.",
    "eval": "Measure a model's accuracy through the full engine.",
    "check": "Show placement, edges and bytes of a config, without any hardware.",
    "graph": "Draw a model's stages, coloured by role.",
    "backends": "List installed backends and their devices.",
    "cost": "Price a million decoded tokens: the paper's tables, any model, any card.",
    "hardware": "Show the device catalogue, each number with its source.",
    "plan": "Place a model on pools of unlike cards at the lowest price per token.",
    "simulate": "Run a plan's pipeline on the clock: percentiles, utilisation, a Gantt chart.",
    "profile": "Measure a device for the planner.",
    "tune": "Time a backend's kernels on this machine's card, keep the quickest.",
    "conformance": "Hold a backend against the reference and certify it.",
    "bisect": "Name the first layer, stage and op where a backend leaves the trusted one.",
    "up": "Start every role of a config here, loaded and warm, and keep them.",
    "role": "Run one role of a config as a process of its own.",
    "checkpoint": "Inspect or quantise a checkpoint.",
}
"""Each command and its line in ``--help``."""


class LazyGroup(click.Group):
    """Imports a command's module when the command is asked for."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Return the commands in the order a newcomer meets them."""
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Import ``step3_hetero.cli.<name>_command``."""
        if cmd_name not in COMMANDS:
            return None
        command: click.Command = import_module(f"step3_hetero.cli.{cmd_name}_command").command
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """List the commands without importing them."""
        with formatter.section("Commands"):
            formatter.write_dl(list(COMMANDS.items()))


EPILOG = """\b
Examples:
  step3-hetero generate examples/digits.yaml --prompt "which digit is this ?" \\
      --image examples/digits/7_held-out_0007.png
  step3-hetero check examples/digits.yaml --set roles.f.backend=cpu
  step3-hetero graph examples/digits.yaml --svg graph.svg
"""


@click.group(cls=LazyGroup, epilog=EPILOG, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="step3-hetero")
@click.option("--debug", is_flag=True, help="Show the traceback of an error.")
@click.pass_obj
def cli(settings: dict[str, bool] | None, debug: bool) -> None:
    """Run Step-3 across devices of several vendors, as one config file says."""
    if settings is not None:
        settings["debug"] = debug


def main() -> None:
    """Run the command line; an error of ours is one line, and its traceback only on request.

    Exit codes: 0 done, 1 failed, 2 bad input, 130 stopped by Ctrl-C, 143 by SIGTERM.
    """
    settings = {"debug": False}
    try:
        code = cli.main(prog_name="step3-hetero", standalone_mode=False, obj=settings)
        if code:  # a command that ran and found something wrong exits with 1
            sys.exit(code)
    except Step3HeteroError as error:
        if settings["debug"]:
            traceback.print_exception(error)
        click.echo(f"error: {_one_line(str(error))}", err=True)
        sys.exit(error.exit_code)
    except click.exceptions.NoArgsIsHelpError as error:
        error.show()
        sys.exit(2)
    except click.ClickException as error:
        click.echo(
            f"error: {_one_line(error.format_message()).rstrip('.')}{_help_of(error)}", err=True
        )
        sys.exit(2)
    except click.Abort as stop:
        terminated = isinstance(stop.__cause__, Terminated)
        click.echo("stopped by SIGTERM" if terminated else "stopped", err=True)
        sys.exit(TERMINATED_CODE if terminated else 130)


def _one_line(message: str) -> str:
    """Return a message as one line: what libraries say may have several."""
    return " ".join(message.split())


def _help_of(error: click.ClickException) -> str:
    """Return where the options of the command that was called wrongly are explained."""
    context = error.ctx if isinstance(error, click.UsageError) else None
    return f"; see {context.command_path} --help" if context else ""
