"""Reading the JSON files that lie beside a checkpoint."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

from step3_hetero.errors import ConfigError


def read_json(path: Path) -> dict[str, Any]:
    """Return the object that a JSON file holds.

    Raises:
        ConfigError: the file cannot be read, is no JSON, names a key twice, or holds something
            else than an object.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=no_duplicates)
    except OSError as cause:
        raise ConfigError(f"{path}: cannot be read: {cause.strerror}") from cause
    except UnicodeDecodeError as cause:
        raise ConfigError(f"{path}: not UTF-8: {cause}") from cause
    except json.JSONDecodeError as cause:
        raise ConfigError(f"{path}:{cause.lineno}: not JSON: {cause.msg}") from cause
    except ValueError as cause:  # a key twice, or more digits than Python reads
        raise ConfigError(f"{path}: cannot be read: {cause}") from cause
    except RecursionError as cause:
        raise ConfigError(f"{path}: nested too deeply") from cause
    if not isinstance(value, dict):
        raise ConfigError(f"{path}: expected an object, found {type(value).__name__}")
    return value


def no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return an object's pairs as a dict; ``json`` by itself would keep the last of two.

    Raises:
        ValueError: a key stands there twice.
    """
    found = dict(pairs)
    if len(found) < len(pairs):
        [(twice, _)] = Counter(key for key, _ in pairs).most_common(1)
        raise ValueError(f"{twice!r} stands there twice")
    return found
