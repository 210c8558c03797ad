"""Dollars per million decoded tokens, by roofline: a lower bound.

::

    attention = 1e6 · (max(F_attention · U_flop, B_kv · U_byte) + F_linear · U_flop)
    ffn       = 1e6 · F_ffn · U_flop
    AFD       = the cheapest attention + the cheapest ffn

U_flop and U_byte are what one FLOP and one byte of memory traffic cost on an accelerator that does
nothing else. Decisions are taken on unrounded values. Source: arXiv 2507.19427, section 4.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import yaml

from step3_hetero.errors import PlacementError
from step3_hetero.placement.workload import PAPER_MLA_VALUE_DIM, Workload

if TYPE_CHECKING:
    from step3_hetero.placement.catalogue import Card, Catalogue

CARDS_FILE = Path(__file__).with_name("paper_cards.yaml")

TOKENS = 1e6
SECONDS_PER_HOUR = 3600
KV_ELEMENT_BYTES = 1.0
"""Every policy stores 8 bits; two models keep part of their cache wider, as their data says."""

TRUE_MLA_VALUE_DIM = 512

LEFT_OUT = "roofline, a lower bound: no network, weight reads, memory capacity, embedding or head"

POLICIES: Mapping[str, str] = MappingProxyType(
    {
        "paper": "as the paper counts: its own card figures, FP8 arithmetic where there is any, "
        "else BF16, 8-bit bytes, 576 for both of MLA's products",
        "int8": "INT8 arithmetic on cards without FP8",
        "mla-512": "MLA's second product counted as it is, over 512",
        "catalogue": "the device catalogue's figures for every card",
    }
)
"""What a policy changes of `paper`; they join by commas, as in ``int8,mla-512``."""


@dataclass(frozen=True, slots=True)
class Policy:
    """How tokens are counted and cards are priced."""

    name: str = "paper"
    int8: bool = False
    mla_value_dim: int = PAPER_MLA_VALUE_DIM
    catalogue: bool = False

    @classmethod
    def parse(cls, text: str) -> Policy:
        """Read ``paper``, or changes to it joined by commas.

        Raises:
            PlacementError: a name is unknown.
        """
        names = [name.strip().lower() for name in text.split(",")]
        for name in names:
            if name not in POLICIES:
                raise PlacementError(
                    f"unknown policy {name!r}; policies: {', '.join(POLICIES)}; "
                    "several join by commas, as in int8,mla-512"
                )
        true_mla = TRUE_MLA_VALUE_DIM if "mla-512" in names else PAPER_MLA_VALUE_DIM
        return cls(",".join(names), "int8" in names, true_mla, "catalogue" in names)


@dataclass(frozen=True, slots=True)
class Accelerator:
    """What the roofline needs of a card under a policy."""

    name: str
    figures: str  # "paper" or "catalogue": whose numbers these are
    arithmetic: str  # "fp8", "int8" or "bf16"
    usd_per_hour: float
    flops_per_s: float
    memory_bandwidth_bytes_per_s: float

    @property
    def usd_per_flop(self) -> float:
        """Return U_flop."""
        return self.usd_per_hour / SECONDS_PER_HOUR / self.flops_per_s

    @property
    def usd_per_byte(self) -> float:
        """Return U_byte."""
        return self.usd_per_hour / SECONDS_PER_HOUR / self.memory_bandwidth_bytes_per_s


@dataclass(frozen=True, slots=True)
class Cost:
    """One model at one context on one accelerator, in dollars per million tokens."""

    attention_usd: float
    ffn_usd: float
    bound: str  # what the attention core waits for: "arithmetic" or "memory"

    @property
    def total_usd(self) -> float:
        """Return attention and FFN on the same card."""
        return self.attention_usd + self.ffn_usd


@dataclass(frozen=True, slots=True)
class Split:
    """Attention and FFN each where they cost least, in dollars per million tokens."""

    attention: str  # accelerator
    ffn: str  # accelerator
    usd: float


def cost(model: Workload, accelerator: Accelerator, context: int) -> Cost:
    """Price one decoded token at a context, times a million."""
    u_flop, u_byte = accelerator.usd_per_flop, accelerator.usd_per_byte
    arithmetic = model.attention_flops(context) * u_flop
    memory = model.kv_bytes(context, KV_ELEMENT_BYTES) * u_byte
    linear = model.linear_flops * u_flop
    return Cost(
        attention_usd=TOKENS * (max(arithmetic, memory) + linear),
        ffn_usd=TOKENS * model.ffn_flops * u_flop,
        bound="memory" if memory > arithmetic else "arithmetic",
    )


def split(model: Workload, accelerators: Sequence[Accelerator], context: int) -> Split:
    """Return the cheapest attention and the cheapest FFN; the first of equals wins."""
    priced = [(a.name, cost(model, a, context)) for a in accelerators]
    attention = min(priced, key=lambda named: named[1].attention_usd)
    ffn = min(priced, key=lambda named: named[1].ffn_usd)
    return Split(attention[0], ffn[0], attention[1].attention_usd + ffn[1].ffn_usd)


def paper_accelerators(policy: Policy | None = None) -> list[Accelerator]:
    """Return the paper's four, with its own figures."""
    policy = policy or Policy()
    return [_of_paper(name, data, policy) for name, data in paper_cards().items()]


def accelerators(names: Sequence[str], policy: Policy, catalogue: Catalogue) -> list[Accelerator]:
    """Return cards by name; without names, all that can be priced.

    The paper's four come with its own figures unless the policy says ``catalogue``; any other card
    with the catalogue's.

    Raises:
        PlacementError: a name is unknown, or its card lacks a price or arithmetic.
    """
    if not names:
        return _all(policy, catalogue)
    found: dict[str, Accelerator] = {}
    for name in names:
        of_paper = _paper_name(name)
        if of_paper and not policy.catalogue:
            made = _of_paper(of_paper, paper_cards()[of_paper], policy)
        else:
            card = paper_cards()[of_paper]["catalogue"] if of_paper else name
            made = of_card(catalogue.card(card), policy)
        found.setdefault(made.name, made)
    return list(found.values())


def of_card(card: Card, policy: Policy) -> Accelerator:
    """Return a catalogue card as the roofline needs it.

    Raises:
        PlacementError: it has no price or no arithmetic.
    """
    arithmetic = _arithmetic(card.flops_per_s, policy)
    if arithmetic is None:
        raise card.lacks("tflops.bf16", "TFLOP/s, dense")
    return Accelerator(
        name=card.name,
        figures="catalogue",
        arithmetic=arithmetic,
        usd_per_hour=card.price(),
        flops_per_s=card.flops_per_s[arithmetic],
        memory_bandwidth_bytes_per_s=card.memory_bandwidth_bytes_per_s,
    )


def unpriced(catalogue: Catalogue) -> list[str]:
    """Return the cards that a table over all of the catalogue leaves out."""
    cards = map(catalogue.card, catalogue.names())
    return [card.name for card in cards if card.usd_per_hour is None or not card.flops_per_s]


@cache
def paper_cards() -> Mapping[str, dict[str, Any]]:
    """Return the paper's accelerators as its Table 4 has them, by its names."""
    cards: dict[str, dict[str, Any]] = yaml.safe_load(CARDS_FILE.read_text("utf-8"))["cards"]
    return MappingProxyType(cards)


def _all(policy: Policy, catalogue: Catalogue) -> list[Accelerator]:
    if not policy.catalogue:
        return paper_accelerators(policy)
    without = unpriced(catalogue)
    return [of_card(catalogue.card(n), policy) for n in catalogue.names() if n not in without]


def _paper_name(name: str) -> str | None:
    """Return the paper's name of a card that goes by that name or by the catalogue's."""
    wanted = name.strip().lower()
    for known, data in paper_cards().items():
        if wanted in (known.lower(), data["catalogue"]):
            return known
    return None


def _of_paper(name: str, data: Mapping[str, Any], policy: Policy) -> Accelerator:
    arithmetic = _arithmetic(data["tflops"], policy) or "bf16"
    return Accelerator(
        name=name,
        figures="paper",
        arithmetic=arithmetic,
        usd_per_hour=data["usd_per_hour"],
        flops_per_s=data["tflops"][arithmetic] * 1e12,
        memory_bandwidth_bytes_per_s=data["memory_bandwidth_gb_per_s"] * 1e9,
    )


def _arithmetic(flops_per_s: Mapping[str, float], policy: Policy) -> str | None:
    """Return the dtype that a policy computes in: FP8 where there is any, else BF16 or INT8."""
    order = ("fp8", "int8", "bf16") if policy.int8 else ("fp8", "bf16")
    return next((dtype for dtype in order if dtype in flops_per_s), None)
