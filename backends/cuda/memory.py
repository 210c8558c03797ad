"""What is said when a card's memory is full: what was asked, by which stage, and what is free."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from itertools import takewhile
from typing import Any

import torch

from step3_hetero.backend import Array, BatchMeta, Stage, Weights
from step3_hetero.errors import PlacementError


@contextmanager
def memory_for(what: str | Callable[[], str], place: torch.device) -> Iterator[None]:
    """Say what a card was asked to hold when it cannot; ``what`` may be worked out only then.

    Raises:
        PlacementError: the card's memory is full; with what was asked and what is free.
    """
    try:
        yield
    except torch.OutOfMemoryError as full:
        free, total = torch.cuda.mem_get_info(place)
        asked = what if isinstance(what, str) else what()
        raise PlacementError(
            f"{place}: out of memory for {asked}: {free:,} of {total:,} bytes free; give the role "
            f"fewer stages, a smaller max_batch or kv_blocks, or more cards (torch: {full})"
        ) from full


def stage_name(kind: str, weights: Mapping[str, Any]) -> str:
    """Return a stage's kind and what its weights' names in the checkpoint begin with alike.

    A spec does not know its layer: equal layers share theirs.
    """
    names = [t.name for w in weights.values() if isinstance(w, Weights) for t in w.source.values()]
    levels = zip(*(name.split(".") for name in names), strict=False)
    shared = ".".join(level[0] for level in takewhile(lambda at: len(set(at)) == 1, levels))
    return f"{kind} stage of {shared}" if shared else f"{kind} stage"


class Watched(Stage):
    """Another stage, named by its errors when memory is full. Everything else is the stage's."""

    def __init__(self, inner: Stage, name: str, place: torch.device) -> None:
        self.inner = inner
        self.spec = inner.spec
        self.name = name
        self.place = place

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)

    def plan(self, meta: BatchMeta) -> None:
        """See ``Stage``; a batch's tables and angles are made here."""
        with memory_for(lambda: f"a batch of {meta.tokens} tokens of the {self.name}", self.place):
            self.inner.plan(meta)

    def run(
        self, inputs: Mapping[str, Array], out: Mapping[str, Array] | None = None
    ) -> Mapping[str, Array]:
        """See ``Stage``."""

        def asked() -> str:
            shapes = ", ".join(f"{n} {tuple(x.shape)}" for n, x in inputs.items())
            return f"a run of the {self.name} over {shapes}"

        with memory_for(asked, self.place):
            return self.inner.run(inputs, out)
