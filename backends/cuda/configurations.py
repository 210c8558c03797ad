"""Block sizes, warps and stages of each kernel by card, dtype and size: a table, no tuning at run.

The table beside this file was chosen so that every entry compiles without spilling; none was timed
on a card. ``step3-hetero tune --backend cuda`` writes another, which the environment variable
STEP3_HETERO_CUDA_CONFIGURATIONS names.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from step3_hetero.errors import ConfigError

TABLE = Path(__file__).with_name("configurations.json")

VARIABLE = "STEP3_HETERO_CUDA_CONFIGURATIONS"

KEYS = (
    "kernel", "arch", "numbers", "largest", "blocks", "num_warps", "num_stages", "promises"
)  # fmt: skip


@dataclass(frozen=True)
class Configuration:
    """How one kernel runs where its size is at most ``largest``.

    ``numbers`` is the dtype that it multiplies in (``bfloat16``) or the format of its weights or
    cache (``e4m3``, ``e4m3 x e4m3``, ``int8``); ``size`` means rows of an expert for gemm, columns
    of a head for attention, columns of a row for the rest.
    """

    kernel: str
    arch: int
    numbers: str
    largest: int
    blocks: tuple[tuple[str, int], ...]
    num_warps: int
    num_stages: int
    promises: str

    @property
    def meta(self) -> dict[str, int]:
        """Return what Triton takes by keyword."""
        return {
            **dict(self.blocks), "num_warps": self.num_warps, "num_stages": self.num_stages
        }  # fmt: skip

    def block(self, name: str) -> int:
        """Return one block size."""
        return dict(self.blocks)[name]

    def as_json(self) -> dict[str, Any]:
        """Return the entry as the table's file holds it."""
        return {**{key: getattr(self, key) for key in KEYS}, "blocks": dict(self.blocks)}


def read(path: Path) -> tuple[Configuration, ...]:
    """Read a table.

    Raises:
        ConfigError: the file is missing, no JSON, or has an entry of another form.
    """
    try:
        entries = json.loads(path.read_text(encoding="utf-8"))["configurations"]
        return tuple(
            Configuration(**{**e, "blocks": tuple(sorted(e["blocks"].items()))}) for e in entries
        )
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(
            f"{path}: no table of configurations ({type(error).__name__}: {error}); its form is "
            f"{{'configurations': [{{{', '.join(KEYS)}}}, ...]}}; step3-hetero tune writes one"
        ) from None


@cache
def table() -> Sequence[Configuration]:
    """Return the table in force."""
    return read(Path(os.environ.get(VARIABLE, TABLE)))


def configuration(
    kernel: str,
    *,
    arch: int,
    numbers: str,
    size: int,
    entries: Sequence[Configuration] | None = None,
) -> Configuration:
    """Return the entry for a kernel on a card at a size: the first that is large enough.

    A card newer than the table takes the newest entries that it can run.

    Raises:
        ConfigError: there is none.
    """
    every = table() if entries is None else entries
    fitting = [e for e in every if e.kernel == kernel and e.numbers == numbers and e.arch <= arch]
    newest = max((e.arch for e in fitting), default=0)
    found = [e for e in fitting if e.arch == newest and e.largest >= size]
    if not found:
        there = sorted({(e.kernel, e.arch, e.numbers, e.largest) for e in every})
        raise ConfigError(
            f"no configuration of {kernel} in {numbers} at size {size} for sm_{arch}; the table "
            f"has {[t for t in there if t[0] == kernel]}"
        )
    return min(found, key=lambda e: e.largest)


def write(path: Path, entries: Sequence[Configuration], measured: Mapping[str, Any]) -> None:
    """Write a table with what it was measured on, whole or not at all."""
    rows = ",\n  ".join(json.dumps(e.as_json()) for e in entries)
    text = f'{{"measured": {json.dumps(dict(measured))},\n "configurations": [\n  {rows}\n]}}'
    part = path.with_name(path.name + ".part")
    part.write_text(text + "\n", encoding="utf-8")
    part.replace(path)
