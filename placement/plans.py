"""What is asked of the planner, and the two kinds of plan it answers with."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Vector = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Found:
    """The best plan of one kind and what is proven: no plan of the kind has a better score.

    Scores are cost per token, cost, or minus tokens per second: smaller is better.
    """

    plan: AnyPlan | None
    score: float
    bound: float
    programs: int = 0


def score_of(request: Request, plan: AnyPlan) -> float:
    """Return the plan's score: cost per token, cost, or minus tokens per second."""
    if request.objective == "tokens":
        return -plan.tokens_per_s
    return plan.cost / plan.tokens_per_s if request.by_ratio else plan.cost
