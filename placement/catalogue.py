"""The device catalogue: what each card can do and costs, and where each number is from.

The built-in cards stand in ``devices.yaml``. A user's file has the same form and lies over it key
by key::

    cards:
      h800: {usd_per_hour: 1.80}
      l20: {usd_per_hour: 0.35, sources: {usd_per_hour: "our contract, March"}}
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import Path
from types import MappingProxyType
from typing import Any

from step3_hetero.errors import ConfigError, PlacementError
from step3_hetero.placement.catalogue_file import Merged, lay_over

BUILT_IN = Path(__file__).with_name("devices.yaml")

BACKENDS: Mapping[str, str] = MappingProxyType({"nvidia": "cuda", "ascend": "ascend"})
"""The backend that drives a vendor's cards, where the file names none."""

NEEDED = ("title", "vendor", "memory_gb", "memory_bandwidth_gb_per_s", "server.cards")
"""What no card can be without."""

GIGA = 1e9
TERA = 1e12
BITS_PER_BYTE = 8


@dataclass(frozen=True, slots=True)
class Server:
    """One server of a card's usual type. None: not known, and never assumed."""

    cards: int
    host_nics: int | None  # shared by all cards; these reach any vendor
    host_nic_bytes_per_s: float | None  # one host NIC, each direction
    pcie_bytes_per_s: float | None  # card <-> host memory, each direction, each card


@dataclass(frozen=True, slots=True)
class Card:
    """One accelerator. None: not known."""

    name: str
    title: str
    vendor: str
    backend: str
    driver_names: tuple[str, ...]  # as drivers report it: "NVIDIA H20", "Ascend910B4"
    memory_bytes: int
    memory_bandwidth_bytes_per_s: float
    flops_per_s: Mapping[str, float] = field(hash=False)  # by dtype, dense; absent: it has none
    scale_up_bytes_per_s: float | None  # each way, within the server (NVLink, HCCS)
    nic_bytes_per_s: float | None  # the card's own, each way; reaches cards of its vendor only
    usd_per_hour: float | None
    usd_per_hour_range: tuple[float, float] | None
    server: Server
    sources: Mapping[str, str] = field(hash=False)  # by field: "flops_per_s.bf16", "server.cards"

    def price(self) -> float:
        """Return dollars per hour.

        Raises:
            PlacementError: the card has no price; says which key of a catalogue file gives it one.
        """
        if self.usd_per_hour is None:
            raise self.lacks("usd_per_hour", "USD per hour")
        return self.usd_per_hour

    def lacks(self, key: str, unit: str) -> PlacementError:
        """Return an error about a figure that the catalogue does not have, by its file's key."""
        return PlacementError(
            f"{self.name} has no {key} in the catalogue; write cards.{self.name}.{key} ({unit}) "
            "in a file and name it with --catalogue"
        )


class Catalogue:
    """Cards by name."""

    def __init__(self, cards: Mapping[str, Card]) -> None:
        self._cards = dict(cards)

    @classmethod
    def read(cls, *files: str | Path) -> Catalogue:
        """Read the built-in cards, then lay each file over them, key by key.

        Raises:
            ConfigError: a file cannot be read or breaks a rule, or a card lacks what every card
                needs; one line, ``mine.yaml:7: ...``.
        """
        merged: Merged = {}
        lay_over(merged, BUILT_IN, built_in=True)
        for file in files:
            lay_over(merged, Path(file))
        return cls({name: _card(name, merged) for name in merged})

    def names(self) -> list[str]:
        """Return every card's name, the built-in ones first."""
        return list(self._cards)

    def card(self, name: str) -> Card:
        """Return a card by its name; capitals do not matter.

        Raises:
            PlacementError: there is none of this name.
        """
        found = self._cards.get(name.strip().lower())
        if found is None:
            near = get_close_matches(name.lower(), self._cards, n=1)
            meant = f"; did you mean {near[0]}?" if near else ""
            raise PlacementError(f"unknown card {name!r}{meant}; cards: {', '.join(self._cards)}")
        return found

    def by_driver_name(self, reported: str) -> Card | None:
        """Return the card that a driver reports under this name, as in "NVIDIA H20"."""
        wanted = reported.strip().lower()
        for card in self._cards.values():
            if wanted in (name.lower() for name in card.driver_names):
                return card
        return None


_NUMBERS: Mapping[str, tuple[str, float]] = MappingProxyType(
    {
        "memory_gb": ("memory_bytes", GIGA),
        "memory_bandwidth_gb_per_s": ("memory_bandwidth_bytes_per_s", GIGA),
        "tflops.bf16": ("flops_per_s.bf16", TERA),
        "tflops.fp8": ("flops_per_s.fp8", TERA),
        "tflops.int8": ("flops_per_s.int8", TERA),
        "scale_up_gb_per_s": ("scale_up_bytes_per_s", GIGA),
        "nic_gbit_per_s": ("nic_bytes_per_s", GIGA / BITS_PER_BYTE),
        "usd_per_hour": ("usd_per_hour", 1),
        "usd_per_hour_range": ("usd_per_hour_range", 1),
        "server.cards": ("server.cards", 1),
        "server.host_nics": ("server.host_nics", 1),
        "server.host_nic_gbit_per_s": ("server.host_nic_bytes_per_s", GIGA / BITS_PER_BYTE),
        "server.pcie_gb_per_s": ("server.pcie_bytes_per_s", GIGA),
    }
)
"""A file's key -> the field of `Card` and its size in the field's unit."""


def _card(name: str, merged: Merged) -> Card:
    """Make a card of what the files say of it."""
    stated = merged[name]
    plain = {key: found.value for key, found in stated.items()}
    missing = [key for key in NEEDED if plain.get(key) is None]
    if missing:
        raise ConfigError(
            f"{stated[''].place}: cards.{name} lacks {', '.join(missing)}; "
            f"a new card needs {', '.join(NEEDED)}"
        )
    vendor = plain["vendor"]
    backend = plain.get("backend") or BACKENDS.get(vendor)
    if backend is None:
        raise ConfigError(
            f"{stated['vendor'].place}: cards.{name}.vendor: {vendor!r} has no backend of its own "
            f"({', '.join(BACKENDS)} have); write cards.{name}.backend"
        )
    numbers = {
        field: _scaled(plain[key], size) for key, (field, size) in _NUMBERS.items() if key in plain
    }
    sources = {
        field: stated[key].source
        for key, (field, _) in _NUMBERS.items()
        if key in stated and stated[key].source
    }
    return _assemble(name, backend, plain, numbers, sources)


def _scaled(value: Any, size: float) -> Any:
    return value if size == 1 or value is None else value * size


def _assemble(
    name: str,
    backend: str,
    plain: Mapping[str, Any],
    numbers: Mapping[str, Any],
    sources: Mapping[str, str],
) -> Card:
    dtypes = ("bf16", "fp8", "int8")
    flops = {d: numbers[f"flops_per_s.{d}"] for d in dtypes if numbers.get(f"flops_per_s.{d}")}
    return Card(
        name=name,
        title=plain["title"],
        vendor=plain["vendor"],
        backend=backend,
        driver_names=tuple(plain.get("driver_names") or ()),
        memory_bytes=round(numbers["memory_bytes"]),
        memory_bandwidth_bytes_per_s=numbers["memory_bandwidth_bytes_per_s"],
        flops_per_s=MappingProxyType(flops),
        scale_up_bytes_per_s=numbers.get("scale_up_bytes_per_s"),
        nic_bytes_per_s=numbers.get("nic_bytes_per_s"),
        usd_per_hour=numbers.get("usd_per_hour"),
        usd_per_hour_range=numbers.get("usd_per_hour_range"),
        server=Server(
            cards=numbers["server.cards"],
            host_nics=numbers.get("server.host_nics"),
            host_nic_bytes_per_s=numbers.get("server.host_nic_bytes_per_s"),
            pcie_bytes_per_s=numbers.get("server.pcie_bytes_per_s"),
        ),
        sources=MappingProxyType(dict(sources)),
    )
