"""What cards reach of their data sheets: two constants and a message latency for each vendor.

NVIDIA's are fitted to the published rows of ``calibration.yaml``; Ascend's are assumptions with a
low and a high case. ``python -m step3_hetero.placement.calibration`` fits again and prints the
error of every row, of the rows held out, and of each fitted row when it is left out.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np

from step3_hetero.placement.catalogue import Card, Catalogue
from step3_hetero.placement.colocated import ColocatedStage
from step3_hetero.placement.efficiency import MICRO, Efficiency, stored
from step3_hetero.placement.network import Wire, a2f_bytes, f2a_bytes, wire_between
from step3_hetero.placement.performance import AttentionStage, FfnStage, Roof
from step3_hetero.placement.workload import ELEMENT_BYTES, Workload, paper_workload

LAYER_CONTEXT, LAYER_TOKENS, LAYER_CARDS = 8192, 256, 4
SPLIT_CONTEXT, SPLIT_BATCH, SPLIT_MICRO_BATCHES, SPLIT_CARDS = 4096, 6144, 3, 32
SPLIT_ATTENTION_CARDS, SPLIT_SETS_OF, SPLIT_TP = 16, 2, 8
COLOCATED_CONTEXT, COLOCATED_BATCH, COLOCATED_CARDS, COLOCATED_IN_FLIGHT = 4096, 128, 128, 2


@dataclass(frozen=True, slots=True)
class Row:
    """One published measurement."""

    name: str
    use: str
    kind: str
    card: str
    figure: float


@cache
def _card(name: str) -> Card:
    return Catalogue.read().card(name)


@cache
def _model(name: str) -> Workload:
    return paper_workload(name)


def rows(use: str | None = None) -> list[Row]:
    """Return the measurements, all or those of one use."""
    found = [Row(**row) for row in stored()["rows"]]
    return [row for row in found if use in (None, row.use)]


def predicted(row: Row, efficiency: Efficiency) -> float | None:
    """Return a row's figure as the model has it; None where its set-up is not published."""
    ways: Mapping[str, Callable[[str, Efficiency], float]] = {
        "layer": _layer_us,
        "split": _split_tokens_per_s_per_card,
        "colocated": _colocated_tokens_per_s_per_card,
    }
    return ways[row.kind](row.card, efficiency) if row.kind in ways else None


def _layer_us(card: str, efficiency: Efficiency) -> float:
    """Four cards share the sequences of one MFA layer; each holds all of its weights."""
    model = _model("Step-3")
    roof = Roof.of(_card(card), efficiency, "bf16")
    stage = AttentionStage(model, roof, 1, LAYER_CONTEXT)
    tokens = np.array([LAYER_TOKENS / LAYER_CARDS])
    return float(stage.layer_s(model.part("attention"), tokens)[0]) / MICRO


def _split_tokens_per_s_per_card(card: str, efficiency: Efficiency) -> float:
    """Two attention and two FFN instances of 8 cards; the FFN ones hold half the experts each."""
    model, spec = _model("Step-3"), _card(card)
    roof = Roof.of(spec, efficiency, "fp8")
    together = SPLIT_BATCH / SPLIT_MICRO_BATCHES
    each = together / SPLIT_ATTENTION_CARDS
    wire = wire_between(spec, spec)
    assert isinstance(wire, Wire), f"{card} has a NIC"
    attention = AttentionStage(model, roof, 1, SPLIT_CONTEXT).pass_s(np.array([each]))[0]
    ffn = FfnStage(model, roof, SPLIT_TP, SPLIT_SETS_OF, ELEMENT_BYTES["fp8"])
    sent = model.layers * each * SPLIT_SETS_OF * wire.message_s_per_byte
    stages = [
        float(attention),
        float(ffn.pass_s(np.array([together]))[0]),
        sent * a2f_bytes(model, "fp8"),
        sent * f2a_bytes(model),
    ]
    messages = 2 * model.layers * efficiency.message_s
    pass_s = max(SPLIT_MICRO_BATCHES * max(stages), sum(stages) + messages)
    return SPLIT_BATCH / pass_s / SPLIT_CARDS


def _colocated_tokens_per_s_per_card(card: str, efficiency: Efficiency) -> float:
    """Weights in FP8; the attention core and its cache stay in bf16 (DeepSeek-V3 report, 3.3)."""
    model, spec = _model("DeepSeek-V3"), _card(card)
    linear, core = (Roof.of(spec, efficiency, dtype) for dtype in ("fp8", "bf16"))
    attention = AttentionStage(model, linear, 1, COLOCATED_CONTEXT, core)
    stage = ColocatedStage(attention, spec, COLOCATED_CARDS, ELEMENT_BYTES["fp8"])
    tokens = np.array([COLOCATED_BATCH / COLOCATED_IN_FLIGHT])
    return COLOCATED_BATCH / float(stage.pass_s(tokens, COLOCATED_IN_FLIGHT)[0])


def fit(measured: Sequence[Row]) -> Efficiency:
    """Return the constants of the least squared error of the logarithms."""
    from scipy.optimize import least_squares

    def errors(x: Any) -> list[float]:
        efficiency = Efficiency(x[0], x[1], x[2] * MICRO, True)
        found = [predicted(row, efficiency) for row in measured]
        return [
            float(np.log(value / row.figure))
            for value, row in zip(found, measured, strict=True)
            if value is not None
        ]

    starts = [(0.5, 0.5, 50.0), (0.9, 0.9, 10.0), (0.5, 0.9, 100.0)]
    bounds = ([0.05, 0.05, 0.0], [1.0, 1.0, 1000.0])
    found = [
        least_squares(errors, start, bounds=bounds, x_scale=(0.1, 0.1, 20.0)) for start in starts
    ]
    arithmetic, bandwidth, message = min(found, key=lambda result: float(result.cost)).x
    return Efficiency(float(arithmetic), float(bandwidth), float(message) * MICRO, True)


def error(row: Row, efficiency: Efficiency) -> float | None:
    """Return how far a prediction lies above the figure, as a part of it."""
    value = predicted(row, efficiency)
    return None if value is None else value / row.figure - 1


def leave_one_out() -> dict[str, float]:
    """Return the error of each fitted row when the constants are fitted to the others."""
    fitted = rows("fit")
    errors: dict[str, float] = {}
    for left in fitted:
        found = error(left, fit([row for row in fitted if row is not left]))
        assert found is not None, "rows that are fitted can be predicted"
        errors[left.name] = found
    return errors


def table() -> list[str]:
    """Return the lines that the command prints."""
    found = fit(rows("fit"))
    apart = leave_one_out()
    lines = [
        f"fitted: arithmetic {found.arithmetic:.4f}, bandwidth {found.bandwidth:.4f}, "
        f"message {found.message_s / MICRO:.2f} us",
        f"{'row':34} {'use':6} {'published':>9} {'predicted':>9} {'error':>8} {'left out':>9}",
    ]
    for row in rows():
        value, off = predicted(row, found), error(row, found)
        shown = f"{value:9.0f} {off:+8.1%}" if value and off is not None else f"{'-':>9} {'-':>8}"
        alone = f"{apart[row.name]:+9.1%}" if row.name in apart else f"{'':9}"
        lines.append(f"{row.name:34} {row.use:6} {row.figure:9.0f} {shown} {alone}".rstrip())
    return lines


if __name__ == "__main__":
    print("\n".join(table()))
