"""Options and output that several commands share."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol, TypeVar

import click

F = TypeVar("F", bound=Callable[..., Any])

PIPED_WIDTH = 10_000
"""Columns of a table that is not for a terminal."""


class Number(click.FloatRange):
    """A number within bounds. NaN, which no comparison refuses, and infinities are none."""

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> float:
        """Return the number; fail as click's types do."""
        number = float(super().convert(value, param, ctx))
        if not math.isfinite(number):
            self.fail(f"{value} is no finite number.", param, ctx)
        return number


config_argument = click.argument("config", type=click.Path(dir_okay=False))


def set_option(function: F) -> F:
    """Add ``--set KEY=VALUE``."""
    decorated: F = click.option(
        "--set",
        "overrides",
        multiple=True,
        metavar="KEY=VALUE",
        help="Override a config key, e.g. roles.f.backend=cpu. May be repeated.",
    )(function)
    return decorated


def json_option(function: F) -> F:
    """Add ``--json``."""
    decorated: F = click.option(
        "--json", "as_json", is_flag=True, help="Print JSON instead of text."
    )(function)
    return decorated


def print_json(value: Any) -> None:
    """Print one JSON document."""
    click.echo(json.dumps(value, indent=2, ensure_ascii=False))


def print_table(
    title: str, header: Sequence[str], rows: Sequence[Sequence[Any]], *, stderr: bool = False
) -> None:
    """Print a table to the terminal's width; piped, every row is one line, however long."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD)
    for name in header:
        table.add_column(name, overflow="fold")
    for row in rows:
        table.add_row(*[str(cell) for cell in row])
    console = Console(markup=False, emoji=False, stderr=stderr)
    if not console.is_terminal:
        console = Console(width=PIPED_WIDTH, markup=False, emoji=False, stderr=stderr)
    console.print(table, crop=False)


def human_bytes(count: float) -> str:
    """Write bytes for people.

    >>> human_bytes(999), human_bytes(1_900_000), human_bytes(642e9)
    ('999 B', '1.9 MB', '642.0 GB')
    """
    if count < 1000:
        return f"{count:.0f} B"
    for unit in ("kB", "MB", "GB"):
        count /= 1000
        if count < 1000:
            return f"{count:.1f} {unit}"
    return f"{count / 1000:.1f} TB"


class Advance(Protocol):
    """Sets a bar."""

    def __call__(self, done: int, total: int | None = None) -> None:
        """Show how much is done, of how much where that is known."""


@contextmanager
def progress(what: str, *, quiet: bool = False) -> Iterator[Advance]:
    """Show a bar on standard error while it is a terminal; yield what sets it.

    ``quiet`` hides it: a bar would be drawn into an answer that streams to the same terminal.
    Standard output is never touched, so that a file gets the answer and nothing else.
    """
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
    )

    console = Console(stderr=True)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
    )
    with Progress(
        *columns,
        console=console,
        transient=True,
        disable=quiet or not console.is_terminal,
        redirect_stdout=False,
        redirect_stderr=False,
    ) as bar:
        task = bar.add_task(what, total=None)
        yield lambda done, total=None: bar.update(task, completed=done, total=total)
