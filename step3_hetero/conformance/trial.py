"""What an exam needs of a case, be it one op, a stage or a layer; and what the reference says."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Any, Protocol

import numpy as np

from step3_hetero.backend import Array, Device, KVCache
from step3_hetero.conformance.case import Inputs
from step3_hetero.conformance.tolerance import Bool, Judged, judge
from step3_hetero.registry import get_backend
from step3_hetero.specs import HostArray, OpSpec

Results = dict[str, HostArray]


class Claims(Protocol):
    """What asks a device for ops."""

    def specs(self) -> tuple[OpSpec, ...]:
        """Return what a device must claim."""


class Trial(Claims, Protocol):
    """One case, ready to be run on any device."""

    def __hash__(self) -> int:
        """Return the same number for equal cases."""

    @property
    def id(self) -> str:
        """Return the case in words."""

    @property
    def op(self) -> str:
        """Return the op, or the stage, that is tried."""

    @property
    def dtype(self) -> str:
        """Return the dtype of the activations."""

    @property
    def full(self) -> bool:
        """Say whether a quick run leaves it out."""

    @property
    def exact(self) -> bool:
        """Say whether the result is defined to the bit."""

    @property
    def stored(self) -> str:
        """Return the dtype in which the checkpoint holds the weights; empty: the case's own."""

    @property
    def donated(self) -> frozenset[str]:
        """Return the inputs that a run may overwrite."""

    def specs(self) -> tuple[OpSpec, ...]:
        """Return what a device must claim."""

    def inputs(self) -> Inputs:
        """Draw the inputs."""

    def place(self, device: Device, inputs: Inputs, dtype: str) -> Any:
        """Bring the inputs to a device; the result has ``arrays`` by name and a ``cache``."""

    def call(self, device: Device, placed: Any, dtype: str) -> dict[str, Array]:
        """Run once; may be repeated with the same ``placed``."""

    def expect(self, inputs: Inputs) -> Expected:
        """Let the reference judge."""


@dataclass(frozen=True)
class Expected:
    """What the reference makes of a case.

    ``want`` in float64; ``rounded`` in the case's dtype, with sums in blocks and with sums in
    order. Likewise ``cache_want`` and ``cache_rounded``, the keys and values afterwards, each
    (blocks, 128, kv_heads, head_dim); empty without a cache.
    ``near`` marks, for an output that depends on routing, the rows whose experts rounding may
    change; ``slack`` is what a row of an output may err by, squared and relative, if that is more
    than its bound.
    """

    want: Results
    rounded: tuple[Results, Results]
    cache_want: Results = field(default_factory=dict)
    cache_rounded: tuple[Results, Results] = ({}, {})
    near: Mapping[str, Bool] = field(default_factory=dict)
    slack: Results = field(default_factory=dict)

    @property
    def own(self) -> Results:
        """Return the reference's results in the case's dtype."""
        return self.rounded[0]

    @property
    def cache(self) -> Results:
        """Return keys and values as the reference leaves them in the case's dtype."""
        return self.cache_rounded[0]

    def judged(self, name: str, got: HostArray, keep: HostArray | None = None) -> Judged:
        """Hold one output (its rows ``keep``) against the exact one."""
        rows = slice(None) if keep is None else keep
        want = self.want[name][rows]
        found = judge(got[rows], want, [r[name][rows] for r in self.rounded])
        if name not in self.slack:
            return found
        slack = self.slack[name][rows]
        elements = np.sqrt(slack)[..., None] * np.abs(want)
        return replace(
            found,
            row_bound=np.maximum(found.row_bound, slack),
            element_bound=np.maximum(found.element_bound, elements),
        )

    def cache_judged(self, name: str, got: HostArray, written: HostArray) -> Judged:
        """Hold the written rows of the keys or the values against the exact ones."""
        rounded = [r[name][written] for r in self.cache_rounded]
        return judge(got[written], self.cache_want[name][written], rounded)


def host_results(device: Device, outputs: Mapping[str, Array]) -> Results:
    """Bring results to the host; what is there already stays."""
    return {n: device.to_host(x) if device.owns(x) else np.asarray(x) for n, x in outputs.items()}


def reference(summation: str = "blocked") -> Device:
    """Open the reference; ``in-order`` adds term after term, as the plainest kernel does."""
    return get_backend("reference").open(0, {"summation": summation})


@lru_cache(maxsize=1)
def expected_of(trial: Trial) -> tuple[Inputs, Expected]:
    """Draw a case's inputs and let the reference judge them."""
    inputs = trial.inputs()
    with np.errstate(all="ignore"):
        return inputs, trial.expect(inputs)


def expected_by_runs(trial: Trial, inputs: Inputs) -> Expected:
    """Run the reference in float64, and in the case's dtype in both orders of summation."""
    want, cache_want = judge_run(trial, reference(), inputs.widened(), "float64")
    own, cache = judge_run(trial, reference(), inputs, trial.dtype)
    ordered, cache_ordered = judge_run(trial, reference("in-order"), inputs, trial.dtype)
    return Expected(want, (own, ordered), cache_want, (cache, cache_ordered))


def judge_run(
    trial: Trial, device: Device, inputs: Inputs, dtype: str
) -> tuple[Results, dict[str, HostArray]]:
    """Run a case in ``dtype`` and return its results and what the cache holds afterwards."""
    placed = trial.place(device, inputs, dtype)
    results = host_results(device, trial.call(device, placed, dtype))
    return results, cache_content(placed.cache)


def cache_content(cache: KVCache | None) -> dict[str, HostArray]:
    """Return all keys and values of a cache by the names k and v; nothing without a cache."""
    if cache is None:
        return {}
    return dict(zip("kv", cache.read(range(cache.spec.blocks)), strict=True))
