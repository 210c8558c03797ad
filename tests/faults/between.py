"""Proxies between the processes of an engine: what a role says of where it listens is changed."""

from __future__ import annotations

import json
import os
import threading

from faults.proxy import FaultyProxy
from step3_hetero.afd import launch
from step3_hetero.afd.launcher import Reports


def put_between(monkeypatch, role: str) -> dict[str, FaultyProxy]:
    """See to it that each instance of a role, ``f``, is reached through a proxy; return them.

    They are there by name (``f:0``) once the engine is loaded; an instance that is started again
    gets a new one. The front's own link is spared. Use ``transport.kind: tcp``.
    """
    proxies: dict[str, FaultyProxy] = {}
    start = launch.start

    def start_behind_proxy(name, *arguments):
        process = start(name, *arguments)
        if name.partition(":")[0] == role:
            reading, writing = os.pipe()
            told, process.reports = process.reports, Reports(reading)
            os.set_blocking(told.fileno(), True)
            threading.Thread(target=tell, args=(name, told, writing), daemon=True).start()
        return process

    def tell(name, told, writing):
        with os.fdopen(writing, "wb", buffering=0) as pipe:
            while told.is_open:
                for fact in told.read():
                    if "address" in fact:
                        if name in proxies:  # of the process before it
                            proxies[name].close()
                        proxies[name] = FaultyProxy(fact["address"], spared=1)
                        fact["address"] = proxies[name].address
                    pipe.write(json.dumps(fact).encode() + b"\n")

    monkeypatch.setattr(launch, "start", start_behind_proxy)
    return proxies
