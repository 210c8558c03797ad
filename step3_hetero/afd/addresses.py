"""The addresses in ``roles.NAME.hosts``, as the transport of a config has them."""

from __future__ import annotations

from step3_hetero.config import Config
from step3_hetero.transport.registry import get_transport


def check_addresses(config: Config) -> None:
    """Refuse what nobody can listen at.

    Raises:
        ConfigError: an address that is none of the transport's.
    """
    for name, role in config.roles.items():
        for address in role.hosts or ():
            why = get_transport(config.transport.kind).why_no_address(address)
            if why is not None:
                raise config.error(f"roles.{name}.hosts", why)
