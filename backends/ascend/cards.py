"""The 910B's bins: what a placement is checked against where no card is at hand.

Source: public device profiles and arXiv 2507.19427, Table 4, as in the device catalogue
(placement/devices.yaml), which a test holds these against.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from step3_hetero.errors import PlacementError

MEMORY_BYTES = 64 * 10**9
BANDWIDTH_BYTES_PER_S = 1.6e12
DEFAULT = "ascend-910b"


@dataclass(frozen=True, slots=True)
class Card:
    """One bin: its title, the driver's names of its chips, and dense operations a second."""

    title: str
    chips: tuple[str, ...]
    flops_per_s: Mapping[str, float]


CARDS: Mapping[str, Card] = MappingProxyType({
    "ascend-910b": Card("Huawei Ascend 910B (280T)", ("Ascend910B4",),
                        {"bfloat16": 245.8e12, "int8": 560e12}),
    "ascend-910b-313t": Card("Huawei Ascend 910B (313T)", ("Ascend910B3",),
                             {"bfloat16": 294.9e12, "int8": 626e12}),
    "ascend-910b-376t": Card("Huawei Ascend 910B (376T)", ("Ascend910B2", "Ascend910B2C"),
                             {"bfloat16": 353.9e12, "int8": 752e12}),
    "ascend-910b1": Card("Huawei Ascend 910B1", ("Ascend910B1",), {}),
})  # fmt: skip


def card_named(name: str | None) -> Card:
    """Return a card by its catalogue name; None is the one of the paper.

    Raises:
        PlacementError: it is none of these.
    """
    if name is None:
        return CARDS[DEFAULT]
    if name not in CARDS:
        known = ", ".join(CARDS)
        raise PlacementError(f"backend ascend has no card {name!r}; cards: {known}")
    return CARDS[name]


def card_of_chip(chip: str) -> Card | None:
    """Return the card that a chip's driver name belongs to, None for one that is not listed."""
    return next((card for card in CARDS.values() if chip in card.chips), None)
