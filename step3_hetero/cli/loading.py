"""Loading an engine with a bar on standard error."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from step3_hetero.cli.options import progress

if TYPE_CHECKING:
    from step3_hetero.runtime.engine import Engine


@contextmanager
def load_engine(config: str, overrides: Sequence[str], **options: Any) -> Iterator[Engine]:
    """Load the engine of a config file; close it at the end."""
    from step3_hetero.api import load
    from step3_hetero.config import Config

    read = Config.read(Path(config), list(overrides))
    loaded = 0
    with progress("loading stages") as advance:

        def on_stage(name: str) -> None:
            nonlocal loaded
            loaded += 1
            advance(loaded)

        engine = load(read, on_stage=on_stage, **options)
    with engine:
        yield engine
