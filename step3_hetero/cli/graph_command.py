"""``step3-hetero graph``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from step3_hetero.cli.options import (
    config_argument,
    json_option,
    print_json,
    print_table,
    set_option,
)
from step3_hetero.errors import RequestError

EPILOG = """\b
Examples:
  step3-hetero graph examples/digits.yaml
  step3-hetero graph examples/digits.yaml --svg graph.svg
  step3-hetero graph examples/digits.yaml --json
"""


@click.command("graph", epilog=EPILOG)
@config_argument
@click.option("--svg", type=click.Path(dir_okay=False), help="Write a drawing to this file.")
@set_option
@json_option
def command(config: str, svg: str | None, overrides: tuple[str, ...], as_json: bool) -> None:
    """Draw a model's stages and edges, coloured by role; like layers are one row.

    No backend is asked: the roles' backends need not be installed.
    """
    from step3_hetero.config import Config
    from step3_hetero.graph.draw import draw
    from step3_hetero.runtime.resolving import stage_graph

    read = Config.read(Path(config), list(overrides))
    graph = stage_graph(read)
    role_of = read.assign([s.name for s in graph.stages])
    if svg:
        _write(Path(svg), draw(graph, role_of))
        click.echo(f"wrote {svg}", err=True)
    if as_json:
        print_json(graph_json(graph, role_of))
    elif not svg:
        rows = [_group_row(group, role_of) for group in graph.groups()]
        print_table(graph.name, ("stages", "role", "takes", "gives", "weights"), rows)


def _write(path: Path, text: str) -> None:
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as cause:
        raise RequestError(f"--svg: {path} cannot be written: {cause.strerror}") from cause


def _group_row(group: list[Any], role_of: Any) -> tuple[str, ...]:
    from step3_hetero.config import stage_ranges

    stage = group[0]
    ports = (", ".join(_port(t) for t in side) or "-" for side in (stage.takes, stage.gives))
    roles = ", ".join(sorted({role_of[s.name] for s in group}))
    elements = sum(s.elements for s in group)
    return (stage_ranges([s.name for s in group]), roles, *ports, f"{elements:,}")


def _port(tensor: Any) -> str:
    return f"{tensor.name} ({', '.join(tensor.dims)}) {tensor.dtype}"


def graph_json(graph: Any, role_of: Any) -> dict[str, Any]:
    """Return stages, edges and groups as plain data."""
    from dataclasses import asdict

    return {
        "model": graph.name,
        "stages": [
            {
                "name": s.name,
                "kind": s.kind,
                "role": role_of[s.name],
                "spec": asdict(s.spec),
                "weights": s.elements,
                "params": [
                    {"name": p.name, "tensors": dict(p.tensors), "shard": p.shard} for p in s.params
                ],
            }
            for s in graph.stages
        ],
        "edges": [asdict(e) for e in graph.edges],
        "groups": [[s.name for s in group] for group in graph.groups()],
    }
