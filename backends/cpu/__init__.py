"""torch on the CPU: the embedded default, and the stand-in for a second vendor."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from typing import Any

from step3_hetero.backend import (
    NO_OPTIONS,
    Backend,
    Device,
    DeviceInfo,
    Dtypes,
    check_options,
)
from step3_hetero.errors import ConfigError, PlacementError
from step3_hetero.ops import OPS
from step3_hetero.specs import INT8_OPS, SCALED, OpSpec

DTYPES = Dtypes(
    stored=("float32", "bfloat16", "float8_e4m3fn"),
    computed=("float32", "bfloat16"),
    wire=("float32", "bfloat16", "float8_e4m3fn", "int8"),
)

OPTIONS = {"threads": "torch's number of threads, for the whole process (default: all cores)"}

WEIGHT_FORMATS = {"auto", "float32", "bfloat16"}
KV_FORMATS = (*DTYPES.computed, *SCALED)


class CpuBackend(Backend):
    """One device: all cores of this machine."""

    name = "cpu"

    def devices(self) -> Sequence[DeviceInfo]:
        """Return the host, or nothing without torch."""
        return [] if self.why_unavailable() else [self.reference_info(None)]

    def why_unavailable(self) -> str | None:
        """Say that torch is missing."""
        if find_spec("torch") is None:
            return "torch is not installed; pip install 'step3-hetero[cpu]'"
        return None

    def open(self, index: int, options: Mapping[str, Any] = NO_OPTIONS) -> Device:
        """Open the host. Option ``threads`` is torch's number of threads, for the whole process."""
        check_options("cpu", options, OPTIONS)
        threads = options.get("threads")
        if threads is not None and (type(threads) is not int or threads < 1):
            raise ConfigError(
                f"backend 'cpu', option threads: {threads!r} refused; allowed: 1 or more"
            )
        if reason := self.why_unavailable():
            raise PlacementError(f"backend cpu: {reason}")
        if index != 0:
            raise PlacementError(f"cpu has one device, cpu:0; asked for {index}")
        from step3_hetero.backends.cpu.device import CpuDevice

        return CpuDevice(self.reference_info(None), threads)

    def supports(self, info: DeviceInfo, spec: OpSpec) -> str | None:
        """Every op in float32 and bfloat16; block-FP8 weights are dequantised at load."""
        if spec.op not in OPS:
            return f"no kernel for {spec.op!r}"
        if spec.dtype not in DTYPES.computed:
            return f"no arithmetic in {spec.dtype}; computes in {', '.join(DTYPES.computed)}"
        held = {*WEIGHT_FORMATS, *(("int8",) if spec.op in INT8_OPS else ())}
        if spec.weight_format not in {None, *held}:
            allowed = ", ".join(sorted(held))
            return f"weights cannot be held as {spec.weight_format}; allowed: {allowed}"
        if spec.kv_format not in {None, *KV_FORMATS}:
            return f"no KV cache in {spec.kv_format}; allowed: {', '.join(KV_FORMATS)}"
        return None

    def reference_info(self, card: str | None) -> DeviceInfo:
        """Describe this machine's cores."""
        if card is not None:
            raise PlacementError(f"backend cpu has no card {card!r}; leave the key out")
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        cores = len(os.sched_getaffinity(0))
        return DeviceInfo(
            "cpu:0",
            f"torch, {cores} cores",
            memory,
            DTYPES,
            batch_invariant=True,
            memory_domain="host",
        )

    def why_no_group(self, info: DeviceInfo) -> None:
        """See ``Backend.why_no_group``: groups run over gloo."""

    def version(self) -> str:
        """Return torch's version."""
        try:
            return f"torch {version('torch')}"
        except PackageNotFoundError:
            return "torch not installed"
