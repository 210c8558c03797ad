"""Find transports by entry point."""

from __future__ import annotations

from importlib.metadata import entry_points

from step3_hetero.errors import ConfigError
from step3_hetero.transport.base import GROUP, Transport


def get_transport(name: str) -> Transport:
    """Import and return one transport.

    Raises:
        ConfigError: no package registers ``name``.
    """
    for entry in entry_points(group=GROUP, name=name):
        found: Transport = entry.load()()
        return found
    raise ConfigError(f"no transport {name!r}")
