"""A measured device as a file: what the planner takes instead of the data sheet.

::

    version: 1
    backend: cpu
    device: {name: "cpu:0", description: ..., memory_bytes: ..., card: null}
    dtype: bfloat16
    bandwidth_bytes_per_s: ...     # weights read by a product with one row
    flops_per_s: ...               # at the largest number of rows
    call_s: ...                    # of the smallest product: the fixed cost of a call
    linear:    [{rows, inner, columns, seconds}]
    attention: [{rows, context, heads, kv_heads, head_dim, seconds}]
    stages:    [{kind, key, rows, context, seconds}]   # of a config's model, with --config
    choose:    [{rows, seconds}]                       # sampling from logits, with --config
    step_s:    [{rows, seconds}]                       # the engine around the stages, with --config
    crossing:  [{rows, columns, seconds}]              # to the host and back, with --config
    links:     {peers: null, bytes_per_s: null, message_s: null}

``links`` is null until ``profile --edge`` fills it: ``peers`` lists what was joined, the other
two are per direction.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Self

from step3_hetero.config.document import Document, refuse
from step3_hetero.errors import ConfigError, PlacementError
from step3_hetero.placement.efficiency import Efficiency
from step3_hetero.placement.pools import Pool
from step3_hetero.placement.written import write_whole

VERSION = 1

CARD_DTYPE = {"bfloat16": "bf16", "float8_e4m3fn": "fp8", "int8": "int8", "float32": "bf16"}
"""The catalogue's precision that a profile's dtype stands for; a host computes bf16 in fp32."""

LISTS = ("linear", "attention", "stages", "choose", "step_s", "crossing")
NUMBERS = ("bandwidth_bytes_per_s", "flops_per_s", "call_s")


@dataclass(frozen=True, slots=True)
class Links:
    """What joins the device to others, each direction; None: not measured."""

    peers: tuple[str, ...] | None = None
    bytes_per_s: float | None = None
    message_s: float | None = None


@dataclass(frozen=True, slots=True)
class Profile:
    """The file's content; the module's text says what each key means."""

    backend: str
    device: Mapping[str, Any]
    dtype: str
    bandwidth_bytes_per_s: float
    flops_per_s: float
    call_s: float
    linear: Sequence[Mapping[str, Any]]
    attention: Sequence[Mapping[str, Any]]
    stages: Sequence[Mapping[str, Any]] = ()
    choose: Sequence[Mapping[str, Any]] = ()
    step_s: Sequence[Mapping[str, Any]] = ()
    crossing: Sequence[Mapping[str, Any]] = ()
    links: Links = field(default_factory=Links)

    def to_json(self) -> dict[str, Any]:
        """Return the file's content."""
        values = asdict(self)
        for key in LISTS:
            values[key] = [dict(entry) for entry in values[key]]
        peers = self.links.peers
        values["links"] = asdict(self.links) | {"peers": None if peers is None else list(peers)}
        return {"version": VERSION, **values, "device": dict(self.device)}

    def write(self, path: Path) -> None:
        """Write the file, whole or not at all."""
        import yaml

        write_whole(path, yaml.safe_dump(self.to_json(), sort_keys=False, width=100))

    @classmethod
    def read(cls, path: Path) -> Self:
        """Read a file.

        Raises:
            ConfigError: it cannot be read, is of another version, or a figure is missing or absurd.
        """
        document = Document.read(path)
        refuse(document.problems)
        values = dict(document.values)
        for key, message in _problems(values, cls.__dataclass_fields__):
            place = document.place(key.split(".")).text
            again = "measure it again with step3-hetero profile"
            raise ConfigError(f"{place}: {key}: {message}; {again}")
        del values["version"]
        links = values["links"] or {}
        peers = links.get("peers")
        values["links"] = Links(**{**links, "peers": None if peers is None else tuple(peers)})
        return cls(**values)

    def applied(self, pools: Sequence[Pool]) -> list[Pool]:
        """Return the pools with this device's card as measured.

        Raises:
            PlacementError: no pool is of the card that was measured.
        """
        card = self.device.get("card")
        if card not in [pool.card.name for pool in pools]:
            names = ", ".join(pool.name for pool in pools)
            raise PlacementError(
                f"--profile of {self.device['name']}: it measured the card {card!r}, the pools "
                f"are {names}; measure with --card, or plan with that card"
            )
        return [self._measured(pool) if pool.card.name == card else pool for pool in pools]

    def _measured(self, pool: Pool) -> Pool:
        precision = CARD_DTYPE[self.dtype]
        sheet = pool.card.flops_per_s
        reached = self.flops_per_s / sheet[precision] if precision in sheet else 1.0
        flops = {p: rate * reached for p, rate in sheet.items()} | {precision: self.flops_per_s}
        nic = self.links.bytes_per_s or pool.card.nic_bytes_per_s
        card = replace(
            pool.card,
            flops_per_s=flops,
            memory_bandwidth_bytes_per_s=self.bandwidth_bytes_per_s,
            nic_bytes_per_s=nic,
        )
        message_s = self.links.message_s or pool.efficiency.message_s
        measured = Efficiency(1.0, 1.0, message_s, calibrated=True, call_s=self.call_s)
        return replace(pool, card=card, efficiency=measured)


def _positive(value: object) -> bool:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    return math.isfinite(value) and value > 0


def _problems(values: Mapping[str, Any], fields: Iterable[str]) -> Iterator[tuple[str, str]]:
    """Yield each key that is wrong and what is wrong with it."""
    known = {"version", *fields}
    yield from ((k, f"unknown; keys: {', '.join(sorted(known))}") for k in values if k not in known)
    yield from ((k, "missing") for k in sorted(known - values.keys()))
    if values["version"] != VERSION:
        yield "version", f"expected {VERSION}, found {values['version']!r}"
    for key in NUMBERS:
        if not _positive(values[key]):
            yield key, f"expected a positive number, found {values[key]!r}"
    for key in LISTS:
        yield from _list_problems(key, values[key])
    if not isinstance(values["device"], dict) or "name" not in values["device"]:
        yield "device", "expected the device's name, memory_bytes and card"
    if values["dtype"] not in CARD_DTYPE:
        yield "dtype", f"expected one of {', '.join(CARD_DTYPE)}"
    yield from _link_problems(values["links"] or {})


def _list_problems(key: str, entries: Any) -> Iterator[tuple[str, str]]:
    if not isinstance(entries, list):
        yield key, f"expected a list, found {entries!r}"
        return
    for n, entry in enumerate(entries):
        if not isinstance(entry, dict) or not _positive(entry.get("seconds")):
            yield f"{key}.{n}", f"expected seconds above 0, found {entry!r}"


def _link_problems(links: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    for key, value in links.items():
        if key not in Links.__dataclass_fields__:
            yield f"links.{key}", "unknown; keys: peers, bytes_per_s, message_s"
        elif key != "peers" and value is not None and not _positive(value):
            yield f"links.{key}", f"expected a positive number, found {value!r}"
