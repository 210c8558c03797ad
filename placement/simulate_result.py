"""What a simulated run says: time per output token, tokens per second, use of each role."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from step3_hetero.placement.pipeline import PredictedPipeline
from step3_hetero.placement.simulate_loss import Survival
from step3_hetero.placement.simulate_recurrence import Clock
from step3_hetero.placement.simulate_routes import Bools, Floats, by_group
from step3_hetero.placement.simulate_times import Services, Usual

PERCENTILES = (50, 90, 95, 99)


@dataclass(frozen=True, slots=True)
class RoleUse:
    """How busy the instances (sets, links) of one group were, of the time after the first token."""

    what: str
    """attention, a2f, ffn or f2a."""
    name: str
    """The group's."""
    units: int
    utilisation: float
    least: float
    most: float
    bubble_s: float
    """Idle seconds of one unit for each token, in the mean."""


@dataclass(frozen=True, slots=True)
class Result:
    """The outcome of one run."""

    tokens: int
    instances: int
    layers: int
    seed: int
    elapsed_s: float
    """From the start to the last token of the last instance."""
    tpot_s: Mapping[str, float]
    """mean, p50, p90, p95, p99 and max, over all tokens after the first of every sequence."""
    tokens_per_s: float
    tokens_per_s_per_card: float
    roles: Sequence[RoleUse]
    loss: Mapping[str, Any] | None

    def to_json(self) -> dict[str, Any]:
        """Return plain data."""
        return asdict(self)


@dataclass(slots=True)
class History:
    """What is kept of every token."""

    ends: Floats
    """(tokens, micro-batches, instances): when a token of a micro-batch is done."""
    made: Bools
    """(tokens, instances): False where a loss kept it from being made."""
    sequences: Floats
    """(tokens, instances) in one micro-batch."""
    busy: dict[str, Floats]
    """Seconds after the first token: (instances,), for "ffn" (sets,)."""
    done: int = 0

    @classmethod
    def empty(cls, tokens: int, usual: Usual) -> History:
        """Make room for a run."""
        micro_batches, instances = usual.chosen.shape
        busy = {what: np.zeros(instances) for what in ("attention", "a2f", "f2a")}
        return cls(
            ends=np.zeros((tokens, micro_batches, instances)),
            made=np.zeros((tokens, instances), bool),
            sequences=np.zeros((tokens, instances)),
            busy={**busy, "ffn": np.zeros(usual.ffn.shape[1])},
        )

    def keep(self, number: int, clock: Clock, token: Services, survival: Survival) -> None:
        """Add one token."""
        self.ends[number], self.made[number] = clock.ready, survival.active
        self.sequences[number] = survival.usual.batch * survival.load.instances
        self.done = number + 1
        if number == 0:
            return
        for what in ("attention", "a2f", "f2a"):
            self.busy[what] += getattr(token, what).sum(axis=(0, 1)) * survival.active
        passes = token.ffn.sum(axis=0)
        sets = len(self.busy["ffn"])
        for chosen, seconds in zip(survival.chosen[:, survival.active], passes, strict=True):
            if survival.usual.in_turn and sets:
                self.busy["ffn"] += np.bincount(chosen, seconds[survival.active], sets)
            else:
                self.busy["ffn"] += seconds * np.isin(np.arange(sets), chosen)


def result_of(
    pipeline: PredictedPipeline, usual: Usual, history: History, survival: Survival, seed: int
) -> Result:
    """Sum a run up."""
    ends, made = history.ends[: history.done], history.made[: history.done]
    window = _windows(ends, made)
    tokens_per_s = _rate(ends, made, history.sequences[: history.done])
    weights = (made * history.sequences[: history.done])[1:, None]
    pauses = _gaps(ends, made)
    tpot_s = _percentiles(pauses, np.broadcast_to(weights, pauses.shape))
    return Result(
        tokens=len(history.ends),
        instances=pipeline.attention_instances,
        layers=pipeline.layer_count,
        seed=seed,
        elapsed_s=float(ends[np.repeat(made[:, None], ends.shape[1], 1)].max(initial=0.0)),
        tpot_s=tpot_s,
        tokens_per_s=tokens_per_s,
        tokens_per_s_per_card=tokens_per_s / pipeline.card_count,
        roles=tuple(_roles(pipeline, usual, history.busy, window, tpot_s["mean"])),
        loss=survival.report(_longest_pause(ends, made, pauses, survival)),
    )


def _last(ends: Floats, made: Bools) -> Floats:
    """Return the end of the last token made so far, -inf before any: like ``ends``."""
    last: Floats = np.maximum.accumulate(np.where(made[:, None], ends, -np.inf), axis=0)
    return last


def _gaps(ends: Floats, made: Bools) -> Floats:
    """Return the time since the token before, NaN where one of the two was not made."""
    if made.all():
        return np.diff(ends, axis=0)
    before = _last(ends, made)[:-1]
    there = made[1:, None] & np.isfinite(before)
    return np.where(there, ends[1:] - np.where(there, before, 0.0), np.nan)


def _percentiles(gaps: Floats, weights: Floats) -> dict[str, float]:
    """Return mean, percentiles and maximum; p99 is the least gap that 99 % of tokens keep within.

    Where no sequence made two tokens, all are NaN.
    """
    there = ~np.isnan(gaps)
    values, counts = gaps[there], weights[there]
    if not len(values):
        return dict.fromkeys(["mean", *(f"p{p}" for p in PERCENTILES), "max"], float("nan"))
    order = np.argsort(values)
    reached = np.cumsum(counts[order])
    found = {"mean": float((values * counts).sum() / reached[-1])}
    for percent in PERCENTILES:
        at = np.searchsorted(reached, reached[-1] * percent / 100 * (1 - 1e-12))
        found[f"p{percent}"] = float(values[order[at]])
    return {**found, "max": float(values[order[-1]])}


def _windows(ends: Floats, made: Bools) -> tuple[Floats, Floats]:
    """Return when each instance's first token was done, and when its run ended: (instances,).

    An instance that did not make its last token is counted to the end of the whole run.
    """
    run_end = np.where(made[:, None], ends, 0.0).max()
    some = made.any(axis=0)
    first = ends.max(axis=1)[made.argmax(axis=0), np.arange(made.shape[1])]
    end = np.where(made[-1], ends[-1].max(axis=0), run_end)
    return np.where(some, first, 0.0), end


def _rate(ends: Floats, made: Bools, sequences: Floats) -> float:
    """Return tokens per second: each micro-batch's, from its first token to its last."""
    instances = np.arange(made.shape[1])
    run_end = np.where(made[:, None], ends, 0.0).max()
    first_made = made.argmax(axis=0)
    first = ends[first_made, :, instances].T
    end = np.where(made[-1], ends[-1], run_end)
    later = made & (np.arange(len(made))[:, None] > first_made)
    count = (later * sequences).sum(axis=0)
    seconds = end - first
    return float(np.divide(count, seconds, out=np.zeros_like(seconds), where=seconds > 0).sum())


def _roles(
    pipeline: PredictedPipeline,
    usual: Usual,
    busy: Mapping[str, Floats],
    window: tuple[Floats, Floats],
    tpot_s: float,
) -> list[RoleUse]:
    seconds = window[1] - window[0]
    group = by_group([g.instances for g in pipeline.attention])
    names = [g.name for g in pipeline.attention]
    uses = [_use("attention", names, group, busy["attention"], seconds, tpot_s)]
    if pipeline.split:
        flows, sets = usual.chosen.ravel(), len(busy["ffn"])
        over = np.bincount(flows, np.tile(seconds, len(usual.chosen)), sets)
        of_set = by_group([g.instances for g in pipeline.ffn])
        far = [g.name for g in pipeline.ffn]
        uses.append(_use("a2f", names, group, busy["a2f"], seconds, tpot_s))
        fed = np.bincount(flows, minlength=sets)  # 0: a set that no micro-batch is left for
        shared = np.divide(over, fed, out=np.zeros_like(over), where=fed > 0)
        uses.append(_use("ffn", far, of_set, busy["ffn"], shared, tpot_s))
        uses.append(_use("f2a", names, group, busy["f2a"], seconds, tpot_s))
    return [use for several in uses for use in several]


def _use(
    what: str, names: Sequence[str], group: Any, busy: Floats, seconds: Floats, tpot_s: float
) -> list[RoleUse]:
    used = np.divide(busy, seconds, out=np.zeros_like(busy), where=seconds > 0)
    found = []
    for number, name in enumerate(names):
        mine = used[group == number]
        mean = float(mean_of(mine))
        low, high = float(mine.min()), float(mine.max())
        found.append(RoleUse(what, name, len(mine), mean, low, high, (1 - mean) * tpot_s))
    return found


def mean_of(values: Floats) -> float:
    """Return the mean, no larger than 1 by rounding."""
    return min(float(values.mean()), 1.0)


def _longest_pause(ends: Floats, made: Bools, pauses: Floats, survival: Survival) -> float | None:
    """Return the longest time between two tokens, of sequences that moved as well."""
    found = [float(np.nanmax(pauses))] if not np.isnan(pauses).all() else []
    if survival.joined_at is not None and not made[-1, 0] and not survival.over:
        last = ends[:, :, 0][made[:, 0]].min(axis=1)
        left_at = float(last[-1]) if len(last) else 0.0
        takers = made[survival.joined_at]
        found.append(float(ends[survival.joined_at][:, takers].max()) - left_at)
    return max(found, default=None)
