"""Reading plain values key by key; every refusal names the place, the key and what is allowed."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import TypeVar

from step3_hetero.errors import ConfigError

Made = TypeVar("Made")

MOST = 10**9
"""No count of a pipeline is larger."""
MOST_SECONDS = 3600.0
"""An hour for one micro-batch in one layer is a wrong unit."""


class Keys:
    """One mapping, its dotted path, and how a path becomes a place such as ``plan.yaml:9``."""

    def __init__(self, values: Mapping[str, object], path: str, where: Callable[[str], str]):
        self.values, self.path, self.where = values, path, where
        self.read: set[str] = set()

    @classmethod
    def of(cls, values: object, path: str, where: Callable[[str], str]) -> Keys:
        """Wrap a value that has to be a mapping.

        Raises:
            ConfigError: it is none.
        """
        if not isinstance(values, Mapping):
            place = _place(where, path)
            raise ConfigError(f"{place}expected keys and values, got {_shown(values)}")
        return cls(values, path, where)

    def error(self, key: str, message: str) -> ConfigError:
        """Return the refusal of a key, for the caller to raise."""
        return ConfigError(f"{_place(self.where, f'{self.path}.{key}')}{message}")

    def count(
        self, key: str, default: int | None = None, *, least: int = 1, most: int = MOST
    ) -> int:
        """Return a whole number from ``least`` to ``most``."""
        value = self._value(key, default, f"a whole number from {least}")
        if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= most:
            wanted = f"a whole number from {least} to {most}"
            raise self.error(key, f"expected {wanted}, got {_shown(value)}")
        return value

    def seconds(self, key: str, default: float | None = None) -> float:
        """Return a time in seconds, from 0 to an hour."""
        return self._seconds(key, self._value(key, default, "seconds"))

    def seconds_by_kind(self, key: str) -> dict[str, float]:
        """Return a time for each kind of layer."""
        value = self._value(key, None, "seconds for each kind of layer")
        if not isinstance(value, Mapping):
            message = f"expected seconds for each kind of layer, got {_shown(value)}"
            raise self.error(key, message)
        return {str(kind): self._seconds(f"{key}.{kind}", s) for kind, s in value.items()}

    def text(self, key: str, default: str | None = None) -> str:
        """Return one line of text, not empty unless that is the default."""
        value = self._value(key, default, "a name")
        if isinstance(value, str) and (value == default or (value and value.isprintable())):
            return value
        raise self.error(key, f"expected a name, got {_shown(value)}")

    def one_of(self, key: str, allowed: Sequence[str], default: str | None = None) -> str:
        """Return one of the words that are allowed."""
        value = self._value(key, default, " or ".join(allowed))
        if value not in allowed:
            raise self.error(key, f"expected {' or '.join(allowed)}, got {_shown(value)}")
        return str(value)

    def entries(self, key: str, *, may_be_empty: bool = False) -> list[Keys]:
        """Return the mappings of a list, each with its own path."""
        value = self._value(key, [] if may_be_empty else None, "a list")
        if not isinstance(value, Sequence) or isinstance(value, str):
            raise self.error(key, f"expected a list, got {_shown(value)}")
        if not value and not may_be_empty:
            raise self.error(key, "is empty")
        return [Keys.of(v, f"{self.path}.{key}.{i}", self.where) for i, v in enumerate(value)]

    def made(self, value: Made) -> Made:
        """Return what was made of the keys, once none is left over."""
        self.done()
        return value

    def done(self) -> None:
        """Refuse keys that nobody has read.

        Raises:
            ConfigError: there is one.
        """
        for key in self.values:
            if key not in self.read:
                known = ", ".join(sorted(self.read))
                raise self.error(str(key), f"unknown key; keys: {known}")

    def _value(self, key: str, default: object, wanted: str) -> object:
        self.read.add(key)
        if key in self.values:
            return self.values[key]
        if default is None:
            raise self.error(key, f"missing; expected {wanted}")
        return default

    def _seconds(self, key: str, value: object) -> float:
        if isinstance(value, int | float) and not isinstance(value, bool):
            number = float(value)
            if math.isfinite(number) and 0 <= number <= MOST_SECONDS:
                return number
        wanted = f"seconds, a number from 0 to {MOST_SECONDS:g}"
        raise self.error(key, f"expected {wanted}, got {_shown(value)}")


def _place(where: Callable[[str], str], path: str) -> str:
    place = where(path)
    return f"{path}: " if place == path else f"{place}: {path}: "


def _shown(value: object) -> str:
    if isinstance(value, str | int | float) or value is None:
        return repr(value)[:60]
    return "a list" if isinstance(value, list | tuple) else "keys and values"
