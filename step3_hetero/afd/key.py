"""The key that processes prove to each other before they talk."""

from __future__ import annotations

import os

from step3_hetero.config import Config

VARIABLE = "STEP3_HETERO_KEY"
"""The environment's way of giving the key, where there is no file for it."""

LEAST_BYTES, MOST_BYTES = 16, 4096


def shared_key(config: Config) -> bytes | None:
    """Return the key of ``transport.key_file``, else of the environment; None without either.

    Raises:
        ConfigError: the file cannot be read, others may read it, or the key is too short or long.
    """
    name = config.transport.key_file
    if name is None:
        said = os.environ.get(VARIABLE)
        return None if said is None else _checked(config, said.encode(), VARIABLE)
    path = config.folder / name
    try:
        if path.stat().st_mode & 0o077:
            raise config.error("transport.key_file", f"others may read {str(path)!r}; chmod 600 it")
        with path.open("rb") as file:
            return _checked(config, file.read(MOST_BYTES + 1).strip(), str(path))
    except OSError as cause:
        raise config.error("transport.key_file", f"{str(path)!r}: {cause.strerror}") from cause


def _checked(config: Config, key: bytes, where: str) -> bytes:
    if not LEAST_BYTES <= len(key) <= MOST_BYTES:
        raise config.error(
            "transport.key_file",
            f"{where} holds a key of {len(key)} bytes; allowed: {LEAST_BYTES} to {MOST_BYTES}",
        )
    return key
