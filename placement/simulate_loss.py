"""What happens when one attention instance or FFN set is lost, as `step3-hetero simulate` has it.

- The first instance (set) of the role is lost at T. Nothing it would have finished later arrives.
- The attention instances that wait for it, directly or through a shared set, stall: the token that
  any of them had not finished at T is made again by all of them, in the place of their next. The
  loss is noticed, and they go on, at T + ``deadline_s``.
- They join the others at the first token that every unaffected instance starts after that.
- With a spare, the spare takes the place of what was lost, with the weights loaded already.
- Without: a lost attention instance's sequences spread evenly over the instances of its group (over
  all others where it had none beside it), and attention, both wires and the FFN pass of a set take
  longer in proportion to the sequences. A lost set's instances spread evenly over the sets of its
  group (over all others where it was the only one), whose passes take longer in proportion. That is
  an upper bound: reading the weights takes no longer for more tokens.
- Where nothing is left to take over, the run ends at T.
- Rebuilding the lost sequences' KV cache is prefill, which runs elsewhere and is not in the model.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from step3_hetero.errors import RequestError
from step3_hetero.placement.pipeline import PredictedPipeline
from step3_hetero.placement.simulate_recurrence import Clock
from step3_hetero.placement.simulate_routes import Bools, Floats, Ints, by_group, connected
from step3_hetero.placement.simulate_times import Load, Usual

ROLES = ("attention", "ffn")


@dataclass(frozen=True, slots=True)
class Loss:
    """The first instance of a role, "attention" or "ffn", is lost at a time."""

    role: str
    at_s: float
    deadline_s: float = 2.0
    """Until the others notice; `transport.deadline_s` of the config."""


class Survival:
    """Who takes part in the next token, on which sets and under what load."""

    def __init__(self, pipeline: PredictedPipeline, usual: Usual, loss: Loss | None) -> None:
        if loss and loss.role == "ffn" and not pipeline.ffn:
            raise RequestError("--fail ffn: the plan is colocated and has no FFN sets; attention")
        micro_batches, instances = usual.chosen.shape
        self.pipeline, self.usual, self.loss = pipeline, usual, loss
        self.chosen: Ints = usual.chosen
        self.active: Bools = np.ones(instances, bool)
        self.load = Load(np.ones(instances), np.ones((micro_batches, usual.ffn.shape[1])))
        self.affected: Bools = np.zeros(instances, bool)
        self.struck_at: int | None = None
        self.joined_at: int | None = None
        self.over = False
        """Nothing is left that could go on."""
        self._wait_for = self._waiting() if loss else self.affected

    def _waiting(self) -> Bools:
        assert self.loss is not None
        if self.loss.role == "ffn":
            start: Bools = (self.usual.chosen == 0).any(axis=0)
        else:
            start = np.arange(len(self.active)) == 0
        return connected(self.usual.chosen, start) if self.pipeline.ffn else start

    @property
    def pending(self) -> bool:
        """Whether the loss is still to come."""
        return self.loss is not None and self.struck_at is None

    def strike(self, number: int, before: Clock, after: Clock) -> bool:
        """Undo token ``number`` of those whom the loss stalls; return False before its time."""
        if not self.pending or not self.loss:
            return False
        if not (after.ready[:, self._wait_for] > self.loss.at_s).any():
            return False
        self.struck_at, self.affected = number, self._wait_for
        sets = np.isin(np.arange(len(after.sets)), self.chosen[:, self.affected])
        after.put_back(before, self.affected, sets)
        after.not_before(self.loss.at_s + self.loss.deadline_s, self.affected)
        self.active = ~self.affected
        return True

    def join(self, number: int, clock: Clock) -> bool:
        """Let the stalled go on where it is time; return whether anything has changed."""
        if self.struck_at is None or self.joined_at is not None or not self.loss:
            return False
        resume_s = self.loss.at_s + self.loss.deadline_s
        if self.active.any() and clock.ready[:, self.active].min() < resume_s:
            return False
        self.joined_at = number
        self.active = np.ones_like(self.active)
        takers = self._lose_ffn() if self.loss.role == "ffn" else self._lose_attention()
        self.over = not takers
        return True

    def _lose_ffn(self) -> bool:
        """Spread the lost set's instances over others; return whether there are any."""
        if self.pipeline.ffn[0].spares:
            return True
        group = by_group([g.instances for g in self.pipeline.ffn])
        takers = np.flatnonzero(group == 0)[1:]
        if not len(takers):
            takers = np.flatnonzero(group != 0)
        if not len(takers):
            return False
        moved = self.chosen == 0
        self.chosen = self.chosen.copy()
        self.chosen[moved] = takers[np.arange(moved.sum()) % len(takers)]
        self._weigh_sets()
        return True

    def _lose_attention(self) -> bool:
        """Spread the lost instance's sequences over others; return whether there are any."""
        if self.pipeline.attention[0].spares:
            return True
        self.active[0] = False
        group = by_group([g.instances for g in self.pipeline.attention])
        takers = self.active & (group == 0)
        if not takers.any():
            takers = self.active
        if not takers.any():
            return False
        batch = self.usual.batch
        more = 1 + batch[0] / batch[takers].sum()
        self.load.instances[takers] = more
        self._weigh_sets()
        return True

    def _weigh_sets(self) -> None:
        """Set each set's load: the tokens of a pass, by those of a usual one."""
        usual = self._tokens(self.usual.chosen, self.usual.batch)
        now = self._tokens(self.chosen, self.usual.batch * self.load.instances * self.active)
        passes = np.maximum((usual > 0).sum(axis=0), 1)
        mean = usual.sum(axis=0) / passes
        self.load.sets[:] = now / np.where(usual > 0, usual, mean)

    def _tokens(self, chosen: Ints, batch: Floats) -> Floats:
        sets = self.usual.ffn.shape[1]
        return np.array([np.bincount(row, batch, sets) if sets else [] for row in chosen])

    def report(self, tpot_pause_s: float | None) -> dict[str, Any] | None:
        """Return what happened as plain data, None without a loss."""
        if not self.loss:
            return None
        struck = self.struck_at is not None
        return {
            "role": self.loss.role,
            "at_s": self.loss.at_s,
            "deadline_s": self.loss.deadline_s,
            "happened": struck,
            "stalled_instances": int(self.affected.sum()),
            "nothing_left": self.over,
            "resumed": self.joined_at is not None and not self.over,
            "longest_pause_s": tpot_pause_s if struck else None,
        }
