"""Servers, racks and links as they stand, instead of pools of one kind of server.

::

    version: 1
    racks:                                  # may be left out: no uplink limits anything
      - {name: r1, uplink_gbit_per_s: 3200} # each way; null: not limiting
    servers:
      - {rack: r1, card: h800, count: 4}    # cards and NICs as the catalogue has them
      - {rack: r1, card: ascend-910b, count: 8, cards: 8, host_nics: 1, host_nic_gbit_per_s: 400,
         pcie_gb_per_s: 25}
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Self

from step3_hetero.config.document import Document, refuse
from step3_hetero.errors import ConfigError, PlacementError
from step3_hetero.placement.catalogue import BITS_PER_BYTE, GIGA, Card, Catalogue
from step3_hetero.placement.efficiency import efficiency_of
from step3_hetero.placement.pools import Pool

MOST_SERVERS = 10**7
MOST_IN_SERVER = 1024
MOST_GBIT = 1e7

SERVER_KEYS = (
    "rack", "card", "count", "cards", "host_nics", "host_nic_gbit_per_s", "pcie_gb_per_s"
)  # fmt: skip
RACK_KEYS = ("name", "uplink_gbit_per_s")


@dataclass(frozen=True, slots=True)
class Servers:
    """``count`` like servers in one rack; ``card`` has the server as it stands."""

    rack: str
    card: Card
    count: int
    pool: str


@dataclass(frozen=True, slots=True)
class Inventory:
    """All servers, and each rack's uplink in bytes per second each way; inf: not limiting."""

    servers: tuple[Servers, ...]
    uplinks: Mapping[str, float]

    @classmethod
    def read(cls, path: Path, catalogue: Catalogue, excluded: Collection[str] = ()) -> Self:
        """Read a file, without the racks excluded.

        Raises:
            ConfigError: it cannot be read, or a key is unknown, missing or absurd; with its line.
            PlacementError: a card is unknown, an excluded rack does not exist, nothing is left.
        """
        document = Document.read(path)
        refuse(document.problems)
        reader = _Reader(document, catalogue)
        uplinks = reader.racks()
        servers = reader.servers(uplinks)
        racks = {s.rack for s in servers}
        for name in excluded:
            if name not in racks:
                known = ", ".join(sorted(racks)[:8])
                raise PlacementError(f"--exclude rack:{name}: no such rack; racks: {known}")
        kept = tuple(s for s in servers if s.rack not in excluded)
        if not kept:
            raise PlacementError(f"{path}: no server is left; every rack is excluded")
        return cls(kept, {rack: uplinks.get(rack, math.inf) for rack in racks - set(excluded)})

    @classmethod
    def of_pools(cls, pools: Sequence[Pool]) -> Self:
        """Return the servers that pools stand for, each pool in a rack of its own."""
        servers = tuple(
            Servers(p.name, replace(p.card, server=replace(p.card.server, cards=n)), k, p.name)
            for p in pools
            for n, k in p.servers.items()
        )
        return cls(servers, {p.name: math.inf for p in pools})

    def pools(self) -> list[Pool]:
        """Return the pools: cards of one kind in servers with like links, whatever their racks."""
        pools: dict[str, list[Servers]] = {}
        for s in self.servers:
            pools.setdefault(s.pool, []).append(s)
        found = []
        for name, members in pools.items():
            sizes: dict[int, int] = {}
            for s in members:
                size = s.card.server.cards
                sizes[size] = sizes.get(size, 0) + s.count
            # Host NICs are shared: the largest server has the least for each card.
            card = max((s.card for s in members), key=lambda c: c.server.cards)
            found.append(Pool(name, card, sizes, efficiency_of(card.vendor)))
        return found


class _Reader:
    """Reads one document; every refusal names the key and its line."""

    def __init__(self, document: Document, catalogue: Catalogue) -> None:
        self.document, self.catalogue = document, catalogue
        if document.values.get("version") != 1:
            raise self.error("version", f"expected 1, found {document.values.get('version')!r}")
        for key in document.values:
            if key not in ("version", "racks", "servers"):
                raise self.error(str(key), "unknown; keys: version, racks, servers")

    def error(self, key: str, message: str) -> ConfigError:
        """Return the refusal of a key."""
        return ConfigError(f"{self.document.place(key.split('.')).text}: {key}: {message}")

    def racks(self) -> dict[str, float]:
        """Return each named rack's uplink."""
        uplinks: dict[str, float] = {}
        for n, rack in enumerate(self._list("racks", may_be_missing=True)):
            place = f"racks.{n}"
            self._known(rack, RACK_KEYS, place)
            name = self._name(rack, "name", place)
            if name in uplinks:
                raise self.error(f"{place}.name", f"{name!r} stands twice; names are unique")
            gbit = self._number(rack, "uplink_gbit_per_s", place, MOST_GBIT)
            uplinks[name] = math.inf if gbit is None else gbit * GIGA / BITS_PER_BYTE
        return uplinks

    def servers(self, uplinks: Mapping[str, float]) -> list[Servers]:
        """Return the servers, and to which pool each belongs."""
        found: list[Servers] = []
        pools: dict[tuple[Any, ...], str] = {}
        for n, entry in enumerate(self._list("servers")):
            place = f"servers.{n}"
            self._known(entry, SERVER_KEYS, place)
            rack = self._name(entry, "rack", place)
            if uplinks and rack not in uplinks:
                known = ", ".join(list(uplinks)[:8])
                raise self.error(f"{place}.rack", f"unknown rack {rack!r}; racks: {known}")
            card = self._card(entry, place)
            s = card.server
            # Only the links tell pools apart, not how many cards share a server.
            alike = (card.name, s.host_nics, s.host_nic_bytes_per_s, s.pcie_bytes_per_s)
            number = sum(key[0] == card.name for key in pools) + 1
            pool = pools.setdefault(alike, card.name if number == 1 else f"{card.name}-{number}")
            count = self._number(entry, "count", place, MOST_SERVERS, whole=True)
            found.append(Servers(rack, card, 1 if count is None else int(count), pool))
        return found

    def _card(self, entry: Mapping[str, Any], place: str) -> Card:
        name = self._name(entry, "card", place)
        try:
            card = self.catalogue.card(name)
        except PlacementError as cause:
            raise self.error(f"{place}.card", str(cause)) from cause
        cards = self._number(entry, "cards", place, MOST_IN_SERVER, whole=True)
        nics = self._number(entry, "host_nics", place, MOST_IN_SERVER, whole=True)
        gbit = self._number(entry, "host_nic_gbit_per_s", place, MOST_GBIT)
        pcie = self._number(entry, "pcie_gb_per_s", place, MOST_GBIT)
        server = card.server
        server = replace(
            server,
            cards=server.cards if cards is None else int(cards),
            host_nics=server.host_nics if nics is None else int(nics),
            host_nic_bytes_per_s=(
                server.host_nic_bytes_per_s if gbit is None else gbit * GIGA / BITS_PER_BYTE
            ),
            pcie_bytes_per_s=server.pcie_bytes_per_s if pcie is None else pcie * GIGA,
        )
        return replace(card, server=server)

    def _list(self, key: str, *, may_be_missing: bool = False) -> list[Mapping[str, Any]]:
        value = self.document.values.get(key)
        if value is None and may_be_missing:
            return []
        if not isinstance(value, list) or not value:
            raise self.error(key, f"expected a list with at least one entry, found {value!r}")
        for n, entry in enumerate(value):
            if not isinstance(entry, dict):
                raise self.error(f"{key}.{n}", f"expected keys and values, found {entry!r}")
        return value

    def _known(self, entry: Mapping[str, Any], keys: Sequence[str], place: str) -> None:
        for key in entry:
            if key not in keys:
                raise self.error(f"{place}.{key}", f"unknown; keys: {', '.join(keys)}")

    def _name(self, entry: Mapping[str, Any], key: str, place: str) -> str:
        value = entry.get(key)
        if not isinstance(value, str) or not value.strip():
            raise self.error(f"{place}.{key}", f"expected a name, found {value!r}")
        return value

    def _number(
        self, entry: Mapping[str, Any], key: str, place: str, most: float, *, whole: bool = False
    ) -> float | None:
        value = entry.get(key)
        if value is None:
            return None
        kinds = (int,) if whole else (int, float)
        if isinstance(value, bool) or not isinstance(value, kinds) or not 0 < value <= most:
            kind = "a whole number" if whole else "a number"
            raise self.error(f"{place}.{key}", f"expected {kind} to {most:g}, found {value!r}")
        return float(value)
