"""How the heads of an attention role are split over its ranks, and whether they can be."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from step3_hetero.config import Config
from step3_hetero.errors import UnsupportedOp
from step3_hetero.graph import GraphStage
from step3_hetero.specs import AttentionSpec

if TYPE_CHECKING:
    from step3_hetero.runtime.placing import Placement


@dataclass(frozen=True, slots=True)
class HeadsSplit:
    """What each of ``ranks`` processes of an attention instance holds of every attention stage.

    ``heads`` and ``kv_heads`` are those of one rank. Rank 0 holds all other stages too;
    ``weight_bytes`` are those of any other rank.
    """

    ranks: int
    heads: int
    kv_heads: int
    weight_bytes: int


def heads_split(stages: Sequence[GraphStage], tp: int, weight_bytes: int) -> HeadsSplit | None:
    """Return how a role's heads are split, ``stages`` being a rank's; None: not, or it has none."""
    specs = [s.spec for s in stages if isinstance(s.spec, AttentionSpec)]
    if tp == 1 or not specs:
        return None
    return HeadsSplit(tp, specs[0].heads, specs[0].kv_heads, weight_bytes)


def check_groups(config: Config, placement: Placement) -> None:
    """Ask whether the devices of an attention role's ranks can add up what their heads give.

    Raises:
        UnsupportedOp: with the backend's reason.
    """
    for role in placement.roles.values():
        if role.heads_split and (reason := role.backend.why_no_group(role.info)):
            key = f"roles.{role.name}.tp"
            raise UnsupportedOp(
                f"{config.where(key)}: {key}: {role.tp} refused: {role.backend.name} on "
                f"{role.info.name} cannot split attention: {reason}; allowed: 1"
            )
