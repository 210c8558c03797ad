"""Whether partial sums can be added up where they arrive, asked before anything is opened."""

from __future__ import annotations

from step3_hetero.config import Config
from step3_hetero.errors import UnsupportedOp
from step3_hetero.runtime.placing import Placement
from step3_hetero.specs import OpSpec, wide


def check_sums(config: Config, placement: Placement) -> None:
    """Ask whether the device that gets the partial sums of a set can add them up.

    Raises:
        UnsupportedOp: naming both roles, the op and the backend's reason.
    """
    spec = placement.graph.by_name["embed"].spec
    leading = placement.roles[placement.role_of["embed"]]
    adds = OpSpec("add", wide(spec.dtype), {"hidden": spec.hidden})
    for role in (r for r in placement.roles.values() if r.sharers > 1 and not r.heads_split):
        if reason := leading.backend.supports(leading.info, adds):
            raise UnsupportedOp(
                f"{config.where(f'roles.{role.name}')}: roles.{role.name}: {leading.backend.name} "
                f"of role {leading.name!r} cannot add up partial sums: {adds}: {reason}"
            )
