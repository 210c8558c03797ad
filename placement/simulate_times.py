"""How long each service of the pipeline takes: arrays over layers, micro-batches and instances."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from step3_hetero.placement.pipeline import IN_TURN, REMOTE, PredictedPipeline
from step3_hetero.placement.simulate_routes import Bools, Floats, Ints, by_group, usual_sets


@dataclass(frozen=True, slots=True)
class Services:
    """Seconds of every service of one token; ``remote`` counts the layers whose FFN is remote."""

    attention: Floats
    """(layers, micro-batches, instances); the first layer's holds what comes between tokens."""
    a2f: Floats
    """(remote, micro-batches, instances)."""
    ffn: Floats
    """(remote, micro-batches, sets); in-turn (remote, micro-batches, instances)."""
    f2a: Floats
    """(remote, micro-batches, instances)."""


@dataclass(frozen=True, slots=True)
class Usual:
    """The pipeline's seconds without jitter, at the plan's context, spread to single instances."""

    remote: Bools
    """(layers,)."""
    chosen: Ints
    """(micro-batches, instances): the set that serves each."""
    batch: Floats
    """(instances,) sequences of a micro-batch."""
    attention: Floats
    """(layers, instances); the first layer's holds what comes between two tokens."""
    slope: Floats
    """(instances,) seconds for each token of mean context, in every layer."""
    a2f: Floats
    f2a: Floats
    latency: Floats
    """(instances,) each."""
    ffn: Floats
    """(remote, sets)."""
    in_turn: bool

    @classmethod
    def of(cls, pipeline: PredictedPipeline) -> Usual:
        """Spread the groups of a pipeline to its instances."""
        runs = pipeline.layers
        kinds = [run.kind for run in runs for _ in range(run.count)]
        remote = np.repeat([run.ffn == REMOTE for run in runs], [run.count for run in runs])
        counts = [group.instances for group in pipeline.attention]
        group = by_group(counts)
        attention = np.array([[g.seconds[kind] for g in pipeline.attention] for kind in kinds])
        attention[0] += pipeline.between_tokens_s
        far = [kind for kind, is_remote in zip(kinds, remote, strict=True) if is_remote]
        passes = np.array([[g.seconds[kind] for g in pipeline.ffn] for kind in far])
        of_set = by_group([g.instances for g in pipeline.ffn])

        def spread(name: str) -> Any:
            return np.array([float(getattr(g, name)) for g in pipeline.attention])[group]

        return cls(
            remote=remote,
            chosen=usual_sets(pipeline),
            batch=spread("batch"),
            attention=attention[:, group],
            slope=spread("seconds_per_context_token"),
            a2f=spread("a2f_s"),
            f2a=spread("f2a_s"),
            latency=spread("latency_s"),
            ffn=passes[:, of_set] if far else np.zeros((0, 0)),
            in_turn=pipeline.ffn_serves == IN_TURN,
        )


@dataclass(frozen=True, slots=True)
class Load:
    """How much more than usual each instance and set carries after a loss; 1 is as planned."""

    instances: Floats
    """(instances,)."""
    sets: Floats
    """(micro-batches, sets)."""


def services(usual: Usual, chosen: Ints, load: Load, context_above: Floats) -> Services:
    """Return the seconds of one token.

    ``context_above`` (micro-batches, instances) is the mean context less the plan's; attention
    grows with it, to no less than nothing. Attention, wires and FFN grow in proportion to load.
    """
    extra = usual.slope * context_above * load.instances
    attention = usual.attention[:, None] * load.instances + extra
    wires = (int(usual.remote.sum()), *chosen.shape)
    if usual.in_turn and wires[0]:
        passes = usual.ffn[:, chosen] * load.instances
    else:
        passes = usual.ffn[:, None] * load.sets
    return Services(
        np.maximum(attention, 0.0),
        np.broadcast_to(usual.a2f * load.instances, wires),
        passes,
        np.broadcast_to(usual.f2a * load.instances, wires),
    )


class Jitter:
    """Multiplies every service by its own lognormal factor of mean 1 and a given CV."""

    def __init__(self, cv: float, seed: int) -> None:
        self.cv = cv
        self.random = np.random.default_rng(seed)
        self.sigma = math.sqrt(math.log1p(cv * cv))

    def __call__(self, exact: Services) -> Services:
        """Return the services with this token's factors."""
        if self.cv == 0.0:
            return exact
        parts = (exact.attention, exact.a2f, exact.ffn, exact.f2a)
        return Services(*(part * self._factors(part.shape) for part in parts))

    def _factors(self, shape: tuple[int, ...]) -> Floats:
        drawn = self.random.standard_normal(shape)
        drawn *= self.sigma
        drawn -= self.sigma**2 / 2
        return np.exp(drawn, out=drawn)
