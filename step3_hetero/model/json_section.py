"""Reading a JSON object key by key; every refusal names the file, the line and the key."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from step3_hetero.errors import ConfigError
from step3_hetero.model.json_file import read_json

INT32_MAX = 2**31 - 1

_TOKEN = re.compile(
    r'(?P<key>"(?:[^"\\]|\\.)*")\s*:|"(?:[^"\\]|\\.)*"|(?P<open>[{\[])|(?P<close>[}\]])'
)


class Section:
    """One object of a JSON file.

    A value of null counts as missing: published files write either. Where several keys are given,
    they are spellings of one thing, and the first that is present counts.
    """

    def __init__(self, path: Path, values: dict[str, Any], prefix: tuple[str, ...] = ()) -> None:
        self.path = path
        self.values = values
        self.prefix = prefix

    @classmethod
    def read(cls, path: Path) -> Section:
        """Open a file.

        Raises:
            ConfigError: the file cannot be read or holds no JSON object.
        """
        return cls(path, read_json(path))

    def get(self, *keys: str) -> Any:
        """Return the value of the first key present, of any type; None where all are missing."""
        return self.values.get(self.spelling(*keys))

    def spelling(self, *keys: str) -> str:
        """Return which of the spellings is present, the first one where none is."""
        return next((k for k in keys if self.values.get(k) is not None), keys[0])

    def error(self, key: str, message: str) -> ConfigError:
        """Return the refusal of a key, for the caller to raise."""
        path = (*self.prefix, key)
        return ConfigError(f"{self.path}:{self._line(path)}: {'.'.join(path)}: {message}")

    def section(self, key: str) -> Section:
        """Return the object under a key."""
        value = self._required(key, "an object")
        if not isinstance(value, dict):
            raise self.error(key, f"expected an object, found {value!r}")
        return Section(self.path, value, (*self.prefix, key))

    def integer(
        self, *keys: str, least: int = 1, most: int = INT32_MAX, default: int | None = None
    ) -> int:
        """Return a whole number; required unless there is a default."""
        key = self.spelling(*keys)
        if default is not None and self.get(key) is None:
            return default
        wanted = f"a whole number from {least} to {most}"
        value = self._required(key, wanted)
        if not is_integer(value) or not least <= value <= most:
            raise self.error(key, f"expected {wanted}, found {value!r}")
        return int(value)

    def positive(self, key: str, default: float | None = None) -> float:
        """Return a number above 0; required unless there is a default."""
        if default is not None and self.get(key) is None:
            return default
        value = self._required(key, "a number above 0")
        if not is_finite(value) or not value > 0:
            raise self.error(key, f"expected a number above 0, found {value!r}")
        return float(value)

    def flag(self, key: str) -> bool | None:
        """Return true or false, None where the key is missing."""
        value = self.get(key)
        if value is not None and not isinstance(value, bool):
            raise self.error(key, f"expected true or false, found {value!r}")
        return value

    def only(self, key: str, allowed: object, why: str) -> None:
        """Refuse any value but the one that is available; a missing key stands for it."""
        value = self.get(key)
        if value is not None and (value != allowed or type(value) is not type(allowed)):
            raise self.error(key, f"{value!r} is refused: {why}")

    def _required(self, key: str, wanted: str) -> Any:
        value = self.get(key)
        if value is None:
            raise self.error(key, f"missing; expected {wanted}")
        return value

    def _line(self, path: tuple[str, ...]) -> int:
        """Return the line of a key, of the object it is missing from, or 1."""
        lines = dict(key_lines(self.path.read_text(encoding="utf-8")))
        return lines.get(path) or lines.get(path[:-1]) or 1


def is_integer(value: object) -> bool:
    """Tell whole numbers from everything else, true and false included."""
    return isinstance(value, int) and not isinstance(value, bool)


def is_finite(value: object) -> bool:
    """Tell numbers that a float can hold from everything else: JSON's whole numbers have no end.

    >>> is_finite(1), is_finite(-0.5), is_finite(10**400), is_finite(float("nan")), is_finite(True)
    (True, True, False, False, False)
    """
    if isinstance(value, float) or is_integer(value):
        return abs(value) <= sys.float_info.max  # type: ignore[arg-type]  # a number by now
    return False


def key_lines(text: str) -> Iterator[tuple[tuple[str, ...], int]]:
    """Yield every key of well-formed JSON, with those above it, and the line it stands on.

    >>> list(key_lines('{"a": 1,\\n "b": {"c": ":"}}'))
    [(('a',), 1), (('b',), 2), (('b', 'c'), 2)]
    """
    above: list[str] = []
    key = ""
    line, counted = 1, 0
    for token in _TOKEN.finditer(text):
        if token["key"]:
            key = json.loads(token["key"], strict=False)
            line += text.count("\n", counted, token.start())
            counted = token.start()
            yield (*above[1:], key), line
        elif token["open"]:
            above.append(key)
        elif token["close"]:
            above.pop()
