"""Everything a split plan can be made of: columns at all clocks, and what each pair passes on.

The pace of a plan is its clock and the slowest of its attention columns, because attention that is
still busy with the head keeps the FFN of everyone waiting. So every column of attention stands for
one pace at each clock: its own, at which columns that are no slower may take part.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from step3_hetero.placement import solve
from step3_hetero.placement.columns import (
    AttentionColumn,
    Clocks,
    FfnColumn,
    attention_columns,
    ffn_columns,
)
from step3_hetero.placement.pace import Wires, pass_s, whole
from step3_hetero.placement.plans import Request
from step3_hetero.placement.pools import Pool

Vector = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Space:
    """All columns at all clocks, what each pair can pass on, and what the pairs cost.

    Shapes: send, take (clocks, I, J): tokens of one micro-batch that an attention instance sends to
    an FFN set, and that the set takes; 0 where there is no way. pass_s (clocks, I): seconds of a
    token, inf where a column has no batch or misses the target.
    """

    request: Request
    clocks: Clocks
    attention: tuple[AttentionColumn, ...]
    ffn: tuple[FfnColumn, ...]
    wires: Wires
    send: Vector = field(repr=False)
    take: Vector = field(repr=False)
    pass_s: Vector = field(repr=False)
    by_pool: tuple[Vector, Vector] = field(init=False, repr=False)
    """What each pool could send, and take, with its best column: (pools, clocks) each."""

    @classmethod
    def of(cls, request: Request) -> Space:
        """Enumerate the columns up to the request's target."""
        problem = request.problem
        clocks = Clocks.until(
            request.tpot_s,
            request.jitter,
            problem.workload.layers,
            request.paces,
            request.pace_step,
        )
        least = min(p.efficiency.message_s for p in problem.pools)
        clocks = clocks.where(clocks.slot_s - clocks.stage_s > 2 * least)
        attention = tuple(attention_columns(problem, clocks))
        ffn = tuple(ffn_columns(problem, clocks))
        wires = Wires(problem, clocks)
        budget_s = request.tpot_s * (1 - request.jitter) * (1 + solve.SAME)
        paces = np.full((len(clocks), len(attention)), np.inf)
        send, take = np.zeros((2, len(clocks), len(attention), len(ffn)))
        for i, a in enumerate(attention):
            paces[:, i] = pass_s(a, clocks)
            paces[paces[:, i] > budget_s, i] = np.inf
            for j, f in enumerate(ffn):
                way = a.pool, f.pool, a.longest_s
                passed = wires.per_card(*way, f.ep)
                send[:, i, j] = np.minimum(a.capacity, whole(passed * a.cards / f.ep))
                passed = wires.taken_per_card(*way, send[:, i, j] / f.tp)
                take[:, i, j] = np.minimum(f.capacity, whole(passed * f.tp))
        usable = np.isfinite(paces)[:, :, None] & (send > 0) & (take > 0)
        return cls(request, clocks, attention, ffn, wires, send * usable, take * usable, paces)

    @property
    def rate(self) -> Vector:
        """Return tokens per second for each token of a micro-batch: (clocks, I)."""
        rate: Vector = self.clocks.micro_batches[:, None] / self.pass_s
        return rate

    def costs(self) -> tuple[Vector, Vector]:
        """Return what one instance of each column adds to the objective."""
        each = np.array([self.request.card_cost(p) for p in self.request.problem.pools])
        a = np.array([each[c.pool] * c.cards for c in self.attention])
        f = np.array([each[c.pool] * c.cards for c in self.ffn])
        return a, f

    def per_token(self) -> Vector:
        """Return the cost of each pair for a token of a micro-batch, fractions allowed.

        Shapes: (clocks, I, J). A set takes no more than all attention cards can send it, an
        instance sends no more than all sets can take: in a small pool that is what counts.
        """
        cost_a, cost_f = self.costs()
        send = np.minimum(self.send, self.by_pool[1].sum(axis=0)[:, None, None])
        take = np.minimum(self.take, self._sent_beside_a_set()[:, None, :])
        with np.errstate(divide="ignore"):
            return np.asarray(cost_a[:, None] / send + cost_f / take)

    def pair_scores(self) -> Vector:
        """Return the cost per token per second of each pair alone: (clocks, I, J)."""
        with np.errstate(divide="ignore"):
            return np.asarray(self.per_token() / self.rate[:, :, None])

    def __post_init__(self) -> None:
        """Work out what the pools can pass on at most."""
        object.__setattr__(self, "by_pool", (self._most(self.send, self.attention, axis=2),
                                             self._most(self.take, self.ffn, axis=1)))  # fmt: skip

    def _most(
        self, tokens: Vector, columns: Sequence[AttentionColumn] | Sequence[FfnColumn], axis: int
    ) -> Vector:
        """Return the most that each pool can pass on with its best column: (pools, clocks)."""
        pools = self.request.problem.pools
        places = np.array([c.pool for c in columns], int)
        fits = [pools[c.pool].groups(c.tp) // (c.cards // c.tp) for c in columns]
        passed = tokens.max(axis=axis, initial=0) * np.array(fits, float)
        return np.stack([passed[:, places == p].max(axis=1, initial=0) for p in range(len(pools))])

    def _sent_beside_a_set(self) -> Vector:
        """Return the most that the cards send which one FFN set of each column leaves: (clocks, J).

        A set takes no more, however many of its kind share it.
        """
        best, pools = self.send.max(axis=2, initial=0), self.request.problem.pools
        a_card = np.zeros((len(self.clocks), len(pools)))
        for n, a in enumerate(self.attention):
            a_card[:, a.pool] = np.maximum(a_card[:, a.pool], best[:, n] / a.cards)
        left = np.array(
            [[p.cards - f.cards * (n == f.pool) for f in self.ffn] for n, p in enumerate(pools)]
        )
        return np.asarray(np.minimum(a_card @ left, self.by_pool[0].sum(axis=0)[:, None]))

    @property
    def most_passed(self) -> Vector:
        """Return the most tokens of a micro-batch that all pools pass on: (clocks,)."""
        return most_passed(*self.by_pool)

    def most_passed_at(self, clock: int, pace_s: float) -> float:
        """Return the most tokens of a micro-batch that all pools pass on at one pace.

        Attention columns that are slower take no part.
        """
        keeps = (self.pass_s[clock] <= pace_s)[:, None]
        send, take = self.send[None, clock] * keeps, self.take[None, clock] * keeps
        sends, takes = self._most(send, self.attention, 2), self._most(take, self.ffn, 1)
        return float(most_passed(sends, takes)[0])

    def mix(self, clock: int, pace_s: float, pools: tuple[int, int] | None = None) -> MixAt:
        """Return the integer program at one pace, without columns that others replace.

        ``pools``: attention on the one, FFN on the other alone.
        """
        keeps = (self.pass_s[clock] <= pace_s)[:, None]
        send, take = self.send[clock] * keeps, self.take[clock] * keeps
        cards_a = np.array([float(c.cards) for c in self.attention])
        cards_f = np.array([float(c.cards) for c in self.ffn])
        places_a, places_f = ([c.pool for c in side] for side in (self.attention, self.ffn))
        if pools is not None:
            send = send * np.equal(places_a, pools[0])[:, None] * np.equal(places_f, pools[1])
            take = take * (send > 0)
        i = solve.undominated(cards_a, send, take, places_a)
        j = solve.undominated(cards_f, take.T, send.T, places_f)
        cost_a, cost_f = self.costs()
        used: list[AttentionColumn | FfnColumn] = [self.attention[n] for n in i]
        used += [self.ffn[n] for n in j]
        rows, limits = server_rows(
            self.request.problem.pools, [(c.pool, c.tp, c.cards // c.tp) for c in used]
        )
        at = np.ix_(i, j)
        mix = solve.Mix(cost_a[i], cost_f[j], send[at], take[at], rows, limits)
        return MixAt(clock, pace_s, i, j, mix)


def server_rows(
    pools: Sequence[Pool], columns: Sequence[tuple[int, int, int]]
) -> tuple[Vector, Vector]:
    """Return rows and limits that make groups of cards fit servers.

    ``columns`` holds pool, cards of a group and groups of each column. For each size the groups at
    least that large take no more cards than groups of that size could; with sizes that divide each
    other this is not only necessary but enough.
    """
    rows, limits = [], []
    for p, pool in enumerate(pools):
        for size in sorted({tp for q, tp, _ in columns if q == p}):
            row = [float(tp * g) if q == p and tp >= size else 0.0 for q, tp, g in columns]
            rows.append(row)
            limits.append(float(size * pool.groups(size)))
    return np.array(rows).reshape(len(rows), len(columns)), np.array(limits)


def most_passed(sends: Vector, takes: Vector) -> Vector:
    """Return the most tokens that pools pass on to each other, fractions of instances allowed.

    Shapes: sends, takes (pools, n) -> (n,). The pools that are best at attention, compared with
    FFN, do attention until both sides are equal; one pool does both.
    """
    with np.errstate(divide="ignore", invalid="ignore"):
        order = np.argsort(np.nan_to_num(-sends / takes, neginf=-np.inf), axis=0)
    sends, takes = np.take_along_axis(sends, order, 0), np.take_along_axis(takes, order, 0)
    sent, most = np.zeros(sends.shape[1]), np.zeros(sends.shape[1])
    left = takes.sum(axis=0)
    for send, take in zip(sends, takes, strict=True):
        left = left - take
        both = send + take
        wanted = np.divide(left + take - sent, both, out=np.zeros_like(both), where=both > 0)
        part = np.clip(wanted, 0, 1)
        passed = np.minimum(sent + part * send, left + (1 - part) * take)
        most, sent = np.maximum(most, passed), sent + send
    return most


@dataclass(frozen=True, slots=True)
class MixAt:
    """A program, its clock and pace, and which columns its rows are."""

    clock: int
    pass_s: float
    attention: Sequence[int]
    ffn: Sequence[int]
    mix: solve.Mix
