"""What ``step3-hetero up`` shows: a table that is kept true, or an event a line."""

from __future__ import annotations

import json
import time
import zlib
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Any, Self

import click

from step3_hetero.cli.seeing import print_paces

if TYPE_CHECKING:
    from rich.table import Table as RichTable

    from step3_hetero.afd.up import Kept
    from step3_hetero.runtime.paces import Paces

COLOURS = ("cyan", "magenta", "green", "yellow", "blue", "bright_red")


class EventLines:
    """Every event as one line of JSON on standard output; what roles say, on standard error."""

    def __enter__(self) -> Self:
        """Return itself."""
        return self

    def __exit__(self, *exc: Any) -> None:
        """Nothing is held."""

    def line(self, name: str, line: str) -> None:
        """Pass on a role's line."""
        click.echo(f"{name} | {line}", err=True)

    def event(self, role: Kept, said: str) -> None:
        """Tell how a role stands now."""
        if role.state == "loading" and role.loaded:
            return  # stages are counted for a bar
        self._print({"event": "role", **role.to_json(), "said": said})

    def up(self, roles: Sequence[Kept], attach: str | None) -> None:
        """Tell that all are ready."""
        self._print({"event": "up", "attach": attach, "roles": [r.to_json() for r in roles]})

    def paces(self, paces: Paces) -> None:
        """Tell how long each member's work took."""
        self._print({"event": "timings", "members": [pace.to_json() for pace in paces.rows()]})

    def _print(self, fact: Mapping[str, Any]) -> None:
        with suppress(BrokenPipeError):  # nobody reads any more; the roles stand all the same
            print(json.dumps({"time_s": round(time.time(), 3), **fact}), flush=True)


class Table:
    """One table of roles. On a terminal it stays at the bottom; elsewhere it is printed once,
    when all are ready, and each change is a line."""

    def __init__(self, stages: Mapping[str, int]) -> None:
        """``stages`` counts what each role has to load."""
        from rich.console import Console
        from rich.live import Live

        self._stages = stages
        self._roles: dict[str, Kept] = {}
        self._is_up = False
        self._console = Console(stderr=True, markup=False, emoji=False, highlight=False)
        self._live: Live | None = None
        if self._console.is_terminal:
            self._live = Live(console=self._console, get_renderable=self._table, transient=True)

    def __enter__(self) -> Self:
        """Begin to show."""
        if self._live is not None:
            self._live.start()
        return self

    def __exit__(self, *exc: Any) -> None:
        """Stop."""
        if self._live is not None:
            self._live.stop()

    def line(self, name: str, line: str) -> None:
        """Show a role's line behind its name, in the role's colour."""
        from rich.text import Text

        colour = COLOURS[zlib.crc32(name.encode()) % len(COLOURS)]
        self._console.print(Text.assemble((f"{name} | ", colour), line), soft_wrap=True)

    def event(self, role: Kept, said: str) -> None:
        """Show a change."""
        self._roles[role.member.name] = role
        if self._live is not None:
            self._live.refresh()
        elif not (role.state == "loading" and role.loaded):
            pid = f"pid {role.handle.pid}" if role.handle and role.handle.pid else ""
            words = (role.member.name, role.state, said, role.address, pid)
            click.echo(" ".join(word for word in words if word), err=True)

    def up(self, roles: Sequence[Kept], attach: str | None) -> None:
        """Show that all are ready."""
        self._is_up = True
        if self._live is None:
            self._console.print(self._table(), soft_wrap=True)
        use = f"; use them with --attach {attach}" if attach else ""
        self._console.print(f"{len(roles)} roles stand{use}; Ctrl-C ends them")

    def paces(self, paces: Paces) -> None:
        """Show how long each member's work took."""
        if self._live is not None:
            self._live.stop()
        print_paces(paces)

    def _table(self) -> RichTable:
        from rich import box
        from rich.table import Table as RichTable

        table = RichTable(box=box.SIMPLE_HEAD)
        for header in ("role", "state", "pid", "address", "restarts"):
            table.add_column(header, overflow="fold")
        for name, role in self._roles.items():
            state, total = role.state, self._stages[role.member.role]
            if state == "loading":
                state = f"loading {role.loaded} of {total}"
            pid = role.handle.pid if role.handle else None
            table.add_row(name, state, str(pid or ""), role.address, str(role.restarts))
        return table
