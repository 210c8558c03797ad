"""What a report shows: the planner's JSON, key by key.

The keys of `PlanJson` that are required are those of ``plan --json``. The others each bring one
section of the page; a section whose key is missing is replaced by a sentence that says so.
(Annotations are not postponed here: which keys are required is read from them.)
"""

from collections.abc import Mapping
from typing import Any, NotRequired, TypedDict


class Alternative(TypedDict):
    """A placement that was priced and not chosen."""

    label: str
    """Such as "h800 attention, h20 FFN, 2 : 3"."""
    usd_per_mtok: float | None
    """None: it does not run at all."""
    loses_on: str
    """memory, stage time, network or price."""
    detail: str
    """One sentence with the figure: by how much it loses."""
    tpot_ms: NotRequired[float | None]
    tokens_per_s: NotRequired[float | None]


class ParetoPoint(TypedDict):
    """The cheapest placement at one latency."""

    tpot_ms: float
    usd_per_mtok: float
    label: str
    chosen: NotRequired[bool]


class ContextPoint(TypedDict):
    """The cost of one placement at one context."""

    context: int
    usd_per_mtok: float | None
    """None: it does not run at this context."""


class ContextLine(TypedDict):
    """The cost of one placement against context, contexts ascending."""

    label: str
    points: list[ContextPoint]
    chosen: NotRequired[bool]


class Use(TypedDict):
    """Cards of one server that one instance of a role takes."""

    role: str
    """attention, ffn, or colocated."""
    instance: int
    cards: int


class ServerJson(TypedDict):
    """A server: its cards and who uses them; cards that nobody uses are drawn empty."""

    name: str
    card: str
    cards: int
    used: list[Use]


class Rack(TypedDict):
    """Servers that stand together; servers that are used alike may be sent once with ``alike``."""

    name: str
    servers: list[ServerJson]
    more_servers: NotRequired[int]
    """Further servers of the rack, used like the last one, that are not drawn one by one."""


class PlanJson(TypedDict):
    """A plan, as ``plan --json`` prints it."""

    feasible: bool
    objective_usd_per_mtok: float | None
    lower_bound: float | None
    gap: float | None
    """(objective - lower bound) / objective."""
    paper_bound: float | None
    tpot_ms: float | None
    tokens_per_s: float | None
    cards: Mapping[str, int]
    attention: Mapping[str, Any]
    """Keys and values as shown; ``groups``, a list of the same, has a panel each where several."""
    ffn: Mapping[str, Any]
    split: bool
    alternatives: list[Alternative]
    solve_s: float
    model: NotRequired[str]
    context: NotRequired[int]
    tpot_target_ms: NotRequired[float]
    binding: NotRequired[str]
    """One sentence: the constraint that keeps the winner from being cheaper."""
    reason: NotRequired[str]
    """Where nothing is feasible: the sentence that says why and what would help."""
    notes: NotRequired[list[str]]
    """Assumptions, such as a card's constants being uncalibrated."""
    usd_per_mtok_range: NotRequired[tuple[float, float]]
    """The low and the high case, where constants are assumed."""
    breakdown: NotRequired[Mapping[str, float]]
    """Part -> $ per million tokens; the parts sum to the objective."""
    edges: NotRequired[list[Mapping[str, Any]]]
    """Between which pools rows travel: the hops, the slowest, seconds for one micro-batch in one
    layer; none where the plan does not split."""
    run: NotRequired[Mapping[str, Any]]
    """What the plan gives as its pipeline runs: tpot_ms, tokens_per_s, usd_per_mtok."""
    cost_by_context: NotRequired[list[ContextLine]]
    pareto: NotRequired[list[ParetoPoint]]
    racks: NotRequired[list[Rack]]
    pipeline: NotRequired[Mapping[str, Any]]
    """`PredictedPipeline.to_json`; the page simulates it and draws the first tokens."""
