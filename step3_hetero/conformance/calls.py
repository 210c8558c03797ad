"""Who did the work: calls into other vendors' code, and trips to the host, during a kernel."""

from __future__ import annotations

import sys
import types
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.metadata import entry_points
from types import FrameType
from typing import Any

from step3_hetero.backend import Device
from step3_hetero.registry import GROUP

SHARED = "step3_hetero.backends.torch_common"
"""What torch backends share belongs to no vendor."""


@dataclass
class CallLog:
    """What was seen while a kernel ran."""

    foreign: set[str] = field(default_factory=set)
    host_trips: list[str] = field(default_factory=list)
    warned: list[str] = field(default_factory=list)

    def complaints(self) -> list[str]:
        """Say what amounts to a silent fallback; empty for an honest kernel."""
        said = [f"calls {name} of another backend" for name in sorted(self.foreign)]
        said += [f"calls {name}: data leaves the device" for name in sorted(set(self.host_trips))]
        said += [f"warns: {text}" for text in self.warned]
        return said


def vendor_packages() -> dict[str, str]:
    """Return the package of every registered backend by its name, without importing any."""
    return {ep.name: ep.module for ep in entry_points(group=GROUP)}


def vendor_of(module: str, packages: dict[str, str]) -> str | None:
    """Return which backend a module belongs to, None for code of no vendor.

    >>> vendor_of("step3_hetero.backends.cpu.moe", {"cpu": "step3_hetero.backends.cpu"})
    'cpu'
    """
    if module.startswith(SHARED):
        return None
    owners = [n for n, package in packages.items() if f"{module}.".startswith(f"{package}.")]
    return owners[0] if owners else None


@contextmanager
def logged(device: Device, mine: str, borrows: tuple[str, ...]) -> Iterator[CallLog]:
    """Watch a device of backend ``mine`` while it works; ``borrows`` may work for it.

    Python calls are seen by a profiling hook, in this thread; what a library does in native code is
    not, unless it warns of it, as torch's CPU fallbacks do.
    """
    log, packages = CallLog(), vendor_packages()
    allowed = {mine, *borrows}
    seen: dict[str, bool] = {}

    def watch(frame: FrameType, event: str, _: Any) -> None:
        if event != "call":
            return
        module = frame.f_globals.get("__name__", "")
        if module not in seen:
            vendor = vendor_of(module, packages)
            seen[module] = vendor is not None and vendor not in allowed
        if seen[module]:
            log.foreign.add(f"{module}.{frame.f_code.co_name}")

    with _trips_counted(device, log), warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        before = sys.getprofile()
        sys.setprofile(watch)
        try:
            yield log
        finally:
            sys.setprofile(before)
    log.warned += [str(w.message) for w in caught if "fall" in str(w.message).lower()]


TRIPS = ("to_host", "from_host", "copy_in", "copy_out")
"""A device's own ways to and from the host."""


@contextmanager
def _trips_counted(device: Device, log: CallLog) -> Iterator[None]:
    """Note each call of the device's ways to the host: a class of its own watches, for a while.

    Its instances need not have a dictionary: a subclass without slots has the same layout.
    """
    own = type(device)
    noted = {name: _noting(getattr(own, name), name, log) for name in TRIPS}
    said: dict[str, Any] = {"__slots__": (), **noted}
    watched: Any = types.new_class(own.__name__, (own,), {}, lambda body: body.update(said))
    object.__setattr__(device, "__class__", watched)
    try:
        yield
    finally:
        object.__setattr__(device, "__class__", own)


def _noting(method: Any, name: str, log: CallLog) -> Any:
    def noted(*args: Any, **kwargs: Any) -> Any:
        log.host_trips.append(f"Device.{name}")
        return method(*args, **kwargs)

    return noted
