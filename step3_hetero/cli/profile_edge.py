"""The link to a role that stands, measured for a profile: ``profile --edge``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from step3_hetero.errors import RequestError

if TYPE_CHECKING:
    from step3_hetero.afd.echo import LinkMeasured
    from step3_hetero.placement.profile_file import Profile

MOST_BYTES = 8 << 20
"""Of one measured frame: an A2F of 192 tokens of Step-3 in bf16 is a third of it."""


def measured_link(edge: str, config: str | None) -> LinkMeasured:
    """Measure the way to a role of a config that listens at ``edge``.

    Raises:
        RequestError: there is no config to take transport, limits and key from.
        TransportTimeout, RoleLost, EdgeMismatch: the role is not there, or serves a front.
    """
    if config is None:
        raise RequestError(
            f"--edge {edge} without --config; give the role's config: it has transport and key"
        )
    from step3_hetero.afd.echo import measure_link
    from step3_hetero.afd.key import shared_key
    from step3_hetero.afd.link import Link
    from step3_hetero.afd.local import frame_limits
    from step3_hetero.afd.tls import transport_of
    from step3_hetero.config import Config
    from step3_hetero.runtime.resolving import resolve

    read = Config.read(Path(config))
    limits = frame_limits(resolve(read))
    transport, key = transport_of(read), shared_key(read)
    link = Link(transport.connect(edge, limits, read.transport.deadline_s, key), edge)
    try:
        return measure_link(link, min(MOST_BYTES, limits.part_bytes))
    finally:
        link.close()


def with_link(profile: Profile, edge: str, measured: LinkMeasured) -> Profile:
    """Return a profile whose link fields are filled in."""
    from dataclasses import replace

    from step3_hetero.placement.profile_file import Links

    links = Links((edge,), measured.bytes_per_s, measured.message_s)
    return replace(profile, links=links)


def kept_profile(edge: str, out: str) -> Profile:
    """Return the profile whose link is to be filled in.

    Raises:
        RequestError: there is none.
        ConfigError: it is no profile.
    """
    from step3_hetero.placement.profile_file import Profile

    if not Path(out).exists():
        raise RequestError(
            f"--out {out}: no profile there whose link could be filled in by --edge {edge}; give "
            "--backend too, and the device is measured as well"
        )
    return Profile.read(Path(out))


def show_link(edge: str, measured: LinkMeasured) -> None:
    """Print what was measured."""
    click.echo(
        f"{edge}: {measured.bytes_per_s / 1e9:.2f} GB/s each way in frames of {measured.nbytes:,} "
        f"bytes, {measured.message_s * 1e6:.1f} us a message"
    )
