"""A stage's outputs held against the reference's: what is beyond its bound, and where."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from step3_hetero.conformance.bisect_stage import Expected, Prepared, StageRun, expect_run
from step3_hetero.conformance.routing import weights_slack
from step3_hetero.conformance.tolerance import FACTOR, Float64, finite_pattern, judge
from step3_hetero.conformance.trial import Results
from step3_hetero.specs import HostArray, StageSpec


@dataclass(frozen=True)
class Excess:
    """One output beyond its bound: its worst row, and the first that is beyond.

    ``error`` and ``bound`` are squared and relative to the row, or those of one element.
    """

    output: str
    first: int
    row: int
    error: float
    bound: float
    said: str


@dataclass(frozen=True)
class Flip:
    """A row that went to other experts although no error is beyond rounding."""

    row: int
    margin: float


@dataclass(frozen=True)
class Verdict:
    """A run held against the reference. ``worst`` is squared error as a part of what is allowed."""

    worst: float
    excesses: tuple[Excess, ...]
    flips: tuple[Flip, ...]

    @property
    def first(self) -> int:
        """Return the first row of any output that is beyond its bound."""
        return min(e.first for e in self.excesses)


def verdict(expected: Expected, got: Results, peer: Results | None = None) -> Verdict:
    """Hold a run's outputs against what the reference expects.

    With ``peer``, the same run on another trusted backend, they are held against that: either may
    err by its bound, so that two honest ones differ by at most twice as much.
    """
    worst, excesses = 0.0, []
    for name, want in expected.want.items():
        own = expected.rounded[0][name]
        if name not in got or (got[name].shape, got[name].dtype) != (own.shape, own.dtype):
            excesses.append(_misshapen(name, got.get(name), own))
            continue
        keep = _counted(expected, name, len(own))
        against = want if peer is None else peer[name]
        found = (_integers if own.dtype.kind in "iub" else _reals)(
            expected, name, got[name], against, keep, 1.0 if peer is None else FACTOR
        )
        for ratio, excess in found:
            worst = max(worst, ratio)
            excesses += [excess] if excess else []
    return Verdict(worst, tuple(excesses), _flips(expected, got))


Found = list[tuple[float, Excess | None]]


def _misshapen(name: str, got: HostArray | None, own: HostArray) -> Excess:
    what = "missing" if got is None else f"{got.dtype} {got.shape}"
    said = f"{name}: {what}, expected {own.dtype} {own.shape}"
    return Excess(name, 0, 0, float("inf"), 0.0, said)


def _counted(expected: Expected, name: str, rows: int) -> HostArray:
    """Return the rows that count: all but those whose experts rounding may change."""
    if expected.near is None or name not in ("weights", "ids"):
        return np.arange(rows)
    return np.flatnonzero(~expected.near)


def _integers(
    expected: Expected, name: str, got: HostArray, want: HostArray, keep: HostArray, room: float
) -> Found:
    differ = (got[keep] != want[keep]).any(-1)
    if not differ.any():
        return []
    row = int(keep[np.flatnonzero(differ)[0]])
    said = f"{name}: {int(differ.sum())} rows differ, first row {row}: {got[row]}, not {want[row]}"
    return [(float("inf"), Excess(name, row, row, float("inf"), 0.0, said))]


def _reals(
    expected: Expected, name: str, got: HostArray, want: HostArray, keep: HostArray, room: float
) -> Found:
    rounded = [r[name][keep] for r in expected.rounded]
    if len(keep) == 0:
        return []
    differ = finite_pattern(got[keep]) != finite_pattern(rounded[0])
    if differ.any():
        row = int(keep[np.argwhere(differ)[0][0]])
        said = f"{name}: {int(differ.sum())} values not finite where they should be, or finite"
        return [(float("inf"), Excess(name, row, row, float("inf"), 0.0, f"{said}, row {row}"))]
    exact = expected.want[name][keep]
    rounded += [exact + errors[name][keep] for errors in expected.neighbours]
    allowed = judge(got[keep], exact, rounded)
    error = judge(got[keep], want[keep], rounded) if room > 1 else allowed
    slack = _logit_slack(expected, name, keep, rounded[0])
    rows = np.maximum(allowed.row_bound * room, slack)
    elements = np.maximum(
        allowed.element_bound * np.sqrt(room),
        np.sqrt(slack)[..., None] * np.abs(want[keep].astype(np.float64)),
    )
    return [
        _beyond(name, "rows", keep, error.row_error, rows, 1),
        _beyond(name, "elements", keep, error.element_error, elements, 2),
    ]


def _logit_slack(expected: Expected, name: str, keep: HostArray, own: HostArray) -> Float64:
    """Return what else a row of routing weights may err by; zero for other outputs."""
    if name != "weights" or expected.logit_error is None:
        return np.zeros(own.shape[:-1])
    return weights_slack(expected.logit_error, own.dtype.name)[keep]


def _beyond(
    name: str, what: str, keep: HostArray, error: Float64, bound: Float64, power: int
) -> tuple[float, Excess | None]:
    """Return the worst squared part of a bound, and what to say if it is beyond."""
    if error.size == 0:
        return 0.0, None
    parts = error / np.where(bound > 0, bound, np.finfo(float).tiny)
    place = np.unravel_index(int(np.argmax(parts)), parts.shape)
    worst = float(parts[place]) ** power
    over = parts.reshape(len(keep), -1).max(-1) > 1
    if not over.any():
        return worst, None
    first, row = int(keep[np.flatnonzero(over)[0]]), int(keep[place[0]])
    figures = float(error[place]), float(bound[place])
    said = (
        f"{name}: {int((parts > 1).sum())} of {parts.size} {what} beyond their bound; worst in row "
        f"{row}: {figures[0]:.3g}, allowed {figures[1]:.3g}"
    )
    return worst, Excess(name, first, row, *figures, said)


def _flips(expected: Expected, got: Results) -> tuple[Flip, ...]:
    """Return the rows near a tie that went elsewhere."""
    if expected.near is None or expected.margins is None or "ids" not in got:
        return ()
    want, ids = expected.want["ids"], got["ids"]
    if want.shape != ids.shape:
        return ()
    rows = np.flatnonzero((want != ids).any(-1) & expected.near)
    return tuple(Flip(int(row), float(expected.margins[row])) for row in rows)


NEIGHBOURS = 16
"""Neighbouring inputs that a second look runs the reference on, each in two orders."""

JITTER = 2.0**-4
"""How far, relatively, a neighbour's values are moved: every rounding falls anew, while the row
keeps its size."""


def look_twice(
    spec: StageSpec,
    weights: Prepared,
    run: StageRun,
    expected: Expected,
    got: Results,
    peer: Results | None = None,
) -> Verdict:
    """Hold a run against the reference; before an excess is told, look at more of the rounding.

    How much the reference errs in one row, say that of a decoding step, may be little by chance. So
    it is run on neighbouring inputs, and what it errs there counts as its error here.
    """
    found = verdict(expected, got, peer)
    if not found.excesses or any(np.isinf(e.error) for e in found.excesses):
        return found
    rng = np.random.default_rng(0)
    others = [expect_run(spec, weights, _moved(run, rng)) for _ in range(NEIGHBOURS)]
    errors = [own for other in others for own in own_errors(other)]
    logits = [e.logit_error for e in (expected, *others) if e.logit_error is not None]
    logit = np.maximum.reduce(logits) if logits else None
    return verdict(replace(expected, neighbours=tuple(errors), logit_error=logit), got, peer)


def _moved(run: StageRun, rng: np.random.Generator) -> StageRun:
    return replace(run, inputs={n: jittered(x, rng) for n, x in run.inputs.items()})


def jittered(x: HostArray, rng: np.random.Generator) -> HostArray:
    """Return neighbouring values of the same dtype; ids stay."""
    if x.dtype.kind in "iub":
        return x
    factor = 1 + JITTER * rng.uniform(-1, 1, x.shape)
    return (x.astype(np.float64) * factor).astype(x.dtype)


def own_errors(expected: Expected) -> list[Results]:
    """Return what the reference errs in each order; where experts may change, and infinities, 0."""
    found = []
    for rounded in expected.rounded:
        errors = {}
        for name, want in expected.want.items():
            if want.dtype.kind in "iub":
                continue
            error = rounded[name].astype(np.float64) - want
            if name == "weights" and expected.near is not None:
                error[expected.near] = 0
            errors[name] = np.where(np.isfinite(error), error, 0)
        found.append(errors)
    return found
