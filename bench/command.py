"""How a bench is called: what the package refuses is one line there, too."""

from __future__ import annotations

from typing import Any

import click

from step3_hetero.errors import Step3HeteroError


class BenchCommand(click.Command):
    """A command that says an error of ours without a traceback, and ends with its exit code."""

    def invoke(self, ctx: click.Context) -> Any:
        """Run the bench.

        Raises:
            ClickException: the package refused something; click prints it.
        """
        try:
            return super().invoke(ctx)
        except Step3HeteroError as error:
            said = click.ClickException(str(error))
            said.exit_code = error.exit_code
            raise said from error
