"""NumPy backend: the definition of every op, and the judge of every other backend."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from step3_hetero.backend import NO_OPTIONS, Backend, Device, DeviceInfo, check_options
from step3_hetero.errors import ConfigError, PlacementError
from step3_hetero.specs import INT8_OPS, SCALED, OpSpec

SUMMATION = ("blocked", "in-order")

OPTIONS = {
    "summation": "blocked (default), as NumPy adds; in-order, term after term, as a plain loop does"
}


class ReferenceBackend(Backend):
    """One device, the host; no limits but memory."""

    name = "reference"

    def devices(self) -> Sequence[DeviceInfo]:
        """Return the host."""
        from step3_hetero.backends.reference.device import info

        return [info()]

    def why_unavailable(self) -> str | None:
        """NumPy is always there."""
        return None

    def open(self, index: int, options: Mapping[str, Any] = NO_OPTIONS) -> Device:
        """Open the host."""
        from step3_hetero.backends.reference.device import ReferenceDevice

        check_options("reference", options, OPTIONS)
        summation = options.get("summation", SUMMATION[0])
        if summation not in SUMMATION:
            raise ConfigError(
                f"backend 'reference', option summation: {summation!r} refused; allowed: "
                + ", ".join(SUMMATION)
            )
        if index != 0:
            raise PlacementError(f"reference has one device, reference:0; asked for {index}")
        return ReferenceDevice(summation)

    def supports(self, info: DeviceInfo, spec: OpSpec) -> str | None:
        """Refuse only dtypes that NumPy and ml_dtypes do not compute in."""
        from step3_hetero.backends.reference.device import DTYPES, KERNELS

        if spec.op not in KERNELS:
            return f"no kernel for {spec.op!r}"
        if spec.dtype not in DTYPES.computed:
            return f"no arithmetic in {spec.dtype}; computes in {', '.join(DTYPES.computed)}"
        held = ("auto", *DTYPES.computed, *(("int8",) if spec.op in INT8_OPS else ()))
        if spec.weight_format not in {None, *held}:
            return f"weights cannot be held as {spec.weight_format}; allowed: {', '.join(held)}"
        if spec.kv_format not in {None, *DTYPES.computed, *SCALED}:
            allowed = ", ".join((*DTYPES.computed, *SCALED))
            return f"no KV cache in {spec.kv_format}; allowed: {allowed}"
        return None

    def reference_info(self, card: str | None) -> DeviceInfo:
        """Return the host: the reference runs nowhere else."""
        if card is not None:
            raise PlacementError(f"backend reference has no card {card!r}; leave the key out")
        return self.devices()[0]

    def version(self) -> str:
        """Return NumPy's version."""
        import numpy as np

        return f"numpy {np.__version__}"
