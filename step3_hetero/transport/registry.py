"""Find transports by entry point."""

from __future__ import annotations

from importlib.metadata import entry_points

from step3_hetero.errors import ConfigError
from step3_hetero.transport.base import GROUP, Transport


def transport_names() -> list[str]:
    """Return the registered names, without importing any transport."""
    return sorted({ep.name for ep in entry_points(group=GROUP)})


def get_transport(name: str) -> Transport:
    """Import and return one transport.

    Raises:
        ConfigError: no package registers ``name``, two do, or it does not load.
    """
    entries = {ep.value: ep for ep in entry_points(group=GROUP, name=name)}
    if not entries:
        raise ConfigError(f"no transport {name!r}; installed: {', '.join(transport_names())}")
    if len(entries) > 1:
        raise ConfigError(f"transport {name!r} twice: {', '.join(entries)}; uninstall one")
    (entry,) = entries.values()
    try:
        found: Transport = entry.load()()
    except Exception as cause:  # a stranger's package may raise anything
        raise ConfigError(f"transport {name!r} ({entry.value}) does not load: {cause!r}") from cause
    return found
