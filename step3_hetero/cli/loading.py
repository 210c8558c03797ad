"""Loading an engine with a bar on standard error."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from step3_hetero.cli.options import progress
from step3_hetero.cli.stopping import sigterm_stops

if TYPE_CHECKING:
    from step3_hetero.runtime.engine import Engine

F = TypeVar("F", bound=Callable[..., Any])


def roles_options(function: F) -> F:
    """Add ``--launcher`` and ``--attach``; they come as ``roles``, options of ``api.load``."""

    @wraps(function)
    def wrapped(*args: Any, launcher: str, attach: str | None, **rest: Any) -> Any:
        return function(*args, roles={"launcher": launcher, "attach": attach}, **rest)

    decorated: Any = click.option(
        "--launcher",
        type=click.Choice(["local", "ray"]),
        default="local",
        show_default=True,
        help="Who starts the roles of processes: per-role.",
    )(wrapped)
    shown: F = click.option(
        "--attach",
        type=click.Path(dir_okay=False),
        metavar="FILE",
        help="Use the roles that step3-hetero up keeps and wrote there.",
    )(decorated)
    return shown


@contextmanager
def load_engine(config: str, overrides: Sequence[str], **options: Any) -> Iterator[Engine]:
    """Load the engine of a config file; close it at the end, also if SIGTERM comes."""
    from step3_hetero.api import load
    from step3_hetero.config import Config

    read = Config.read(Path(config), list(overrides))
    loaded = 0
    with sigterm_stops(), ExitStack() as stack:
        with progress("loading stages") as advance:

            def on_stage(name: str) -> None:
                nonlocal loaded
                loaded += 1
                advance(loaded)

            engine = stack.enter_context(load(read, on_stage=on_stage, **options))
        yield engine
