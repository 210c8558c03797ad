"""The integer program at one clock: how many instances of each column, and who feeds whom.

Variables: instances n_i of each attention column and sets n_j of each FFN column (whole numbers),
and tokens y_ij of one micro-batch between them. An instance of i that feeds j passes on at most
``send[i, j]`` tokens, its own batch or what the wire takes; a set of j takes at most ``take[i, j]``
from it; an instance may divide itself between partners:

    sum_j y_ij / send_ij <= n_i        sum_i y_ij / take_ij <= n_j        rows @ n <= limits

The last are the pools' servers. Solved by HiGHS through scipy.optimize.milp with ``mip_rel_gap=0``;
a cost per token is a ratio, which Dinkelbach's method turns into a few such programs.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

Vector = npt.NDArray[np.float64]
Whole = npt.NDArray[np.int64]

SAME = 1e-9
"""Relative difference below which two scores are one."""

ROUNDS = 50
"""Of Dinkelbach's method, which converges faster than linearly: a guard, not a setting."""


@dataclass(frozen=True, slots=True)
class Mix:
    """The program's data at one clock.

    Shapes: cost_a (I,), cost_f (J,), send and take (I, J) with 0 where there is no way, rows
    (R, I + J), limits (R,).
    """

    cost_a: Vector
    cost_f: Vector
    send: Vector
    take: Vector
    rows: Vector
    limits: Vector

    @property
    def costs(self) -> Vector:
        """Return the costs of all columns."""
        return np.concatenate([self.cost_a, self.cost_f])


@dataclass(frozen=True, slots=True)
class Counts:
    """An answer: instances, sets, tokens of one micro-batch between them, and the total cost."""

    attention: Whole
    ffn: Whole
    flow: Vector
    tokens: float
    cost: float

    @property
    def ratio(self) -> float:
        """Return cost per token."""
        return self.cost / self.tokens


@dataclass(frozen=True, slots=True)
class Answer:
    """The best counts, if any are better than what was to be beaten, and the proven bound.

    ``bound``: no counts cost less, per token or in all; of `most_tokens`: no counts serve more.
    """

    counts: Counts | None
    bound: float


def quietly(solver: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
    """Call a solver with the process's stdout closed to it.

    HiGHS writes some of its warnings past Python, straight to file descriptor 1, in the middle of
    the JSON that goes there.
    """
    sys.stdout.flush()
    kept, nowhere = os.dup(1), os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 1)
        return solver(*arguments, **options)
    finally:
        os.dup2(kept, 1)
        os.close(kept)
        os.close(nowhere)


OTHER = 4
"""scipy's status of a solver that gave up: not for want of time, nor of a solution."""


def solved(costs: Vector, seconds: float, **program: Any) -> Any:
    """Return what `scipy.optimize.milp` finds, to the last of the gap, within ``seconds``.

    Where HiGHS gives up ("Solve error": seen where a row cuts the optimum off by a hair) it is
    asked once more, without its presolve.
    """
    from scipy.optimize import milp

    options = {"mip_rel_gap": 0, "time_limit": seconds}
    found = quietly(milp, costs, options=options, **program)
    if found.status != OTHER:
        return found
    return quietly(milp, costs, options={**options, "presolve": False}, **program)


class Program:
    """The constraint matrix of a `Mix`, built once for several objectives.

    Columns of the matrix: attention instances, FFN sets, then the tokens of each usable pair.
    """

    def __init__(self, mix: Mix) -> None:
        self.mix = mix
        self.pairs = np.argwhere((mix.send > 0) & (mix.take > 0))
        self.ends = len(mix.cost_a) + len(mix.cost_f)
        i, j = self.pairs[:, 0], self.pairs[:, 1]
        at = np.arange(len(self.pairs))
        self.flows = np.zeros((self.ends, len(self.pairs)))
        self.flows[i, at] = 1 / mix.send[i, j]
        self.flows[len(mix.cost_a) + j, at] = 1 / mix.take[i, j]
        servers = np.hstack([mix.rows, np.zeros((len(mix.rows), len(self.pairs)))])
        self.matrix = np.vstack([np.hstack([-np.eye(self.ends), self.flows]), servers])
        self.upper = np.concatenate([np.zeros(self.ends), mix.limits])
        self.tokens = np.concatenate([np.zeros(self.ends), np.ones(len(self.pairs))])
        self.costs = np.concatenate([mix.costs, np.zeros(len(self.pairs))])

    def solve(
        self,
        objective: Vector,
        seconds: float,
        *,
        least_tokens: float = 0.0,
        most_cost: float = np.inf,
        whole: bool = True,
    ) -> Any:
        """Minimise ``objective``; return scipy's result. Not ``whole``: the relaxation."""
        from scipy.optimize import Bounds, LinearConstraint

        matrix = np.vstack([self.matrix, -self.tokens])
        upper = np.append(self.upper, -least_tokens)
        if np.isfinite(most_cost):
            matrix, upper = np.vstack([matrix, self.costs]), np.append(upper, most_cost)
        integral = np.concatenate([np.full(self.ends, int(whole)), np.zeros(len(self.pairs))])
        return solved(
            objective,
            seconds,
            integrality=integral,
            bounds=Bounds(0, np.inf),
            constraints=LinearConstraint(matrix, -np.inf, upper),
        )

    def served(self, solution: npt.NDArray[Any] | None) -> Counts | None:
        """Return a solution's counts, rounded, with the most tokens they serve; None: no tokens."""
        from scipy.optimize import linprog

        mix = self.mix
        if solution is None or not len(self.pairs):
            return None
        whole = np.round(solution[: self.ends]).astype(np.int64)
        if (mix.rows @ whole > mix.limits * (1 + SAME)).any():
            return None
        columns = len(mix.cost_a)
        used = (whole[self.pairs[:, 0]] > 0) & (whole[columns + self.pairs[:, 1]] > 0)
        if not used.any():
            return None
        open_ends = whole > 0
        found = quietly(
            linprog,
            -np.ones(int(used.sum())),
            A_ub=self.flows[np.ix_(open_ends, used)],
            b_ub=whole[open_ends],
            method="highs",
        )
        if not found.success or -found.fun <= SAME:
            return None
        flow = np.zeros(mix.send.shape)
        flow[self.pairs[used, 0], self.pairs[used, 1]] = found.x
        cost = float(mix.costs @ whole)
        return Counts(whole[:columns], whole[columns:], flow, float(-found.fun), cost)


def cheapest_per_token(mix: Mix, below: float, seconds: float) -> Answer:
    """Return the counts of the least cost per token, if it is under ``below``."""
    program = Program(mix)
    if not len(program.pairs):
        return Answer(None, np.inf)
    best = repeated_unit(program)
    if best is not None and best.ratio >= below * (1 - SAME):
        best = None
    if best is None and not np.isfinite(below):
        best = most_tokens(mix, seconds).counts  # any plan will do to start from
        if best is None:
            return Answer(None, np.inf)
    value = best.ratio if best else below
    floor = pair_ratios(mix, program.pairs).min()
    if floor >= value * (1 - SAME):
        return Answer(best, min(floor, value))
    # An answer of -d to the scaled objective says that the ratio falls by the part d at most.
    least = mix.cost_a.min() + mix.cost_f.min()
    for _ in range(ROUNDS):
        found = program.solve((program.costs - value * program.tokens) / least, seconds)
        counts = program.served(found.x)
        if counts is None or counts.ratio >= value * (1 - SAME):
            dual = -np.inf if found.mip_dual_bound is None else found.mip_dual_bound
            return Answer(best, max(floor, value * (1 + (dual if dual < -SAME else 0.0))))
        best, value = counts, counts.ratio
    return Answer(best, floor)


def pair_ratios(mix: Mix, pairs: Whole) -> Vector:
    """Return the least cost per token of each pair of columns, fractions of instances allowed.

    No mixture of pairs is cheaper than the cheapest of them.
    """
    i, j = pairs[:, 0], pairs[:, 1]
    ratios: Vector = mix.cost_a[i] / mix.send[i, j] + mix.cost_f[j] / mix.take[i, j]
    return ratios


BEST_PAIRS = 3
"""Pairs tried for a unit; another one only starts the search from a worse plan."""


def repeated_unit(program: Program) -> Counts | None:
    """Return the best unit of one attention and one FFN column, as often as it fits the servers.

    At a cost per token only the proportion of the counts matters, and batches are whole numbers:
    send FFN sets to take attention instances leave nothing idle. Where the pools hold that many,
    it meets the bound of the relaxation.
    """
    mix = program.mix
    best: Counts | None = None
    for i, j in program.pairs[np.argsort(pair_ratios(mix, program.pairs))[:BEST_PAIRS]]:
        send, take = int(mix.send[i, j]), int(mix.take[i, j])
        shared = int(np.gcd(send, take))
        unit = np.zeros(program.ends, np.int64)
        unit[i], unit[len(mix.cost_a) + j] = take // shared, send // shared
        counts = program.served(unit * fits_times(mix.rows, mix.limits, unit))
        if counts is not None and (best is None or counts.ratio < best.ratio):
            best = counts
    return best


def fits_times(rows: Vector, limits: Vector, whole: Whole) -> int:
    """Return how often a unit fits."""
    used = rows @ whole
    return int(min(np.floor(limits[used > 0] / used[used > 0]), default=0))


def cheapest_for(mix: Mix, tokens: float, below: float, seconds: float) -> Answer:
    """Return the counts that serve ``tokens`` at the least cost, if it is under ``below``."""
    program = Program(mix)
    if not len(program.pairs):
        return Answer(None, np.inf)
    relaxed = program.solve(program.costs, seconds, least_tokens=tokens, whole=False)
    if relaxed.x is None or relaxed.fun >= below * (1 - SAME):
        return Answer(None, np.inf if relaxed.x is None else relaxed.fun)
    enough = tokens * (1 - SAME)
    limit = below * (1 - SAME)
    found = program.solve(program.costs, seconds, least_tokens=tokens, most_cost=limit)
    counts = program.served(found.x)
    if counts is None or counts.tokens < enough or counts.cost >= limit:
        finished = found.status == INFEASIBLE
        return Answer(None, below if finished else max(relaxed.fun, _dual(found)))
    return Answer(counts, min(max(relaxed.fun, _dual(found)), counts.cost))


INFEASIBLE = 2
"""scipy's status of a program without a solution."""


def _dual(found: Any) -> float:
    return -np.inf if found.mip_dual_bound is None else float(found.mip_dual_bound)


def most_tokens(mix: Mix, seconds: float, above: float = 0.0) -> Answer:
    """Return the counts that serve the most tokens, if more than ``above``; the cheapest of those.

    The bound is on the tokens.
    """
    program = Program(mix)
    if not len(program.pairs):
        return Answer(None, 0.0)
    relaxed = program.solve(-program.tokens, seconds, whole=False)
    if relaxed.x is None or -relaxed.fun <= above * (1 + SAME):
        return Answer(None, 0.0 if relaxed.x is None else -relaxed.fun)
    least = above * (1 + SAME)
    found = program.solve(-program.tokens, seconds, least_tokens=least)
    counts = program.served(found.x)
    if counts is None or counts.tokens <= least:
        finished = found.status == INFEASIBLE
        return Answer(None, above if finished else min(-relaxed.fun, -_dual(found)))
    bound = max(min(-relaxed.fun, -_dual(found)), counts.tokens)
    cheap = program.solve(program.costs, seconds, least_tokens=counts.tokens * (1 - SAME))
    cheaper = program.served(cheap.x)
    if (
        cheaper is not None
        and cheaper.cost < counts.cost
        and cheaper.tokens >= counts.tokens * (1 - 2 * SAME)
    ):
        counts = cheaper
    return Answer(counts, bound)


def knapsack(
    cost: Vector, served: Vector, rows: Vector, limits: Vector, least: float | None, seconds: float
) -> tuple[Whole, float]:
    """Return counts of independent instances, and the proven bound on cost or on minus tokens.

    With ``least`` the cheapest that serve as much; without, those that serve the most.
    """
    from scipy.optimize import Bounds, LinearConstraint

    matrix, upper = rows, limits
    if least is not None:
        matrix, upper = np.vstack([rows, -served]), np.append(limits, -least)
    found = solved(
        cost if least is not None else -served,
        seconds,
        integrality=np.ones(len(cost)),
        bounds=Bounds(0, np.inf),
        constraints=LinearConstraint(matrix, -np.inf, upper),
    )
    if found.x is None:
        none = np.zeros(len(cost), np.int64)
        return none, np.inf if found.status == INFEASIBLE else _dual(found)
    return np.round(found.x).astype(np.int64), _dual(found)


def undominated(cards: Vector, give: Vector, get: Vector, pool: Sequence[int]) -> list[int]:
    """Return the columns that no other column of the same pool replaces.

    Shapes: cards (columns,), give and get (columns, partners): what one of the column passes on,
    and what one of each partner passes on to it. A column replaces another if k of it take at most
    the same cards, k a whole number, give at least as much to every partner and get at least as
    much from one. Of columns that replace each other the first stays.
    """
    kept: list[int] = []
    for c in np.lexsort((-give.sum(axis=1), cards)):
        if not give[c].any():
            continue
        for k in kept:
            enough = (cards[c] // cards[k] * give[k] >= give[c]).all()
            if pool[k] == pool[c] and enough and (get[k] >= get[c]).all():
                break
        else:
            kept.append(int(c))
    return kept
