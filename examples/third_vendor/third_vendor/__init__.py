"""A backend from outside step3-hetero: one kernel of its own, the rest borrowed but one op."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from step3_hetero.backend import NO_OPTIONS, Backend, Device, DeviceInfo, check_options
from step3_hetero.errors import PlacementError
from step3_hetero.registry import get_backend
from step3_hetero.specs import OpSpec

LENDER = "reference"

UNCLAIMED = {"resize": "no resize yet: give this backend a text model, or put vision elsewhere"}
"""Ops that this backend leaves out, and why."""


class ThirdVendorBackend(Backend):
    """One device: the host, in place of a card."""

    name = "third_vendor"
    borrows = (LENDER,)

    def devices(self) -> Sequence[DeviceInfo]:
        """Return the host."""
        return [self.reference_info(None)]

    def why_unavailable(self) -> str | None:
        """NumPy is always there."""
        return None

    def open(self, index: int, options: Mapping[str, Any] = NO_OPTIONS) -> Device:
        """Open the host."""
        from third_vendor.device import ThirdVendorDevice

        check_options(self.name, options, {})
        if index != 0:
            raise PlacementError(f"{self.name} has one device, {self.name}:0; asked for {index}")
        return ThirdVendorDevice(self.reference_info(None), get_backend(LENDER).open(0))

    def supports(self, info: DeviceInfo, spec: OpSpec) -> str | None:
        """Refuse what is left out, and what the lender cannot do."""
        return UNCLAIMED.get(spec.op) or get_backend(LENDER).supports(info, spec)

    def reference_info(self, card: str | None) -> DeviceInfo:
        """Describe the host; it stands in for a card, and says so."""
        if card is not None:
            raise PlacementError(f"backend {self.name} has no card {card!r}; leave the key out")
        host = get_backend(LENDER).reference_info(None)
        return replace(
            host, name=f"{self.name}:0", description="an example, on the host", tier="host stand-in"
        )

    def version(self) -> str:
        """Return this package's version."""
        from importlib.metadata import version

        return version("third-vendor")
