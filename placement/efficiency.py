"""What a vendor's cards reach of their data sheets, as stored in ``calibration.yaml``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from step3_hetero.config.document import Document

FILE = Path(__file__).with_name("calibration.yaml")

MICRO = 1e-6

CASES = ("low", "nominal", "high")
"""Of constants that are assumed: how much of NVIDIA's a vendor reaches."""


@dataclass(frozen=True, slots=True)
class Efficiency:
    """Fractions of arithmetic and bandwidth that are reached, and what one message costs.

    ``call_s`` is the fixed cost of one stage in one layer; only a measured profile knows it.
    """

    arithmetic: float
    bandwidth: float
    message_s: float
    calibrated: bool
    call_s: float = 0.0


@cache
def stored() -> Mapping[str, Any]:
    """Return the file's content: rows, sources, fitted and assumed constants."""
    values: Mapping[str, Any] = Document.read(FILE).values
    return values


def all_to_all_share() -> float:
    """Return the part of a NIC's rate that an exchange of all with all reaches, as measured."""
    return float(stored()["measured"]["all_to_all_share"])


def efficiency_of(vendor: str, case: str = "nominal") -> Efficiency:
    """Return a vendor's constants; a vendor without any has those assumed for Ascend."""
    known = stored()["fitted"].get(vendor)
    if known is not None:
        return Efficiency(
            known["arithmetic"], known["bandwidth"], known["message_us"] * MICRO, calibrated=True
        )
    assumed = stored()["assumed"]
    part = float(assumed.get(vendor, assumed["ascend"])[case])
    best = efficiency_of("nvidia")
    return Efficiency(
        best.arithmetic * part, best.bandwidth * part, best.message_s / part, calibrated=False
    )
