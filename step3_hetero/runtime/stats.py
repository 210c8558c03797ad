"""What an engine is doing now, and how much of it it had to do again."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class EngineStats:
    """Counts of requests and KV blocks now; of preemptions, reuse and losses since the start.

    Blocks are logical ones of all attention instances together: ``blocks`` in all,
    ``free_blocks`` that hold nothing, ``cached_blocks`` that nobody holds, kept for what they hold
    until their memory is needed. The rest is held. ``prefix_tokens_reused`` were prompt tokens, or
    tokens of a sequence that began again, whose keys were found in the cache. ``losses`` counts the
    times that an attention instance was lost with its cache.
    """

    running: int
    waiting: int
    blocks: int
    free_blocks: int
    cached_blocks: int
    preemptions: int
    prefix_tokens_reused: int
    losses: int
