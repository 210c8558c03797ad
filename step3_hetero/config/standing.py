"""What roles that stand by, or that somebody else starts, ask of the rest of a config."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from step3_hetero.config.document import Document, Problem

if TYPE_CHECKING:
    from step3_hetero.config.schema import Config


def standing_problems(config: Config, name: str, document: Document) -> Iterator[Problem]:
    """Yield what is wrong with a role's ``spares`` and ``hosts``."""
    role = config.roles[name]

    def problem(key: str, message: str) -> Problem:
        place = document.place(("roles", name, key))
        return Problem(place, f"roles.{name}.{key}: {message}")

    if config.runtime.processes == "one":
        alone = "with runtime.processes: one; set that to per-role"
        if role.spares:
            yield problem("spares", f"{role.spares} refused; allowed: 0 {alone}")
        if role.hosts is not None:
            yield problem("hosts", f"a list refused; leave it out {alone}")
        return
    if role.spares and role.ep * role.tp > 1:
        said = f"{role.spares} with ep or tp above 1 is not available yet; use 0"
        yield problem("spares", said)
    if role.hosts is None:
        return
    if role.tp > 1:
        yield problem("hosts", "a list with tp above 1 is not available yet; leave it out")
        return
    wanted = role.instances + role.spares
    if len(role.hosts) != wanted:
        said = f"expected instances + spares = {wanted}, got {len(role.hosts)} addresses"
        yield problem("hosts", said)
    if config.transport.kind == "inproc":
        yield problem("hosts", "inproc reaches no other process; use tcp, or shm here")
