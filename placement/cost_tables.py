"""The paper's tables, computed from exact inputs (arXiv 2507.19427, Tables 2, 3, 5, 6 and 7)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from types import MappingProxyType
from typing import Any

from step3_hetero.placement.cost import (
    Accelerator,
    cost,
    paper_accelerators,
    paper_cards,
    split,
)
from step3_hetero.placement.workload import Workload, paper_names, paper_workload

CONTEXTS: Mapping[str, int] = MappingProxyType({"8k": 8192, "32k": 32768})
"""The paper's two contexts, in tokens."""

TABLE7_HIDDEN = 7168
TABLE7_LAYERS = 61
"""The shape that DeepSeek-V3 and Step-3 share, for which Table 7 is printed."""

SPARSITY_S = 11.1e-3
"""Two thirds of the 16.6 ms that a stage has at 50 ms a token, rounded as the paper rounds."""

Table = dict[str, dict[str, float]]


def min_sparsity(
    accelerator: Accelerator, net_bytes_per_s: float, hidden: int, layers: int
) -> float:
    """Return the least sparsity S at which the network keeps up with the FFN's batch.

    A batch of B_dense/S reaches the roofline's ridge, and 3 · hidden bytes of each token cross the
    server's NICs (``net_bytes_per_s``, together) in one stage of one layer.
    """
    ridge = accelerator.flops_per_s / accelerator.memory_bandwidth_bytes_per_s
    return hidden * layers * ridge / (net_bytes_per_s * SPARSITY_S)


def paper_tables() -> dict[str, Any]:
    """Return every table, unrounded: models and accelerators by the paper's names.

    table2, table3: one token at 8K and 32K (bytes, FLOPs); table5: dollars per FLOP and per byte;
    table6: dollars per million tokens; afd: likewise, each half where it is cheapest; table7: the
    least sparsity.
    """
    models = [paper_workload(name) for name in paper_names()]
    cards = paper_accelerators()
    return {
        "table2": {m.name: _per_token(m, CONTEXTS["8k"]) for m in models},
        "table3": {m.name: _per_token(m, CONTEXTS["32k"]) for m in models},
        "table5": {a.name: {"u_flop": a.usd_per_flop, "u_byte": a.usd_per_byte} for a in cards},
        "table6": {m.name: _table6(m, cards) for m in models},
        "afd": {
            m.name: {key: split(m, cards, context).usd for key, context in CONTEXTS.items()}
            for m in models
        },
        "table7": {
            a.name: min_sparsity(a, server_net_bytes_per_s(a.name), TABLE7_HIDDEN, TABLE7_LAYERS)
            for a in cards
        },
    }


def afd_places() -> dict[str, dict[str, str]]:
    """Return where the AFD totals put each model's halves, as ``H20 + 910B``."""
    cards = paper_accelerators()
    places: dict[str, dict[str, str]] = {}
    for name in paper_names():
        found = {key: split(paper_workload(name), cards, c) for key, c in CONTEXTS.items()}
        places[name] = {key: f"{s.attention} + {s.ffn}" for key, s in found.items()}
    return places


def cells(tables: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    """Yield every number with its keys joined by slashes, as ``table6/Step-3/ffn/H20``."""
    for key, value in tables.items():
        if isinstance(value, Mapping):
            yield from ((f"{key}/{below}", number) for below, number in cells(value))
        else:
            yield key, value


def server_net_bytes_per_s(card: str) -> float:
    """Return the NICs of one of the paper's servers together, each direction."""
    data = paper_cards()[card]
    gigabits: float = data["nics_per_server"] * data["nic_gbit_per_s"]
    return gigabits * 1e9 / 8


def _per_token(model: Workload, context: int) -> dict[str, float]:
    return {
        "kv_bytes": model.kv_bytes(context),
        "attention_flops": model.attention_flops(context),
        "linear_flops": model.linear_flops,
        "ffn_flops": model.ffn_flops,
    }


def _table6(model: Workload, cards: list[Accelerator]) -> Table:
    rows = {
        f"attention_{key}": {a.name: cost(model, a, context).attention_usd for a in cards}
        for key, context in CONTEXTS.items()
    }
    rows["ffn"] = {a.name: cost(model, a, 1).ffn_usd for a in cards}
    return rows
