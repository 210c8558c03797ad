"""Requests as callers write them, and what they get back."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from PIL import Image

from step3_hetero.errors import RequestError
from step3_hetero.runtime.microbatch import RowLogprobs

PromptLike = str | Sequence[int]
ImageLike = str | Path | bytes | Image.Image
FinishReason = Literal["stop", "length", "cancelled", "deadline"]

MAX_LOGPROBS = 1000
LONGEST_S = 31_622_400
"""A year, as the longest deadline."""


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How tokens are chosen. Temperature 0 is greedy; top_k 0 and top_p 1 keep every token.

    ``stop`` ends the answer before the first of these strings, ``ignore_eos`` keeps going at the
    model's own end. ``logprobs`` asks for the log-probability of each token and of as many
    alternatives. ``deadline_s`` is for the whole request, counted from its submission: one that is
    not done by then ends with what it has, for the reason ``deadline``.
    """

    max_tokens: int = 64
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0
    stop: tuple[str, ...] = ()
    ignore_eos: bool = False
    logprobs: int | None = None
    deadline_s: float | None = None

    def __post_init__(self) -> None:
        """Check every value.

        Raises:
            RequestError: naming the field, the value refused and what is allowed.
        """
        whole = (type(self.logprobs) is int and 0 <= self.logprobs <= MAX_LOGPROBS) or (
            self.logprobs is None
        )
        in_time = self.deadline_s is None or (
            _within(self.deadline_s, 0, LONGEST_S) and self.deadline_s > 0
        )
        texts = type(self.stop) is tuple and all(type(s) is str and s for s in self.stop)
        checks: dict[str, tuple[bool, str]] = {
            "max_tokens": (_whole(self.max_tokens, 1, 2**31), "a whole number, at least 1"),
            "temperature": (_within(self.temperature, 0, 1e6), "0 (greedy) to 1000000"),
            "top_k": (_whole(self.top_k, 0, 2**31), "a whole number, 0 (all tokens) or more"),
            "top_p": (_within(self.top_p, 0, 1) and self.top_p > 0, "over 0, at most 1"),
            "seed": (_whole(self.seed, 0, 2**64), "a whole number, 0 to 2**64 - 1"),
            "stop": (texts, "a tuple of strings that are not empty"),
            "logprobs": (whole, f"a whole number, 0 to {MAX_LOGPROBS}, or None"),
            "deadline_s": (in_time, f"seconds, over 0, at most {LONGEST_S:,}, or None"),
        }
        for name, (fits, allowed) in checks.items():
            if not fits:
                raise RequestError(f"{name}: {getattr(self, name)!r} refused; allowed: {allowed}")


def _whole(value: object, least: int, below: int) -> bool:
    return type(value) is int and least <= value < below


def _within(value: object, least: float, most: float) -> bool:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    return least <= value <= most


@dataclass(frozen=True, slots=True)
class Request:
    """One of many prompts for ``Engine.generate_all``."""

    prompt: PromptLike
    params: SamplingParams = SamplingParams()
    images: Sequence[ImageLike] = ()


@dataclass(frozen=True, slots=True)
class Token:
    """One generated token, as the streaming callback sees it. ``text`` is what became readable."""

    id: int
    text: str
    logprobs: RowLogprobs | None


OnToken = Callable[[Token], None]


@dataclass(frozen=True, slots=True)
class Completion:
    """A finished request. ``text`` is None for a checkpoint without a tokenizer."""

    request_id: int
    prompt_tokens: int
    token_ids: tuple[int, ...]
    text: str | None
    finish_reason: FinishReason
    logprobs: tuple[RowLogprobs, ...] | None = None
    timings: Mapping[str, Any] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """Return what ``--json`` prints."""
        listed = None if self.logprobs is None else [p.to_json() for p in self.logprobs]
        return {
            "text": self.text,
            "token_ids": list(self.token_ids),
            "logprobs": listed,
            "finish_reason": self.finish_reason,
            "prompt_tokens": self.prompt_tokens,
            "timings": dict(self.timings),
        }
