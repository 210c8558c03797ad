"""How long the sequences are: the mean context of each micro-batch at the first token."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from step3_hetero.placement.simulate_routes import Floats

CHUNK = 1 << 22
"""Sequences drawn at once: 32 MiB."""


@dataclass(frozen=True, slots=True)
class Contexts:
    """Contexts of the sequences when the run starts; each grows by one with each token.

    No sequence ends within a run: its place would be taken by one of another length, which the
    distribution stands for already.
    """

    mean: float
    cv: float = 0.0
    """Of a lognormal distribution; 0: all sequences have the mean."""
    sample: tuple[int, ...] = ()
    """Measured contexts to draw from, with replacement, in the place of the lognormal."""

    def means(self, batch: Floats, micro_batches: int, seed: int) -> Floats:
        """Return the mean context of each micro-batch: (micro-batches, instances).

        ``batch`` (instances,) is the number of sequences; every one is drawn.
        """
        if self.cv == 0.0 and not self.sample:
            return np.full((micro_batches, len(batch)), self.mean)
        random = np.random.default_rng([seed, 1])
        counts = np.tile(batch.astype(np.intp), micro_batches)
        means = np.empty(len(counts))
        step = max(1, CHUNK // int(counts.max()))
        for first in range(0, len(counts), step):
            part = counts[first : first + step]
            starts = np.concatenate([[0], np.cumsum(part)[:-1]])
            drawn = self._draw(random, int(part.sum()))
            means[first : first + step] = np.add.reduceat(drawn, starts) / part
        return means.reshape(micro_batches, len(batch))

    def _draw(self, random: np.random.Generator, count: int) -> Floats:
        if self.sample:
            return random.choice(np.array(self.sample, float), count)
        sigma = math.sqrt(math.log1p(self.cv**2))
        return random.lognormal(math.log(self.mean) - sigma**2 / 2, sigma, count)
