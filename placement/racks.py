"""Putting a plan's instances on real servers, and their traffic on real uplinks.

The planner knows how many groups of cards fit servers, but not in which rack they stand. Here every
FFN set takes the rack with the most room for its attention instances, these follow it where they
fit, and what crosses racks is counted on both uplinks, each way. What the uplinks do not carry is
left out: the plan shrinks, its bound stays, and the gap says what that cost.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from heapq import heapreplace
from typing import Any

import numpy as np

from step3_hetero.placement.inventory import Inventory
from step3_hetero.placement.network import a2f_bytes, f2a_bytes
from step3_hetero.placement.planner import Found, Outcome, score_of
from step3_hetero.placement.plans import AnyPlan, ColocatedPlan, Request, SplitPlan

MOST_SERVERS = 512
"""Where no uplink limits anything, more servers than this are not told apart."""

DRAWN = 64
"""Servers of a rack that a report draws one by one."""


@dataclass(slots=True)
class Slot:
    """One server: its free cards and who uses the others."""

    name: str
    pool: str
    card: str
    cards: int
    free: int
    used: list[dict[str, Any]] = field(default_factory=list)


class Floor:
    """All servers by rack and pool, and what the uplinks carry so far, bytes of one micro-batch."""

    def __init__(self, inventory: Inventory, slot_s: float) -> None:
        self.racks: dict[str, dict[str, list[Slot]]] = {}
        for entry in inventory.servers:
            slots = self.racks.setdefault(entry.rack, {}).setdefault(entry.pool, [])
            cards = entry.card.server.cards
            for _ in range(entry.count):
                name = f"{entry.rack}/{entry.pool}/{len(slots) + 1}"
                slots.append(Slot(name, entry.pool, entry.card.name, cards, cards))
        self.room = {rack: rate * slot_s for rack, rate in inventory.uplinks.items()}
        self.out: dict[str, float] = defaultdict(float)
        self.into: dict[str, float] = defaultdict(float)
        self.free = {
            (rack, pool): sum(s.free for s in slots)
            for rack, pools in self.racks.items()
            for pool, slots in pools.items()
        }

    def take(self, rack: str, pool: str, tp: int, use: dict[str, Any]) -> Slot | None:
        """Take ``tp`` cards of one server, the fullest that has them."""
        if self.free.get((rack, pool), 0) < tp:
            return None
        fitting = [s for s in self.racks[rack][pool] if s.free >= tp]
        if not fitting:
            return None
        slot = min(fitting, key=lambda s: s.free)
        slot.free -= tp
        self.free[rack, pool] -= tp
        slot.used.append({**use, "cards": tp})
        return slot

    def carries(self, home: str, there: float, back: float) -> bool:
        """Return whether a rack's own uplink has room for traffic from some other rack."""
        fits = self.into[home] + there <= self.room[home]
        return fits and self.out[home] + back <= self.room[home]

    def release(self, rack: str, slot: Slot, use: dict[str, Any]) -> None:
        """Free what one instance has taken of a server."""
        taken = next(u for u in slot.used if u["role"] == use["role"] and _same(u, use))
        slot.used.remove(taken)
        slot.free += taken["cards"]
        self.free[rack, slot.pool] += taken["cards"]

    def give_back(self, rack: str, slot: Slot) -> None:
        """Undo the last `take` of a server."""
        tp = slot.used.pop()["cards"]
        slot.free += tp
        self.free[rack, slot.pool] += tp

    def carry(self, source: str, target: str, there: float, back: float) -> bool:
        """Book traffic between two racks; False, and nothing booked, where an uplink is full."""
        if source == target:
            return True
        fits = (
            self.out[source] + there <= self.room[source]
            and self.into[source] + back <= self.room[source]
            and self.into[target] + there <= self.room[target]
            and self.out[target] + back <= self.room[target]
        )
        if fits:
            self.out[source] += there
            self.into[source] += back
            self.into[target] += there
            self.out[target] += back
        return fits

    def to_json(self) -> list[dict[str, Any]]:
        """Return the racks as a report draws them."""
        found = []
        for rack, pools in self.racks.items():
            slots = [slot for members in pools.values() for slot in members]
            drawn = slots[:DRAWN]
            entry: dict[str, Any] = {
                "name": rack,
                "servers": [
                    {"name": s.name, "card": s.card, "cards": s.cards, "used": s.used}
                    for s in drawn
                ],
            }
            if len(slots) > len(drawn):
                entry["more_servers"] = len(slots) - len(drawn)
            found.append(entry)
        return found


@dataclass(frozen=True, slots=True)
class Placed:
    """A plan on its servers; ``left_out`` counts instances that found no way over the uplinks.

    ``racks`` is empty where there are too many servers to tell apart.
    """

    outcome: Outcome
    racks: list[dict[str, Any]]
    left_out: int


def place_on_racks(outcome: Outcome, inventory: Inventory) -> Placed:
    """Place the winner; where uplinks bind, the plan that is placed takes its place."""
    plan = outcome.plan
    unlimited = all(math.isinf(rate) for rate in inventory.uplinks.values())
    if plan is None or (unlimited and sum(s.count for s in inventory.servers) > MOST_SERVERS):
        return Placed(outcome, [], 0)
    pace = plan.pass_s
    in_flight = plan.micro_batches if isinstance(plan, SplitPlan) else 1
    floor = Floor(inventory, pace / in_flight)
    if isinstance(plan, ColocatedPlan):
        _place_colocated(plan, floor, outcome.request)
        return Placed(outcome, floor.to_json(), 0)
    counts, flow = _counts(plan, _place_split(plan, floor, outcome))
    wanted = sum(n for _, n in plan.attention)
    left = wanted - int(sum(counts[0]))
    if left == 0:
        return Placed(outcome, floor.to_json(), 0)
    smaller = _smaller(plan, counts, flow, outcome.request)
    found = Found(smaller, _score(outcome.request, smaller), outcome.split.bound)
    placed = replace(outcome, split=found)
    if isinstance(placed.plan, ColocatedPlan):
        floor = Floor(inventory, pace)
        _place_colocated(placed.plan, floor, outcome.request)
    return Placed(placed, floor.to_json(), left)


def _score(request: Request, plan: AnyPlan | None) -> float:
    if plan is None:
        return math.inf
    short = request.demand is not None and plan.tokens_per_s < request.demand * (1 - 1e-9)
    return math.inf if short else score_of(request, plan)


def _place_colocated(plan: ColocatedPlan, floor: Floor, request: Request) -> None:
    number = -1
    for column, count in plan.columns:
        pool = request.problem.pools[column.pool].name
        racks = [r for r in floor.racks if pool in floor.racks[r]]
        for _ in range(count):
            number += 1
            use = {"role": "colocated", "instance": number}
            racks.sort(key=lambda r: -floor.free[r, pool])
            for _ in range(column.cards // column.tp):
                any(floor.take(rack, pool, column.tp, use) for rack in racks)


@dataclass(slots=True)
class Cell:
    """One placed FFN set with the attention instances that feed it: columns, tokens and servers."""

    ffn: int
    fed: list[tuple[int, float]]
    taken: list[tuple[str, Slot, dict[str, Any]]]


def _same(a: Mapping[str, Any], b: Mapping[str, Any]) -> bool:
    return bool(a["instance"] == b["instance"])


def _place_split(plan: SplitPlan, floor: Floor, outcome: Outcome) -> list[Cell]:
    """Place sets and the instances that feed them; return those that serve something."""
    problem = outcome.request.problem
    layers, workload = problem.workload.layers, problem.workload
    there = layers * a2f_bytes(workload, problem.wire_dtype)
    back = layers * f2a_bytes(workload)
    cells: list[Cell] = []
    number = 0
    for j, share in _sets(plan):
        home, taken = _place_set(plan, j, len(cells), floor, share)
        if home is None:
            continue
        cell = Cell(j, [], taken)
        for i, tokens in share:
            column = plan.attention[i][0]
            pool = plan.pools[column.pool].name
            bulk = tokens * plan.ffn[j][0].ep
            use = {"role": "attention", "instance": number}
            found = _follow(floor, home, pool, column.tp, (bulk * there, bulk * back), use)
            if found is not None:
                cell.fed.append((i, tokens))
                cell.taken.append((*found, use))
                number += 1
        cells.append(cell)
    return _worth_it(plan, cells, floor, outcome)


def _worth_it(plan: SplitPlan, cells: list[Cell], floor: Floor, outcome: Outcome) -> list[Cell]:
    """Return the cells that serve a token cheaper than the best plan that does not split.

    Where uplinks leave a set with few instances, its cards serve better without it. A demand, or
    most tokens, keep every cell that serves.
    """
    request, kept = outcome.request, []
    for cell in cells:
        used: list[tuple[int, int]] = [
            (plan.attention[i][0].pool, plan.attention[i][0].cards) for i, _ in cell.fed
        ]
        used.append((plan.ffn[cell.ffn][0].pool, plan.ffn[cell.ffn][0].cards))
        cost = sum(request.card_cost(plan.pools[p]) * cards for p, cards in used)
        served = _tokens(plan, cell) * plan.micro_batches / plan.pass_s
        dear = request.by_ratio and cost > outcome.colocated.score * served
        if served and not dear:
            kept.append(cell)
            continue
        for rack, slot, use in cell.taken:
            floor.release(rack, slot, use)
    return kept


def _tokens(plan: SplitPlan, cell: Cell) -> float:
    """Return the tokens of one micro-batch of a cell: what is sent, at most what the set takes."""
    most = float(plan.ffn[cell.ffn][0].capacity[plan.clock])
    return min(sum(tokens for _, tokens in cell.fed), most)


def _counts(
    plan: SplitPlan, cells: Sequence[Cell]
) -> tuple[tuple[list[int], list[int]], np.ndarray[Any, Any]]:
    """Return how many of each column are placed, and their tokens."""
    done_a, done_f = [0] * len(plan.attention), [0] * len(plan.ffn)
    flow = np.zeros_like(plan.flow)
    for cell in cells:
        done_f[cell.ffn] += 1
        part = _tokens(plan, cell) / sum(tokens for _, tokens in cell.fed)
        for i, tokens in cell.fed:
            done_a[i] += 1
            flow[i, cell.ffn] += tokens * part
    return (done_a, done_f), flow


def _sets(plan: SplitPlan) -> Iterator[tuple[int, list[tuple[int, float]]]]:
    """Yield each FFN set with the attention instances that feed it: column and tokens.

    An instance goes to one set whole, the one with the least so far.
    """
    dealt: dict[int, list[list[tuple[int, float]]]] = {
        j: [[] for _ in range(count)] for j, (_, count) in enumerate(plan.ffn)
    }
    held = {j: [(0.0, n) for n in range(count)] for j, (_, count) in enumerate(plan.ffn)}
    for i, (_, count) in enumerate(plan.attention):
        each = plan.flow[i].sum() / count
        ends = np.cumsum(plan.flow[i]) / max(plan.flow[i].sum(), 1e-12)
        for n in range(count):
            j = int(np.searchsorted(ends, (n + 0.5) / count))
            j = min(j, len(plan.ffn) - 1)
            tokens, lightest = held[j][0]
            heapreplace(held[j], (tokens + float(each), lightest))
            dealt[j][lightest].append((i, float(each)))
    for j, sets in dealt.items():
        for share in sets:
            yield j, share


def _place_set(
    plan: SplitPlan, j: int, number: int, floor: Floor, share: list[tuple[int, float]]
) -> tuple[str | None, list[tuple[str, Slot, dict[str, Any]]]]:
    """Place a set in the rack with the most room for those that feed it; None: nowhere."""
    column = plan.ffn[j][0]
    pool = plan.pools[column.pool].name
    feeding = {plan.pools[plan.attention[i][0].pool].name for i, _ in share}
    use = {"role": "ffn", "instance": number}

    def room(rack: str) -> tuple[bool, int]:
        whole = floor.free.get((rack, pool), 0) >= column.cards
        return whole, sum(floor.free.get((rack, p), 0) for p in feeding)

    racks = sorted((r for r in floor.racks if pool in floor.racks[r]), key=room, reverse=True)
    taken: list[tuple[str, Slot, dict[str, Any]]] = []
    for rack in racks:
        while len(taken) < column.ep:
            slot = floor.take(rack, pool, column.tp, use)
            if slot is None:
                break
            taken.append((rack, slot, use))
        if len(taken) == column.ep:
            return taken[0][0], taken
    for rack, slot, _ in reversed(taken):
        floor.give_back(rack, slot)
    return None, []


def _follow(
    floor: Floor, home: str, pool: str, tp: int, traffic: tuple[float, float], use: dict[str, Any]
) -> tuple[str, Slot] | None:
    """Place an attention instance: with its set where it fits, else where the uplinks carry it."""
    for rack in _nearest(floor, home, pool, tp):
        if rack != home and not floor.carries(home, *traffic):
            return None
        slot = floor.take(rack, pool, tp, use)
        if slot is None:
            continue
        if floor.carry(rack, home, *traffic):
            return rack, slot
        floor.give_back(rack, slot)
    return None


def _nearest(floor: Floor, home: str, pool: str, tp: int) -> Iterator[str]:
    """Yield a set's own rack, then those with the most free cards."""
    yield home
    others = (r for r in floor.racks if r != home and floor.free.get((r, pool), 0) >= tp)
    yield from sorted(others, key=lambda r: -floor.free[r, pool])


def _smaller(
    plan: SplitPlan,
    counts: tuple[list[int], list[int]],
    flow: np.ndarray[Any, Any],
    request: Request,
) -> SplitPlan | None:
    """Return what was placed as a plan of its own."""
    used_a = [n for n, count in enumerate(counts[0]) if count]
    used_f = [n for n, count in enumerate(counts[1]) if count]
    if not used_a or not used_f:
        return None
    attention = tuple((plan.attention[n][0], counts[0][n]) for n in used_a)
    ffn = tuple((plan.ffn[n][0], counts[1][n]) for n in used_f)
    spent = [(c.pool, c.cards, n) for c, n in attention] + [(c.pool, c.cards, n) for c, n in ffn]
    cost = sum(request.card_cost(plan.pools[p]) * cards * n for p, cards, n in spent)
    kept = flow[np.ix_(used_a, used_f)]
    served = float(kept.sum()) * plan.micro_batches / plan.pass_s
    return replace(
        plan, attention=attention, ffn=ffn, flow=kept, tokens_per_s=served, cost=float(cost)
    )
