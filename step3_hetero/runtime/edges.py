"""What joins the roles of a placement, held against both ends before anything is opened."""

from __future__ import annotations

from collections.abc import Iterator

from step3_hetero.config import Config
from step3_hetero.emulate.asked import links_from
from step3_hetero.runtime.apart import WIRE_DTYPE, WIRE_KEY
from step3_hetero.runtime.placing import Placement, RolePlan


def check_edges(config: Config, placement: Placement) -> None:
    """Refuse what the two ends of an edge cannot both do.

    Raises:
        ConfigError: a wire dtype that one end lacks, an emulated link that is as slow as silence,
            or two roles that say different things of one emulated card.
    """
    _check_cards(config, placement)
    for kind, key in WIRE_KEY.items():
        dtype = getattr(config.transport, key)
        for role in _ends(placement, kind) if dtype != "auto" else ():
            _check_wire(config, role, key, dtype)
    for name in placement.roles:
        links_from(config, name)


def _ends(placement: Placement, kind: str) -> Iterator[RolePlan]:
    """Yield the roles at either end of the edges of a kind that cross."""
    seen = {
        placement.role_of[stage]: None
        for edge in placement.crossing()
        if edge.kind == kind
        for stage in (edge.source, edge.target)
    }
    return (placement.roles[name] for name in seen)


def _check_wire(config: Config, role: RolePlan, key: str, dtype: str) -> None:
    has = role.info.dtypes.wire
    if WIRE_DTYPE[dtype] not in has:
        allowed = ", ".join(
            said for said in ("fp32", "bf16", "fp8", "int8") if WIRE_DTYPE[said] in has
        )
        raise config.error(
            f"transport.{key}",
            f"{dtype!r} with role {role.name!r} on {role.info.name}, which casts to none; "
            f"allowed: {allowed}",
        )


def _check_cards(config: Config, placement: Placement) -> None:
    first: dict[tuple[str, int], RolePlan] = {}
    for role in placement.roles.values():
        if role.emulated is None:
            continue
        other = first.setdefault(role.device, role)
        if other.emulated is not None and other.emulated.asked != role.emulated.asked:
            raise config.error(
                f"roles.{role.name}.emulate",
                f"differs from that of role {other.name!r} on the same card; write the same in "
                f"both, or give one another number with roles.{role.name}.devices",
            )
