"""How a bench is called: what the package refuses is one line there, too."""

from __future__ import annotations

from typing import Any

import click

from step3_hetero.errors import Step3HeteroError


class BenchCommand(click.Command):
    """A command that says an error of ours without a traceback, and ends with its exit code."""

    def invoke(self, ctx: click.Context) -> Any:
        """Run the bench; an error of the package is printed, and ends it."""
        try:
            return super().invoke(ctx)
        except Step3HeteroError as error:
            click.echo(f"Error: {error}", err=True)
            ctx.exit(error.exit_code)
