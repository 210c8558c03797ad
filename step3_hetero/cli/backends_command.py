"""``step3-hetero backends``."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import click

from step3_hetero.cli.options import human_bytes, json_option, print_json, print_table

EPILOG = """\b
Examples:
  step3-hetero backends
  step3-hetero backends --json
"""


@click.command("backends", epilog=EPILOG)
@json_option
def command(as_json: bool) -> None:
    """List installed backends: version, devices or why there are none, dtypes."""
    from step3_hetero.registry import backend_names

    found = [_describe(name) for name in backend_names()]
    if as_json:
        print_json(found)
        return
    header = ("backend", "version", "device", "memory", "stored", "computed", "on the wire")
    rows: list[tuple[str, ...]] = []
    for backend in found:
        start = (backend["name"], backend["version"])
        rows += [(*start, *_device_row(d)) for d in backend["devices"]]
        if not backend["devices"]:
            rows.append((*start, f"none: {backend['why']}", "", "", "", ""))
    print_table("backends", header, rows)


def _describe(name: str) -> dict[str, Any]:
    """Describe one backend; one that does not load is listed with its error."""
    from step3_hetero.errors import BackendNotFound
    from step3_hetero.registry import get_backend

    try:
        backend = get_backend(name)
    except BackendNotFound as error:
        return {"name": name, "version": "-", "devices": [], "why": str(error)}
    return {
        "name": name,
        "version": backend.version(),
        "devices": [asdict(d) for d in backend.devices()],
        "why": backend.why_unavailable(),
    }


def _device_row(device: dict[str, Any]) -> tuple[str, ...]:
    dtypes = device["dtypes"]
    lists = (", ".join(dtypes[use]) for use in ("stored", "computed", "wire"))
    return (
        f"{device['name']} ({device['description']})",
        human_bytes(device["memory_bytes"]),
        *lists,
    )
