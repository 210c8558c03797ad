"""Options that show where an engine's time goes: a trace, a table, and metrics on a port."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from step3_hetero.cli.loading import load_engine
from step3_hetero.cli.options import human_bytes, print_table

if TYPE_CHECKING:
    from step3_hetero.runtime.engine import Engine
    from step3_hetero.runtime.paces import Paces
    from step3_hetero.runtime.timeline import Timeline

F = TypeVar("F", bound=Callable[..., Any])


@dataclass(frozen=True)
class Seeing:
    """What is to be shown of a run."""

    trace: str | None = None
    timings: bool = False
    metrics_port: int | None = None


def seeing_options(function: F) -> F:
    """Add ``--trace``, ``--timings`` and ``--metrics-port``; they come as one `Seeing`."""

    @wraps(function)  # the options that a command has already come along in __click_params__
    def wrapped(
        *args: Any, trace: str | None, timings: bool, metrics_port: int | None, **rest: Any
    ) -> Any:
        return function(*args, seeing=Seeing(trace, timings, metrics_port), **rest)

    decorated: Any = click.option(
        "--metrics-port",
        type=click.IntRange(0, 65535),
        metavar="PORT",
        help="Prometheus metrics at http://127.0.0.1:PORT/metrics meanwhile; 0 takes a free one.",
    )(wrapped)
    decorated = click.option(
        "--timings", is_flag=True, help="Print where the time went, on standard error."
    )(decorated)
    shown: F = click.option(
        "--trace", metavar="FILE", help="Write a Chrome/Perfetto trace: one row an instance."
    )(decorated)
    return shown


@contextmanager
def seen_engine(
    config: str, overrides: Sequence[str], seeing: Seeing, **options: Any
) -> Iterator[Engine]:
    """Load an engine as `load_engine` does and show at the end what was asked for.

    Raises:
        RequestError: the trace cannot be written, or the port not be taken.
    """
    from step3_hetero.placement.written import check_writable
    from step3_hetero.runtime.timeline import Timeline

    timeline = None
    if seeing.trace is not None:
        check_writable("--trace", seeing.trace)
        timeline = options["timeline"] = Timeline()
    if seeing.metrics_port is not None:
        from step3_hetero.serve.metrics import require_client

        require_client()
    with ExitStack() as stack:
        engine = stack.enter_context(load_engine(config, overrides, **options))
        if seeing.metrics_port is not None:
            from step3_hetero.serve.metrics import serve_metrics

            port = stack.enter_context(serve_metrics(engine, seeing.metrics_port))
            click.echo(f"metrics at http://127.0.0.1:{port}/metrics", err=True)
        start = time.monotonic()
        yield engine
        seconds = time.monotonic() - start
    if seeing.timings:
        print_timings(engine, seconds)
    if timeline is not None:
        write_trace(Path(str(seeing.trace)), timeline)


def write_trace(path: Path, timeline: Timeline) -> None:
    """Write a timeline as a trace, whole or not at all, and say so on standard error."""
    from step3_hetero.placement.written import write_whole
    from step3_hetero.runtime.trace_file import bubbles, chrome_trace

    spans = timeline.spans()
    write_whole(path, json.dumps(chrome_trace(spans, timeline.dropped)))
    idle = ", ".join(f"{b.who} {b.idle_s / max(b.window_s, 1e-9):.0%}" for b in bubbles(spans))
    click.echo(f"wrote {path}: {len(spans)} spans; idle between them: {idle or 'none'}", err=True)


def print_timings(engine: Engine, seconds: float) -> None:
    """Print the table of where the time went, the longest first, on standard error."""
    entries = sorted(engine.executor.clock.to_json(), key=lambda e: -float(e["seconds"]))
    rows = [
        (
            e["role"], e["stage"], e["calls"], f"{e['seconds']:.3f}",
            f"{e['seconds'] / max(seconds, 1e-9):.1%}", _ms(e["median_s"]), _ms(e["p99_s"]),
            human_bytes(e["bytes"]) if e["bytes"] else "",
        )
        for e in entries
    ]  # fmt: skip
    header = ("role", "what", "calls", "seconds", "of the run", "median ms", "p99 ms", "sent")
    print_table(f"where {seconds:.2f} s went", header, rows, stderr=True)
    if engine.executor.paces is not None:
        print_paces(engine.executor.paces)


def print_paces(paces: Paces) -> None:
    """Print the table of how long each member's calls took, on standard error."""
    from step3_hetero.runtime.paces import table_of

    print_table("calls by member", *table_of(paces.rows()), stderr=True)


def timings_json(engine: Engine) -> dict[str, Any]:
    """Return what ``--json`` prints of where the time went, and of each member's pace."""
    executor = engine.executor
    members = [] if executor.paces is None else [pace.to_json() for pace in executor.paces.rows()]
    return {"stages": executor.clock.to_json(), "members": members}


def _ms(seconds: float) -> str:
    return f"{seconds * 1e3:.3f}"
