"""Proxies between the processes of an engine: what a role says of where it listens is changed."""

from __future__ import annotations

import json
import os
import threading

from faults.proxy import FaultyProxy
from step3_hetero.afd import local


def put_between(monkeypatch, role: str, on_line=None) -> dict[str, FaultyProxy]:
    """See to it that each instance of a role, ``f``, is reached through a proxy; return them.

    ``on_line`` takes the lines that the processes write, in the place of standard error.

    They are there by name (``f:0``) once the engine is loaded; an instance that is started again
    gets a new one. The front's own link is spared. Use ``transport.kind: tcp``.
    """
    proxies: dict[str, FaultyProxy] = {}
    start = local.start

    def start_behind_proxy(name, arguments, settings, lines, *more):
        process = start(name, arguments, settings, on_line or lines, *more)
        if name.partition(":")[0] == role:
            reading, writing = os.pipe()
            told, process.report = process.report, os.fdopen(reading, "rb")
            threading.Thread(target=tell, args=(name, told, writing), daemon=True).start()
        return process

    def tell(name, told, writing):
        with told, os.fdopen(writing, "wb") as pipe:
            if line := told.readline():
                said = json.loads(line)
                if name in proxies:  # of the process before it
                    proxies[name].close()
                proxies[name] = FaultyProxy(said["address"], spared=1)
                said["address"] = proxies[name].address
                pipe.write(json.dumps(said).encode() + b"\n")

    monkeypatch.setattr(local, "start", start_behind_proxy)
    return proxies
