"""The certificates of ``transport.tls_*``, as files that are there."""

from __future__ import annotations

import os
from pathlib import Path

from step3_hetero.config import Config
from step3_hetero.transport.base import TlsFiles, Transport
from step3_hetero.transport.registry import get_transport


def transport_of(config: Config) -> Transport:
    """Return the transport of a config, under TLS if it names certificates.

    Raises:
        ConfigError: what the transport needs is not installed, it has no TLS, a file is missing or
            cannot be read, others may read the private key, or one of certificate and key is named
            without the other.
    """
    transport, said = get_transport(config.transport.kind), config.transport
    if (why := transport.why_unavailable()) is not None:
        raise config.error("transport.kind", why)
    for key in ("tls_cert", "tls_key", "tls_ca"):
        if getattr(said, key) is not None and not transport.capabilities.encrypts:
            raise config.error(
                f"transport.{key}",
                f"transport {transport.name!r} has no TLS; leave it out, or use tcp",
            )
    files = tls_files(config)
    return transport if files is None else transport.secured(files)


def tls_files(config: Config) -> TlsFiles | None:
    """Return the files of ``transport.tls_*``; None if there are none. Raises as above."""
    said = config.transport
    if said.tls_cert is None and said.tls_key is None:
        if said.tls_ca is not None:
            raise config.error(
                "transport.tls_ca", "it needs transport.tls_cert and tls_key beside it"
            )
        return None
    if said.tls_cert is None or said.tls_key is None:
        named, missing = (
            ("tls_key", "tls_cert") if said.tls_cert is None else ("tls_cert", "tls_key")
        )
        raise config.error(f"transport.{named}", f"it needs transport.{missing} beside it")
    private = _readable(config, "tls_key", said.tls_key)
    if private.stat().st_mode & 0o077:
        raise config.error("transport.tls_key", f"others may read {str(private)!r}; chmod 600 it")
    return TlsFiles(
        _readable(config, "tls_cert", said.tls_cert),
        private,
        None if said.tls_ca is None else _readable(config, "tls_ca", said.tls_ca),
    )


def _readable(config: Config, key: str, name: str) -> Path:
    path = config.folder / name
    if not path.is_file() or not os.access(path, os.R_OK):
        raise config.error(f"transport.{key}", f"{str(path)!r} is no file that can be read")
    return path
