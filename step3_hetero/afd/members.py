"""Which processes a config means: one leading role, and roles that answer its calls."""

from __future__ import annotations

import os

from step3_hetero.afd.launcher import Member
from step3_hetero.config import Config, stage_ranges
from step3_hetero.runtime.placing import Placement

LED = {"ffn", "vision"}
"""Kinds of stages that may run away from the leading role: they keep nothing between batches."""


def members(config: Config, placement: Placement) -> list[Member]:
    """Return every process of every role: an instance is as many as the role's ``tp``.

    Raises:
        ConfigError: embedding, attention and head are spread over several roles.
    """
    leading = placement.role_of["embed"]
    for stage, role in placement.role_of.items():
        if placement.graph.by_name[stage].kind not in LED and role != leading:
            raise config.error(
                f"roles.{role}.stages",
                f"{stage} in another process than embed (role {leading!r}) is not available yet; "
                f"with processes: per-role one role has {stage_ranges(_kept(placement))}",
            )
    found = []
    for name in placement.roles:
        tp = config.roles[name].tp
        for number in range(config.roles[name].processes):
            found.append(Member(name, number, name == leading and number % tp == 0, tp))
    return found


def _kept(placement: Placement) -> list[str]:
    return [s.name for s in placement.graph.stages if s.kind not in LED]


def cores_for(number: int, count: int) -> list[int]:
    """Return the cores that process ``number`` of ``count`` is kept on; none: wherever it likes.

    Each has cores of its own as long as there are as many cores as processes.
    """
    cores = sorted(os.sched_getaffinity(0))
    return cores[number::count] if len(cores) >= count else []
