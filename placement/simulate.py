"""Simulate the pipeline of a plan, token by token: `simulate` is the way in.

`simulate_recurrence` says when a service starts, `simulate_loss` what a lost instance does,
`simulate_result` what comes out.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from step3_hetero.errors import RequestError
from step3_hetero.placement.pipeline import PredictedPipeline
from step3_hetero.placement.simulate_contexts import Contexts
from step3_hetero.placement.simulate_loss import Loss, Survival
from step3_hetero.placement.simulate_recurrence import Clock, Watch, advance
from step3_hetero.placement.simulate_result import History, Result, result_of
from step3_hetero.placement.simulate_routes import Bools, Route, routes
from step3_hetero.placement.simulate_times import Jitter, Services, Usual, services

LEAST_TOKENS = 2
"""A time per output token needs two."""
MOST_ENDS = 100_000_000
"""Tokens x micro-batches x instances: 800 MB of times."""


@dataclass(frozen=True, slots=True)
class Scenario:
    """How a pipeline is run."""

    tokens: int = 100
    """Tokens of every sequence."""
    jitter_cv: float = 0.0
    """Standard deviation over mean of every service, lognormal, independent of each other."""
    seed: int = 0
    contexts: Contexts | None = None
    """None: every sequence starts with the plan's context."""
    loss: Loss | None = None


class Recorder(Watch, Protocol):
    """A watch that is told which token comes next, and what a loss has undone."""

    def token(self, number: int, active: Bools) -> None:
        """Start a token; what is seen of instances that are not active does not happen."""

    def undo(self, stalled: Bools) -> None:
        """Forget this token of some instances."""


def simulate(
    pipeline: PredictedPipeline,
    scenario: Scenario,
    *,
    recorder: Recorder | None = None,
    on_token: Callable[[int, int], None] = lambda done, total: None,
) -> Result:
    """Run every instance for ``scenario.tokens`` tokens.

    Raises:
        RequestError: fewer than 2 tokens, more results than memory, a loss of what is not there.
    """
    usual = Usual.of(pipeline)
    _check(scenario, usual)
    survival = Survival(pipeline, usual, scenario.loss)
    history = History.empty(scenario.tokens, usual)
    contexts = scenario.contexts or Contexts(pipeline.context)
    means = contexts.means(usual.batch, pipeline.micro_batches, scenario.seed)
    jitter = Jitter(scenario.jitter_cv, scenario.seed)
    clock, passes = Clock.at_zero(usual), routes(survival.chosen, survival.active)
    for number in range(scenario.tokens):
        if survival.join(number, clock):
            if survival.over:
                break
            passes = routes(survival.chosen, survival.active)
        above = means + number - pipeline.context
        token = jitter(services(usual, survival.chosen, survival.load, above))
        if _one_token(clock, passes, token, survival, number, recorder):
            passes = routes(survival.chosen, survival.active)
        history.keep(number, clock, token, survival)
        on_token(number + 1, scenario.tokens)
    return result_of(pipeline, usual, history, survival, scenario.seed)


def _one_token(
    clock: Clock, passes: Sequence[Route], token: Services, survival: Survival, number: int,
    recorder: Recorder | None,
) -> bool:  # fmt: skip
    """Advance by one token; return whether a loss fell into it, undone for those it stalls."""
    before = clock.copy() if survival.loss else clock
    if recorder:
        recorder.token(number, survival.active)
    advance(clock, survival.usual, passes, token, recorder)
    if not survival.loss:
        return False
    clock.put_back(before, ~survival.active, np.zeros(len(clock.sets), bool))
    struck = survival.strike(number, before, clock)
    if struck and recorder:
        recorder.undo(survival.affected)
    return struck


def _check(scenario: Scenario, usual: Usual) -> None:
    if scenario.tokens < LEAST_TOKENS:
        raise RequestError(f"tokens: {scenario.tokens} is too few; from {LEAST_TOKENS}")
    ends = scenario.tokens * usual.chosen.size
    if ends > MOST_ENDS:
        most = MOST_ENDS // usual.chosen.size
        raise RequestError(
            f"tokens: {scenario.tokens} tokens of {usual.chosen.size} micro-batches are more than "
            f"fit into memory; at most {most}"
        )
