"""A backend whose kernels are the reference's, and the way to plant one defect in it."""

from collections.abc import Callable
from dataclasses import dataclass, replace

from step3_hetero.backend import NO_OPTIONS, Backend
from step3_hetero.backends.reference.attention import ReferenceCache
from step3_hetero.backends.reference.device import KERNELS, ReferenceDevice
from step3_hetero.conformance.cases import trials
from step3_hetero.conformance.checks import CHECKS
from step3_hetero.conformance.exam import examine
from step3_hetero.conformance.forms import OpTrial
from step3_hetero.conformance.stages import StageCase
from step3_hetero.registry import get_backend

SLOW = "vocab=128815"
"""Seconds for each of its runs: the clean twin and no defect meets it."""


class TwinDevice(ReferenceDevice):
    """The reference's device; what a defect replaces are its attributes."""

    def __init__(self):
        super().__init__()
        self.kernels = dict(KERNELS)
        self.info = replace(self.info, name="twin:0")
        self.cache_class = ReferenceCache

    def open_cache(self, spec):
        """Return a zeroed cache, or the one with the defect."""
        return self.cache_class(spec)


@dataclass(frozen=True)
class Defect:
    """One thing that is wrong with a twin: what, in cases of which op it must show, and how.

    ``plant`` changes a fresh TwinDevice.
    """

    op: str
    what: str
    plant: Callable[[TwinDevice], None]

    def __str__(self):
        return f"{self.op}: {self.what}"


class Twin(Backend):
    """The reference under another name."""

    name = "twin"
    borrows = ("reference",)

    def __init__(self, defect=None):
        self.defect = defect

    def devices(self):
        """Return the twin's only device."""
        return [TwinDevice().info]

    def why_unavailable(self):
        """Say that nothing is missing."""

    def open(self, index, options=NO_OPTIONS):
        """Open the device and plant the defect."""
        device = TwinDevice()
        if self.defect is not None:
            self.defect.plant(device)
        return device

    def supports(self, info, spec):
        """Claim what the reference claims."""
        return get_backend("reference").supports(info, spec)

    def reference_info(self, card):
        """Describe the device."""
        return self.devices()[0]


def kernel(op, what, function, *, seen_in=None):
    """Return the defect of one kernel; it shows in cases of ``op``, or in those of ``seen_in``."""

    def plant(device):
        device.kernels[op] = function

    return Defect(seen_in or op, what, plant)


def wrapped(op, what, change):
    """Return the defect of a kernel whose result, one array, goes through ``change``."""
    return kernel(op, what, lambda *a, **p: change(KERNELS[op](*a, **p)))


def quick_trials(op=None):
    """Return the quick cases of an op (or a stage), or of all ops and stages."""
    judged = [t for t in trials().values() if isinstance(t, OpTrial | StageCase)]
    return [t for t in judged if not t.full and op in (None, t.op)]


def failing(defect, chosen, checks=CHECKS):
    """Put the twin with ``defect`` through cases; yield the results of those that fail."""
    backend = Twin(defect)
    device = backend.open(0)
    for trial in chosen:
        if SLOW not in trial.id:
            result = examine(backend, device, trial, checks)
            if result.status != "passed":
                yield result
