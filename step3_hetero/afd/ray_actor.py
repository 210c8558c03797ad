"""A role inside a Ray actor: the same role, its facts asked for instead of written to a pipe."""

from __future__ import annotations

import os
import queue
from importlib import import_module
from typing import Any

from step3_hetero.afd.drain import Drain
from step3_hetero.afd.key import VARIABLE

FACTS_S = 2.0
"""How long a question for facts waits for one."""


class RoleActor:
    """One instance of a role. Needs three threads: it serves, is asked for facts, and to end."""

    def __init__(self) -> None:
        self._drain = Drain(0.0)
        self._facts: queue.SimpleQueue[dict[str, Any]] = queue.SimpleQueue()

    def serve(self, line: str, name: str, number: int, address: str, key: str) -> None:
        """Be the role until its front has gone. ``line`` is that of `local.Given`."""
        from step3_hetero.afd.local import Given, serve_role

        os.environ[VARIABLE] = key
        given = Given.read(line)
        self._facts.put({"pid": os.getpid()})
        serve_role(
            given.config(),
            name,
            number,
            address or f"{import_module('ray.util').get_node_ip_address()}:0",
            lambda **facts: self._facts.put(facts),
            self._drain,
            ablate=given.ablate,
            stands=given.stands,
        )

    def facts(self) -> list[dict[str, Any]]:
        """Return the facts that have come since the last time, waiting a little for the first."""
        found: list[dict[str, Any]] = []
        try:
            found.append(self._facts.get(timeout=FACTS_S))
            while True:
                found.append(self._facts.get_nowait())
        except queue.Empty:
            return found

    def ask(self) -> None:
        """Let it finish what is under way and end."""
        self._drain.ask()
