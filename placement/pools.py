"""Pools: how many cards of which kind there are, in which servers, and what they reach."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Self

from step3_hetero.errors import PlacementError
from step3_hetero.placement.catalogue import Card, Catalogue
from step3_hetero.placement.efficiency import Efficiency, efficiency_of

MOST_CARDS = 10**8
"""More cards than were ever made of one kind: a mistyped number."""


@dataclass(frozen=True, slots=True)
class Pool:
    """Like cards in like servers. ``servers`` counts servers by the cards in them."""

    name: str
    card: Card
    servers: Mapping[int, int]
    efficiency: Efficiency

    @classmethod
    def of(cls, card: Card, cards: int, efficiency: Efficiency | None = None) -> Self:
        """Return ``cards`` cards in servers of the card's usual type, the last one part full."""
        full, rest = divmod(cards, card.server.cards)
        servers = {card.server.cards: full} | ({rest: 1} if rest else {})
        held = {size: count for size, count in servers.items() if count}
        return cls(card.name, card, held, efficiency or efficiency_of(card.vendor))

    @property
    def cards(self) -> int:
        """Return the cards of all servers."""
        return sum(size * count for size, count in self.servers.items())

    @property
    def server_cards(self) -> int:
        """Return the cards of the largest server."""
        return max(self.servers, default=0)

    def groups(self, tp: int) -> int:
        """Return how many groups of ``tp`` cards fit, each within one server."""
        return sum(size // tp * count for size, count in self.servers.items())


def parse_pools(texts: Sequence[str], catalogue: Catalogue) -> list[Pool]:
    """Read pools written as ``h800=32``.

    Raises:
        PlacementError: the form is wrong, a card unknown or named twice, a count out of range.
    """
    pools: list[Pool] = []
    for text in texts:
        name, sign, count = text.partition("=")
        if not sign or not name.strip() or not count.strip().isdecimal():
            raise PlacementError(
                f"--pool {text!r}: expected CARD=COUNT with a whole number of cards, as in h800=32"
            )
        if not 1 <= int(count) <= MOST_CARDS:
            raise PlacementError(
                f"--pool {text!r}: {int(count):,} cards; expected from 1 to {MOST_CARDS:,}"
            )
        pools.append(Pool.of(catalogue.card(name), int(count)))
    twice = [name for name, n in Counter(p.name for p in pools).items() if n > 1]
    if twice:
        raise PlacementError(f"--pool {twice[0]!r} is given twice; add the counts up")
    if not pools:
        raise PlacementError("no pool of cards; give at least one --pool CARD=COUNT")
    return pools


def with_case(pools: Sequence[Pool], case: str) -> list[Pool]:
    """Return the pools with uncalibrated constants at their ``low`` or ``high`` case."""
    return [
        p if p.efficiency.calibrated else replace(p, efficiency=efficiency_of(p.card.vendor, case))
        for p in pools
    ]
