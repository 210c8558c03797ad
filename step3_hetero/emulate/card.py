"""A card that the host stands in for: what it has, by the catalogue, and what it refuses."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, replace
from functools import cache

from step3_hetero.backend import DeviceInfo, Dtypes
from step3_hetero.config import Emulate
from step3_hetero.errors import BackendNotFound, PlacementError
from step3_hetero.placement.catalogue import Card, Catalogue
from step3_hetero.registry import get_backend
from step3_hetero.specs import OpSpec

FP8, INT8 = "float8_e4m3fn", "int8"

PLAIN = ("float32", "bfloat16")
"""What every card of the catalogue computes in."""


@cache
def listed(name: str) -> Card:
    """Return a card of the built-in catalogue.

    Raises:
        PlacementError: there is none of this name; says which there are.
    """
    return Catalogue.read().card(name)


def dtypes_of(card: Card) -> Dtypes:
    """Return what a card does with each dtype.

    FP8 and INT8 are computed where the catalogue has their arithmetic; FP8 goes on the wire there
    alone, INT8 everywhere, being plain arithmetic. An A800 stores FP8 without computing in it: what
    is stored is what the card's own backend says, if it knows the card.
    """
    fp8 = (FP8,) if "fp8" in card.flops_per_s else ()
    int8 = (INT8,) if "int8" in card.flops_per_s else ()
    try:
        stored = get_backend(card.backend).reference_info(card.name).dtypes.stored
    except (BackendNotFound, PlacementError):
        stored = (*PLAIN, *fp8, INT8)
    return Dtypes(stored, (*PLAIN, *fp8, *int8), (*PLAIN, *fp8, INT8))


@dataclass(frozen=True)
class EmulatedCard:
    """One card of a role. ``number`` tells cards of one kind apart, as device numbers do."""

    card: Card
    asked: Emulate
    number: int
    dtypes: Dtypes

    @property
    def name(self) -> str:
        """Return ``h20``, or ``h20:1`` for the second one."""
        return f"{self.card.name}:{self.number}" if self.number else self.card.name

    @property
    def memory_bytes(self) -> int:
        """Return the part of the card's memory that is there to use."""
        return round(self.card.memory_bytes * self.asked.memory)

    def info(self, host: DeviceInfo) -> DeviceInfo:
        """Describe the card on this host; each dtype is one that both have."""
        return replace(
            host,
            name=f"{self.name} emulated on {host.name}",
            description=f"{self.card.title}, emulated: its dtypes and memory, none of its kernels",
            memory_bytes=self.memory_bytes,
            dtypes=Dtypes(
                _both(self.dtypes.stored, host.dtypes.stored),
                _both(self.dtypes.computed, host.dtypes.computed),
                _both(self.dtypes.wire, host.dtypes.wire),
            ),
            bandwidth_bytes_per_s=None,  # the host's pace is not the card's
            flops_per_s={},
            links={},
            memory_domain=f"{self.name} emulated",
            tier="emulated",
        )

    def refuses(self, spec: OpSpec) -> str | None:
        """Return why the card cannot run an op, whatever the host can; None if it can."""
        if spec.dtype not in self.dtypes.computed:
            return f"no arithmetic in {spec.dtype}; computes in {', '.join(self.dtypes.computed)}"
        held = spec.weight_format
        if held not in (None, "auto", *self.dtypes.computed):
            allowed = ", ".join(self.dtypes.computed)
            return f"no arithmetic with weights in {held}; allowed: {allowed}"
        if spec.kv_format not in (None, *self.dtypes.stored):
            return f"no KV cache in {spec.kv_format}; allowed: {', '.join(self.dtypes.stored)}"
        return None


def _both(card: Collection[str], host: Collection[str]) -> tuple[str, ...]:
    return tuple(dtype for dtype in host if dtype in card)
