"""torch and Triton on NVIDIA cards: H800, H20, H100, H200 (sm_90) and A800, A100 (sm_80).

Compiled for both and run in Triton's interpreter; never run on a card. See docs/cuda.md.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from step3_hetero.backend import NO_OPTIONS, Backend, Device, DeviceInfo, check_options
from step3_hetero.backends.cuda.cards import describe
from step3_hetero.backends.cuda.claims import refused
from step3_hetero.errors import ConfigError, PlacementError
from step3_hetero.specs import OpSpec

OPTIONS = {
    "interpret": "true runs every kernel in Triton's interpreter, on the host: slow, for tests",
    "arch": "with interpret, the card that is interpreted: 80 (A800) or 90 (H800, the default)",
    "fp8_activations": "true multiplies FP8 experts by activations quantised to FP8 (not on sm_80)",
    "graphs": "true replays decode steps as CUDA graphs (default false: never run on a card)",
    "check_indices": "true refuses slots and block tables out of range, at the cost of a look",
}

ARCHS = (80, 90)


class CudaBackend(Backend):
    """Every card that the driver shows; with ``interpret``, the host in a card's place."""

    name = "cuda"

    def devices(self) -> Sequence[DeviceInfo]:
        """Return the cards here; without any, none, or the error that torch gives is swallowed."""
        if self.why_unavailable():
            return []
        from step3_hetero.backends.cuda.device import found_cards

        return found_cards()

    def why_unavailable(self) -> str | None:
        """Say what is missing: torch, Triton, a build of torch for CUDA, or a card."""
        for library in ("torch", "triton"):
            if find_spec(library) is None:
                return f"{library} is not installed; pip install 'step3-hetero[cuda]'"
        import torch

        if torch.version.cuda is None:
            return (
                f"torch {torch.__version__} is built without CUDA; option interpret: true runs the "
                "kernels on the host"
            )
        if not torch.cuda.is_available():
            return (
                "no NVIDIA card or driver on this machine, or a driver older than CUDA "
                f"{torch.version.cuda} asks for (nvidia-smi tells); option interpret: true needs "
                "none"
            )
        return None

    def open(self, index: int, options: Mapping[str, Any] = NO_OPTIONS) -> Device:
        """Open a card, or the host to interpret one. ``OPTIONS`` says what may be asked for."""
        check_options(self.name, options, OPTIONS)
        chosen = _read(options)
        if chosen["interpret"]:
            if find_spec("torch") is None or find_spec("triton") is None:
                raise PlacementError(f"backend cuda: {self.why_unavailable()}")
            if index != 0:
                raise PlacementError(f"cuda interprets one device, cuda:0; asked for {index}")
        else:
            self._check_present(index)
        from step3_hetero.backends.cuda.device import open_device

        return open_device(index, chosen)

    def _check_present(self, index: int) -> None:
        if reason := self.why_unavailable():
            raise PlacementError(f"backend cuda: {reason}")
        count = len(self.devices())
        if not 0 <= index < count:
            raise PlacementError(f"cuda has {count} cards here, from cuda:0 on; asked for {index}")

    def supports(self, info: DeviceInfo, spec: OpSpec) -> str | None:
        """Float32 and bfloat16 over weights in either or block FP8; see claims.py for sizes."""
        return refused(info, spec)

    def reference_info(self, card: str | None) -> DeviceInfo:
        """Describe a card by its catalogue name; without one, an H800."""
        return describe(card or "h800")

    def tune(self, path: Path, progress: Callable[[str], None]) -> None:
        """Time the kernels on this machine's card and write the quickest configurations.

        Raises:
            PlacementError: there is no card here.
        """
        if reason := self.why_unavailable():
            raise PlacementError(f"backend cuda: {reason}; tuning times kernels on one")
        from step3_hetero.backends.cuda.tuning import tune

        tune(path, progress)

    def why_no_group(self, info: DeviceInfo) -> None:
        """See ``Backend.why_no_group``: NCCL, never run on hardware; interpreted, gloo."""

    def version(self) -> str:
        """Return the versions of torch and Triton."""
        try:
            return f"torch {version('torch')}, triton {version('triton')}"
        except PackageNotFoundError as missing:
            return f"{missing.name} not installed"


def _read(options: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options with their defaults.

    Raises:
        ConfigError: one has a bad value.
    """
    chosen: dict[str, Any] = {"interpret": False, "arch": 90, "fp8_activations": False,
                              "graphs": False, "check_indices": False}  # fmt: skip
    for name, value in options.items():
        allowed = ARCHS if name == "arch" else (True, False)
        if type(value) is not type(chosen[name]) or value not in allowed:
            said = ", ".join(str(a).lower() for a in allowed)
            raise ConfigError(f"backend 'cuda', option {name}: {value!r} refused; allowed: {said}")
        chosen[name] = value
    if "arch" in options and not chosen["interpret"]:
        raise ConfigError(
            "backend 'cuda', option arch: only with interpret: true; a card has its own"
        )
    return chosen
