"""What the wires of a pair of pools pass on, and how long a token takes: at all clocks."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from step3_hetero.placement.columns import AttentionColumn, Clocks, FfnColumn, Problem, Tokens
from step3_hetero.placement.layer_kinds import kinds
from step3_hetero.placement.network import NoWire, Wire, a2f_bytes, f2a_bytes
from step3_hetero.placement.performance import AttentionStage, Batch

Seconds = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Wires:
    """The wires of a problem at all clocks."""

    problem: Problem
    clocks: Clocks

    @property
    def any(self) -> bool:
        """Return whether there is a wire at all."""
        return any(isinstance(wire, Wire) for wire in self.problem.wires.values())

    def message_s(self, a: int, f: int) -> float:
        """Return the latency of a message between two pools."""
        return max(self.problem.pools[i].efficiency.message_s for i in (a, f))

    def row_bytes(self) -> tuple[float, float]:
        """Return the bytes of one token to one FFN instance, and back."""
        work = self.problem.workload
        return a2f_bytes(work, self.problem.wire_dtype), f2a_bytes(work)

    def per_card(self, a: int, f: int, attention_s: Seconds, members: int = 1) -> Tokens:
        """Return the rows of a micro-batch that one card of attention can send, and get back.

        ``attention_s`` is what attention takes of a layer's slot. The rows of all ``members`` of a
        set count, each of which gets all tokens in a message of its own. These are counted one
        after the other: only the pieces of one message overlap.
        """
        wire = self.problem.wires[a, f]
        if isinstance(wire, NoWire):
            return np.zeros(len(self.clocks))
        moving_s = self._moving_s(a, f, attention_s)
        by_row = members * wire.rows(moving_s / members, *self.row_bytes())
        return np.asarray(np.maximum(np.minimum(by_row, self._by_link(wire)), 0))

    def taken_per_card(self, a: int, f: int, attention_s: Seconds, rows: Tokens) -> Tokens:
        """Return the rows of a micro-batch that one card of an FFN instance can take, and answer.

        They come from any number of attention instances, in messages of ``rows`` rows a card.
        """
        wire = self.problem.wires[a, f]
        if isinstance(wire, NoWire):
            return np.zeros(len(self.clocks))
        moving_s, way = self._moving_s(a, f, attention_s), self.row_bytes()
        longest = np.maximum(np.minimum(rows, wire.rows(moving_s, *way)), 0)
        by_row = moving_s / wire.row_s(longest, *way)
        return np.asarray(np.maximum(np.minimum(by_row, self._by_link(wire)), 0))

    def _moving_s(self, a: int, f: int, attention_s: Seconds) -> Seconds:
        """Return what attention and the FFN's share leave of a layer, latencies taken off."""
        clocks = self.clocks
        left: Seconds = clocks.slot_s - clocks.stage_s - attention_s - 2 * self.message_s(a, f)
        return left

    def _by_link(self, wire: Wire) -> Tokens:
        """Return the rows that keep the slowest hop busy for its share, in the fuller direction."""
        return np.asarray(self.clocks.stage_s / (wire.busy_s_per_byte * max(self.row_bytes())))


def whole(tokens: Tokens) -> Tokens:
    """Return whole tokens; what rounding alone keeps below a whole number counts as one."""
    return np.asarray(np.floor(tokens * (1 + 1e-12)))


def attention_seconds(stage: AttentionStage, tokens: Batch) -> dict[str, Seconds]:
    """Return the seconds of attention in one layer of each kind."""
    parts = stage.workload.of("attention")
    mean = stage.layers_s(tokens) / sum(p.layers for p in parts)
    return {
        kind: mean if part is None else stage.layer_s(part, tokens)
        for kind, (part, _, _) in kinds(stage.workload).items()
    }


def ffn_seconds(column: FfnColumn, tokens: Batch) -> dict[str, Seconds]:
    """Return the seconds of one pass of a set in one layer of each kind."""
    stage = column.stage
    return {
        kind: stage.layer_s(part, tokens)
        for kind, (_, part, _) in kinds(stage.workload).items()
        if part is not None
    }


def pass_s(column: AttentionColumn, clocks: Clocks) -> Seconds:
    """Return the seconds from one token to the next with attention at its batch; inf: no batch.

    A layer takes its slot; less where its kind of attention is shorter than the longest, but never
    less than an FFN that fills its share takes for all micro-batches; more where attention does.
    Between two tokens embedding and head keep attention busy while the FFN waits: once for each
    micro-batch, less what the first layer leaves attention idle anyway. `simulate` of the plan's
    pipeline agrees.
    """
    batch, in_flight = np.maximum(column.capacity, 1), clocks.micro_batches
    attention_s = attention_seconds(column.stage, batch)
    layers = {
        kind: np.maximum(
            clocks.slot_s - column.longest_s + seconds,
            in_flight * np.maximum(clocks.stage_s, seconds),
        )
        for kind, seconds in attention_s.items()
    }
    counts = {kind: count for kind, (_, _, count) in kinds(column.stage.workload).items()}
    first = next(iter(counts))
    idle_s = layers[first] - in_flight * attention_s[first]
    between_s = column.stage.between_s(batch)
    waiting_s = np.maximum(between_s, in_flight * between_s - idle_s)
    total: Seconds = waiting_s + sum(count * layers[kind] for kind, count in counts.items())
    return np.where(column.capacity >= 1, total, np.inf)
