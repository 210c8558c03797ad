"""Proxies between the processes of an engine: what a role says of where it listens is changed."""

from __future__ import annotations

import os
import threading
from select import select

from faults.proxy import FaultyProxy
from step3_hetero.afd import launch
from step3_hetero.afd.launcher import Reports, tell
from step3_hetero.afd.loglines import LogLines


def put_between(monkeypatch, role: str, on_line=None) -> dict[str, FaultyProxy]:
    """See to it that each instance of a role, ``f``, is reached through a proxy; return them.

    ``on_line`` takes the lines that the processes write, in the place of standard error.

    They are there by name (``f:0``) once the engine is loaded; an instance that is started again
    gets a new one. The front's own link is spared. Use ``transport.kind: tcp``.
    """
    proxies: dict[str, FaultyProxy] = {}
    start = launch.start
    kept = LogLines(on_line) if on_line else None

    def start_behind_proxy(name, arguments, settings, lines, *more):
        process = start(name, arguments, settings, kept or lines, *more)
        if name.partition(":")[0] == role:
            reading, writing = os.pipe()
            told, process.reports = process.reports, Reports(reading)
            threading.Thread(target=pass_on, args=(name, told, writing), daemon=True).start()
        return process

    def pass_on(name, told, writing):
        while told.is_open:
            select([told], [], [])
            for fact in told.read():
                if "address" in fact:
                    if name in proxies:  # of the process before it
                        proxies[name].close()
                    proxies[name] = FaultyProxy(fact["address"], spared=1)
                    fact["address"] = proxies[name].address
                tell(writing, **fact)
        os.close(writing)

    monkeypatch.setattr(launch, "start", start_behind_proxy)
    return proxies
