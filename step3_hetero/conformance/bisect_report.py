"""What a bisect found: a sentence, figures by stage, and the same as JSON."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from step3_hetero.conformance.bisect_ops import OpFigure

FUSED = "the fused stage"
"""What stands for an op when every op alone is within its bound."""


@dataclass(frozen=True)
class Divergence:
    """The first output beyond its bound.

    ``op`` and ``call`` name the guilty op and which of its calls; ``op`` is None when every op
    alone is within its bound. ``ops`` has all of the stage's, in order. ``position`` is the token's
    in the sequence, None for an image. ``error`` and ``bound`` are squared and relative, or those
    of one element.
    """

    stage: str
    layer: int | None
    step: int
    position: int | None
    output: str
    op: str | None
    call: str | None
    error: float
    bound: float
    said: str
    ops: tuple[OpFigure, ...]

    def sentence(self) -> str:
        """Say where and what."""
        layer = "" if self.layer is None else f"layer {self.layer}, "
        where = "an image" if self.position is None else f"token {self.position}"
        what = f"op {self.call}" if self.call else f"{FUSED}; its ops alone are within bounds"
        op = next((f"; alone: {f.said}" for f in self.ops if f.label == self.call), "")
        return f"divergence in {layer}stage {self.stage}, {what}, at {where} ({self.said}{op})"


@dataclass(frozen=True)
class RoutingFlip:
    """A token whose experts changed within rounding: no defect."""

    layer: int | None
    position: int
    margin: float

    def sentence(self) -> str:
        """Say where, and how close the router's choice was."""
        return (
            f"routing flip within rounding at layer {self.layer}, token {self.position} (margin "
            f"{self.margin:.3g}): no defect"
        )


@dataclass(frozen=True)
class StageFigure:
    """One stage. ``worst`` is squared error as a part of what is allowed, None if not a suspect.

    ``free`` is how far the free-running suspect is from the trusted chain, relative; ``rounding``
    the same of the reference in the suspect's dtype, which is what rounding alone does.
    """

    stage: str
    layer: int | None
    worst: float | None
    free: float | None
    rounding: float | None


@dataclass(frozen=True)
class BisectReport:
    """What became of one request."""

    suspect: str
    trusted: str
    dtype: str
    prompt_tokens: int
    token_ids: tuple[int, ...]
    steps: int
    divergence: Divergence | None
    flips: Sequence[RoutingFlip]
    stages: Sequence[StageFigure]

    def sentence(self) -> str:
        """Return the verdict."""
        if self.divergence is not None:
            return self.divergence.sentence()
        return (
            f"no divergence beyond rounding: {self.suspect} against {self.trusted} in "
            f"{self.dtype}, {self.prompt_tokens} prompt and {len(self.token_ids)} generated "
            f"tokens, {self.steps} steps"
        )

    def to_json(self) -> dict[str, Any]:
        """Return what ``--json`` prints; infinite figures are null."""
        plain: dict[str, Any] = _finite(asdict(self))
        return {"verdict": self.sentence(), "diverges": self.divergence is not None, **plain}

    def table(self) -> list[tuple[str, str, str, str]]:
        """Return a row for each stage: name, part of the bound, free error, rounding's error."""
        return [
            (
                s.stage,
                _said(s.worst, "{:.0%}"),
                _said(s.free, "{:.2e}"),
                _said(s.rounding, "{:.2e}"),
            )
            for s in self.stages
        ]


HEADER = ("stage", "error, part of bound", "running freely", "by rounding alone")
"""Of the table: squared error over what is allowed; relative errors of the free chains."""


def _said(value: float | None, form: str) -> str:
    if value is None:
        return "-"
    return form.format(value) if np.isfinite(value) else "beyond"


def _finite(value: Any) -> Any:
    """Return JSON's own values: tuples as lists, what is not finite as null."""
    if isinstance(value, Mapping):
        return {k: _finite(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(v) for v in value]
    if isinstance(value, float) and not np.isfinite(value):
        return None
    return value
