"""Held-out handwritten digits: which digit is it, and what is the sum of two?"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from step3_hetero.errors import ConfigError
from step3_hetero.runtime.engine import Engine
from step3_hetero.runtime.request import Completion, Request, SamplingParams

SINGLE = "which digit is this ?"
SUM = "what is the sum ?"
SHORT = SamplingParams(max_tokens=8)
SIDE = 32
"""Pixels of a drawn digit's side."""

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class HeldOut:
    """Digits the model never saw.

    Shapes: images (n, 8, 8) uint8 0 to 16, labels (n,), pairs (m, 2) of places in images.
    """

    images: npt.NDArray[np.uint8]
    labels: npt.NDArray[np.int64]
    pairs: npt.NDArray[np.int64]

    @classmethod
    def read(cls, model: Path) -> HeldOut:
        """Read ``eval/held_out.npz`` of a model's folder.

        Raises:
            ConfigError: the model has no such file, or it is not what it should be.
        """
        path = model / "eval" / "held_out.npz"
        if not path.is_file():
            raise ConfigError(f"{path}: not found; eval digits needs a model with held-out digits")
        try:
            with np.load(BytesIO(path.read_bytes()), allow_pickle=False) as held:
                images, labels, pairs = (held[name] for name in ("images", "labels", "pairs"))
        except Exception as cause:  # NumPy and zipfile raise half a dozen kinds
            raise ConfigError(f"{path}: cannot be read: {cause}") from cause
        shapes = (images.shape, labels.shape, pairs.shape)
        expected = ((len(images), 8, 8), (len(images),), (len(pairs), 2))
        whole = all(np.issubdtype(a.dtype, np.integer) for a in (images, labels, pairs))
        if shapes != expected or not whole:
            raise ConfigError(
                f"{path}: images {shapes[0]}, labels {shapes[1]} and pairs {shapes[2]} refused; "
                "expected whole numbers of shapes (n, 8, 8), (n,) and (m, 2)"
            )
        if pairs.size and not 0 <= pairs.min() <= pairs.max() < len(images):
            raise ConfigError(f"{path}: pairs: expected 0 to {len(images) - 1}, found others")
        return cls(images, labels.astype(int), pairs.astype(int))


@dataclass(frozen=True)
class Score:
    """How many answers were right, and those that were not: (expected, text)."""

    name: str
    right: int
    asked: int
    wrong: Sequence[tuple[str, str]]

    @property
    def accuracy(self) -> float:
        """Return the share of right answers."""
        return self.right / self.asked if self.asked else float("nan")

    def to_json(self) -> dict[str, Any]:
        """Return what ``--json`` prints."""
        wrong = [{"expected": e, "text": t} for e, t in self.wrong]
        return {
            "name": self.name,
            "accuracy": self.accuracy,
            "right": self.right,
            "asked": self.asked,
            "wrong": wrong,
        }


def draw_digit(pixels: npt.NDArray[np.uint8]) -> Image.Image:
    """Draw one 8 × 8 digit, grey values 0 to 16, as the picture the model was trained on."""
    grey = (pixels.astype(np.float64) * 255 / 16).round().astype(np.uint8)
    return Image.fromarray(grey).resize((SIDE, SIDE), Image.Resampling.BILINEAR)


def answer_of(completion: Completion) -> str:
    """Return the digits after the thought.

    >>> answer_of(Completion(1, 1, (), "7 + 8 </think> 1 5", "stop"))
    '15'
    """
    text = completion.text or ""
    return text.rpartition("</think>")[2].replace(" ", "").removesuffix("<|EOT|>")


def evaluate(
    engine: Engine, held: HeldOut, *, limit: int | None = None, on_progress: Progress | None = None
) -> list[Score]:
    """Ask about every held-out digit and every fixed pair (the first ``limit`` of each)."""
    pictures = [draw_digit(i) for i in held.images]
    singles = [
        (Request(SINGLE, SHORT, [picture]), str(label))
        for picture, label in zip(pictures, held.labels, strict=True)
    ]
    sums = [
        (Request(SUM, SHORT, [pictures[a], pictures[b]]), str(held.labels[a] + held.labels[b]))
        for a, b in held.pairs
    ]
    return [
        _score(engine, "single digits", singles[:limit], on_progress),
        _score(engine, "sums of two", sums[:limit], on_progress),
    ]


def _score(
    engine: Engine, name: str, asked: list[tuple[Request, str]], on_progress: Progress | None
) -> Score:
    done = engine.generate_all([request for request, _ in asked], on_progress=on_progress)
    pairs = [(expected, c) for (_, expected), c in zip(asked, done, strict=True)]
    wrong = [(expected, c.text or "") for expected, c in pairs if answer_of(c) != expected]
    return Score(name, len(asked) - len(wrong), len(asked), wrong)
