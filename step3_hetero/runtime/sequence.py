"""One request on its way: its tokens, its blocks, what of it has been computed."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from step3_hetero.backend import Int32
from step3_hetero.model.image import ImageViews
from step3_hetero.model.prompt import Prompt
from step3_hetero.model.tokenizer import Detokeniser
from step3_hetero.runtime.blocks import BlockKey, blocks_for
from step3_hetero.runtime.microbatch import Float32, ImagePart, RowLogprobs
from step3_hetero.runtime.request import (
    Completion,
    FinishReason,
    OnToken,
    SamplingParams,
    Token,
)
from step3_hetero.specs import LOGICAL_BLOCK


@dataclass(slots=True, eq=False)
class SequenceState:
    """``computed`` counts the tokens whose keys are cached; the rest are yet to run.

    ``offered`` of its blocks are known by what they hold, ``keys``; ``digests`` are those of its
    images' pixels. ``sent`` are the images that its executor has. ``under_way``: a micro-batch in
    flight has tokens of it.
    """

    id: int
    prompt: Prompt
    params: SamplingParams
    stop_ids: frozenset[int]
    max_new: int
    detokeniser: Detokeniser | None = None
    on_token: OnToken | None = None
    all_rows: bool = False
    tokens: list[int] = field(default_factory=list)
    blocks: list[int] = field(default_factory=list)
    table: Int32 = field(default_factory=lambda: np.zeros(0, np.int32))
    computed: int = 0
    offered: int = 0
    under_way: bool = False
    keys: list[BlockKey] = field(default_factory=list)
    digests: dict[int, bytes] = field(default_factory=dict)
    sent: set[int] = field(default_factory=set)
    logprobs: list[RowLogprobs] = field(default_factory=list)
    logits: npt.NDArray[Any] | None = None
    text: str = ""
    told: int = 0
    finished: FinishReason | None = None
    arrived: float = field(default_factory=time.perf_counter)
    started: float = 0.0
    first_token: float = 0.0

    def __post_init__(self) -> None:
        self.tokens = list(self.prompt.token_ids)

    @property
    def prompt_tokens(self) -> int:
        """Return the length of the prompt."""
        return len(self.prompt.token_ids)

    @property
    def generated(self) -> list[int]:
        """Return the tokens chosen so far."""
        return self.tokens[self.prompt_tokens :]

    @property
    def most_blocks(self) -> int:
        """Return how many blocks prompt and whole answer take."""
        return blocks_for(self.prompt_tokens + self.max_new)

    @property
    def is_full(self) -> bool:
        """Say whether there is no room in its blocks for the next token."""
        return self.computed >= len(self.blocks) * LOGICAL_BLOCK

    @property
    def decoding(self) -> bool:
        """Say whether all but the newest token is computed: one at a time remains."""
        return self.computed >= max(self.prompt_tokens, len(self.tokens) - 1)

    def restart(self) -> None:
        """Begin again from the tokens there are: what was cached of them is lost or given up.

        Draws depend on positions alone, so that the tokens to come are the same.
        """
        self.computed = self.offered = 0
        self.logits = None

    def image_key(self, image: int) -> int:
        """Return the executor's name for one of this request's images."""
        return self.id << 16 | image

    def image_parts(self, start: int, stop: int, base: int) -> list[ImagePart]:
        """Return the image rows that fall on tokens start..stop, which are batch rows from base.

        An image's pixels come with the first part that is asked for, wherever in it that begins.
        """
        parts = []
        for number, image in enumerate(self.prompt.images):
            places = np.asarray(image.positions, np.int32)
            first, last = np.searchsorted(places, [start, stop])
            if first == last:
                continue
            index = places[first:last] - np.int32(start - base)
            pixels = None if number in self.sent else channels_last(image.views)
            self.sent.add(number)
            parts.append(ImagePart(self.image_key(number), int(first), int(last), index, pixels))
        return parts

    def accept(self, token: int, logprobs: RowLogprobs | None) -> Token:
        """Append a chosen token; finish at a stop token, a stop string or the length.

        Returns what the streaming callback is to be told.
        """
        self.first_token = self.first_token or time.perf_counter()
        self.tokens.append(token)
        if logprobs is not None:
            self.logprobs.append(logprobs)
        if token in self.stop_ids:
            self.finished = "stop"
        elif len(self.generated) >= self.max_new:
            self.finished = "length"
        return Token(token, self._read(token), logprobs)

    def finish(self, reason: FinishReason) -> None:
        """End the sequence for a reason of the caller's; text held back is given out."""
        self.finished = reason
        if self.detokeniser is not None:
            self.text += self.detokeniser.flush()

    def _read(self, token: int) -> str:
        """Return the text that is sure by now: what may yet become a stop string is held back."""
        if self.detokeniser is None:
            return ""
        if token not in self.stop_ids:
            self.text += self.detokeniser.add(token)
        if self.finished is not None:
            self.text += self.detokeniser.flush()
        for stop in self.params.stop:
            place = self.text.find(stop)
            if place >= 0:
                self.text, self.finished = self.text[:place], "stop"
        sure = len(self.text) - (0 if self.finished else self._undecided())
        fresh, self.told = self.text[self.told : sure], max(self.told, sure)
        return fresh

    def _undecided(self) -> int:
        """Return the length of the longest end of the text that begins a stop string."""
        starts = (stop[:n] for stop in self.params.stop for n in range(len(stop)))
        return max((len(start) for start in starts if self.text.endswith(start)), default=0)

    def completion(self) -> Completion:
        """Return the finished request."""
        now = time.perf_counter()
        first = self.first_token or now
        decoded = len(self.generated) - 1
        decode_s = now - first
        timings = {
            "queued_s": (self.started or now) - self.arrived,
            "prefill_s": first - (self.started or now),
            "decode_s": decode_s,
            "tokens_per_s": decoded / decode_s if decoded > 0 and decode_s > 0 else None,
        }
        return Completion(
            self.id,
            self.prompt_tokens,
            tuple(self.generated),
            None if self.detokeniser is None else self.text,
            self.finished or "cancelled",
            None if self.params.logprobs is None else tuple(self.logprobs),
            timings,
        )


def channels_last(views: ImageViews) -> tuple[Float32, ...]:
    """Return the crops, then the whole view, as (n, size, size, channels).

    Crops come first because their rows do (step3-model: order of an image's tokens).
    """
    stacks = ([views.crops] if len(views.crops) else []) + [views.view[None]]
    return tuple(np.ascontiguousarray(stack.transpose(0, 2, 3, 1)) for stack in stacks)
