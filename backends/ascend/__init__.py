"""torch_npu: Huawei Ascend 910B. What each tier of proof covers stands in docs/ascend.md."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from step3_hetero.backend import (
    NO_OPTIONS,
    Backend,
    Device,
    DeviceInfo,
    Dtypes,
    check_options,
)
from step3_hetero.backends.ascend import cards, driver, supported
from step3_hetero.backends.ascend.limits import LimitExceeded
from step3_hetero.errors import ConfigError, PlacementError
from step3_hetero.specs import LOGICAL_BLOCK, OpSpec

DTYPES = Dtypes(
    stored=("float32", "bfloat16", "int8"),
    computed=("float32", "bfloat16"),
    wire=("float32", "bfloat16", "int8"),
)

OPTIONS = {
    "graphs": "true captures decode steps as ACL graphs, one for each bucket of batch sizes; "
    "attention in bfloat16 only; never run on hardware (default: false)",
    "kv_split": "tokens: longer contexts of decoding sequences are attended in parts of that many "
    "and merged (default: 0, never)",
    "nz": "true holds matrices in the cube unit's fractal format (default: false)",
    "triton": "true decodes bfloat16 MFA by a Triton kernel, not the vendor's operator; never run "
    "on hardware (default: false)",
}


class AscendBackend(Backend):
    """The NPUs of this machine."""

    name = "ascend"

    def devices(self) -> Sequence[DeviceInfo]:
        """Return the NPUs, or nothing without torch_npu and its driver."""
        if self.why_unavailable():
            return []
        return [_here(index) for index in range(driver.count())]

    def why_unavailable(self) -> str | None:
        """Say what is missing: torch_npu, CANN, or a card."""
        return driver.why_unavailable()

    def open(self, index: int, options: Mapping[str, Any] = NO_OPTIONS) -> Device:
        """Open an NPU."""
        check_options(self.name, options, OPTIONS)
        split, nz, triton = _kv_split(options), _flag(options, "nz"), _flag(options, "triton")
        graphs = _flag(options, "graphs")
        if graphs and (split or triton):
            other = "kv_split" if split else "triton"
            raise ConfigError(
                f"backend 'ascend', option graphs: refused beside {other}, whose launches follow "
                "each step's contexts; set one of the two"
            )
        if reason := self.why_unavailable():
            raise PlacementError(f"backend ascend: {reason}")
        if not 0 <= index < driver.count():
            raise PlacementError(f"ascend has {driver.count()} devices here; asked for {index}")
        from step3_hetero.backends.ascend import decode
        from step3_hetero.backends.ascend import graphs as acl_graphs
        from step3_hetero.backends.ascend.device import AscendDevice

        launch = decode.launcher() if triton else None
        if graphs:
            acl_graphs.check_runtime(index)
        return AscendDevice(
            _here(index), index, kv_split=split, nz=nz, triton=launch, graphs=graphs
        )

    def supports(self, info: DeviceInfo, spec: OpSpec) -> str | None:
        """Ask the limits of the vendor's operators."""
        try:
            supported.check(spec)
        except LimitExceeded as refused:
            return str(refused)
        return None

    def reference_info(self, card: str | None) -> DeviceInfo:
        """Describe a 910B by its catalogue name; without one that of the paper."""
        found = cards.card_named(card)
        return _info("ascend:0", found, cards.MEMORY_BYTES, found.title)

    def why_no_group(self, info: DeviceInfo) -> str | None:
        """See ``Backend.why_no_group``: HCCL, never run on hardware; the stand-in has none."""
        return "the host stand-in has no HCCL" if info.tier == "host stand-in" else None

    def version(self) -> str:
        """Return torch_npu's version."""
        return driver.library_version()


def _info(name: str, card: cards.Card | None, memory_bytes: int, description: str) -> DeviceInfo:
    return DeviceInfo(
        name,
        description,
        memory_bytes,
        DTYPES,
        bandwidth_bytes_per_s=cards.BANDWIDTH_BYTES_PER_S if card else None,
        flops_per_s=card.flops_per_s if card else {},
        tier="host stand-in" if driver.stand_in() else "device",
        driver=driver.library_version(),
    )


def _here(index: int) -> DeviceInfo:
    """Describe a device of this machine."""
    if driver.stand_in():
        return _info(f"ascend:{index}", None, driver.memory(index)[1],
                     f"host stand-in: {driver.library()}")  # fmt: skip
    chip = driver.chip(index)
    card = cards.card_of_chip(chip)
    title = f"{card.title}, {chip}" if card else chip
    return _info(f"ascend:{index}", card, driver.memory(index)[1], title)


def _kv_split(options: Mapping[str, Any]) -> int:
    value = options.get("kv_split", 0)
    if type(value) is not int or value < 0 or value % LOGICAL_BLOCK:
        raise ConfigError(
            f"backend 'ascend', option kv_split: {value!r} refused; allowed: 0 (never) or a "
            f"multiple of {LOGICAL_BLOCK}"
        )
    return value


def _flag(options: Mapping[str, Any], name: str) -> bool:
    value = options.get(name, False)
    if type(value) is not bool:
        raise ConfigError(f"backend 'ascend', option {name}: {value!r} refused; true or false")
    return value
