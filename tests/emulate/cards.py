"""Emulated cards without a config."""

from step3_hetero.config import Emulate
from step3_hetero.emulate.card import EmulatedCard, dtypes_of, listed


def card(name, number=0, **asked):
    """Return a card of the catalogue, emulated as ``asked``."""
    found = listed(name)
    return EmulatedCard(found, Emulate(card=name, **asked), number, dtypes_of(found))
