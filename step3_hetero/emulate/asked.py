"""The key ``emulate`` of a config's roles, held against the catalogue and the host."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from step3_hetero.backend import Backend, DeviceInfo
from step3_hetero.config import Config, Role
from step3_hetero.emulate.card import EmulatedCard, dtypes_of, listed
from step3_hetero.emulate.link import Link
from step3_hetero.errors import BackendNotFound, PlacementError
from step3_hetero.placement.catalogue import Card
from step3_hetero.registry import backend_names, get_backend

SCALED = {"fp8": "FP8", "int8": "INT8"}
"""The config's formats of weights that need arithmetic of their own."""


def emulated_card(config: Config, name: str, backend: Backend) -> EmulatedCard | None:
    """Return the card that a role's device stands in for; None if it is taken as it is.

    Raises:
        ConfigError: no such card, a backend whose device is no host, a second card named beside it,
            or weights that the card cannot compute with; one line with file:line.
    """
    role = config.roles[name]
    if role.emulate is None:
        return None
    key = f"roles.{name}.emulate"
    try:
        card = listed(role.emulate.card)
    except PlacementError as cause:
        raise config.error(key, str(cause)) from cause
    if not _is_host(backend.reference_info(None)):
        raise config.error(
            key,
            f"{card.name!r} on backend {backend.name!r}, which drives cards of its own; backends "
            f"on the host: {', '.join(_hosts())}",
        )
    if role.card not in (None, card.name):
        raise config.error(
            f"roles.{name}.card",
            f"{role.card!r} beside emulate: {card.name}; leave one of the two out",
        )
    _check_weights(config, name, role, card)
    return EmulatedCard(card, role.emulate, role.devices[0] if role.devices else 0, dtypes_of(card))


def asked_card(
    config: Config, name: str, backend: Backend
) -> tuple[EmulatedCard | None, DeviceInfo]:
    """Return the card that is emulated, if one is, and the device that a role asks for.

    Raises:
        ConfigError: as `emulated_card`; the backend has no such card.
    """
    if card := emulated_card(config, name, backend):
        return card, card.info(backend.reference_info(None))
    try:
        return None, backend.reference_info(config.roles[name].card)
    except PlacementError as cause:
        raise config.error(f"roles.{name}.card", str(cause)) from cause


def _is_host(info: DeviceInfo) -> bool:
    """Say whether a device is the host's own processor, or stands in for another on it."""
    return info.memory_domain == "host" or info.tier != "device"


def _hosts() -> Iterator[str]:
    for name in backend_names():
        try:
            info = get_backend(name).reference_info(None)
        except BackendNotFound:  # a package that does not load is no host
            continue
        if _is_host(info):
            yield name


def _check_weights(config: Config, name: str, role: Role, card: Card) -> None:
    if role.weights not in SCALED or role.weights in card.flops_per_s:
        return
    allowed = [f for f in ("fp32", "bf16", *SCALED) if f not in SCALED or f in card.flops_per_s]
    raise config.error(
        f"roles.{name}.weights",
        f"{role.weights!r} on {card.name}: no {SCALED[role.weights]} arithmetic; allowed: "
        + ", ".join(allowed),
    )


def links_from(config: Config, name: str) -> Mapping[str, Link]:
    """Return what joins a role to each other one, where either slows its edges or harms them.

    Raises:
        ConfigError: signs of life would take as long as the deadline after which a role is lost.
    """
    mine = config.roles[name].emulate
    found = {
        other: Link.between(mine, role.emulate)
        for other, role in config.roles.items()
        if other != name
    }
    for other, link in found.items():
        deadline_s = config.transport.deadline_s
        if 2 * link.latency_s >= deadline_s:
            slower = max(
                (n for n in (name, other) if config.roles[n].emulate),
                key=lambda n: getattr(config.roles[n].emulate, "latency_s", 0.0),
            )
            raise config.error(
                f"roles.{slower}.emulate.latency_s",
                f"{name} and {other} are {link.latency_s:g} s apart, there and back "
                f"{2 * link.latency_s:g} s; allowed: less than transport.deadline_s, which is "
                f"{deadline_s:g}",
            )
    return {other: link for other, link in found.items() if link.slows or link.harms}
