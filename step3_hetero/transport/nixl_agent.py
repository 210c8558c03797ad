"""What the transport needs of NIXL: memory that one peer may write, and writes into that peer's.

NIXL's bindings are called without the Python layer above them, which has its progress thread spin:
it takes all of a core, or what others leave of it. Given a pause the thread sleeps on UCX's own
descriptors and wakes when something comes.
"""

from __future__ import annotations

import os
import secrets
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from importlib import import_module
from typing import Any

from step3_hetero.errors import ConfigError, EdgeMismatch, RoleLost, Step3HeteroError
from step3_hetero.transport.base import Bytes

PAUSE_US = 100_000
"""How long NIXL's thread sleeps when nothing comes; what comes wakes it."""

PLUGIN = "UCX"

LOOPBACK = "lo"

DEVICES = "UCX_NET_DEVICES"
"""Which network devices UCX listens at: a port of its own at each, which asks nobody for a key."""

_MAKING = threading.Lock()
"""Held while the environment is not the user's."""


def bindings() -> Any:
    """Import NIXL.

    Raises:
        ConfigError: it is not installed, or does not load.
    """
    try:
        import_module("nixl")
        return import_module("nixl._bindings")
    except ImportError as cause:
        raise ConfigError(
            f"transport 'nixl' needs the package nixl ({cause}): install step3-hetero[nixl], or "
            "set transport.kind to tcp"
        ) from cause


@contextmanager
def _environment(devices: str | None) -> Iterator[None]:
    """Name UCX's devices, unless the user has; it reads its environment when an agent is made."""
    with _MAKING:
        if devices is None or DEVICES in os.environ:
            yield
            return
        os.environ[DEVICES] = devices
        try:
            yield
        finally:
            del os.environ[DEVICES]


@contextmanager
def _said(kind: type[Step3HeteroError], what: str) -> Iterator[None]:
    """Have an error of NIXL's be one of ours that says what failed."""
    try:
        yield
    except Exception as cause:  # NIXL's errors have no common class
        raise kind(f"{what}: {cause}") from cause


class Agent:
    """One channel's own agent, so that its peer can write this channel's memory and no other's.

    ``inbox`` is what the peer may write, ``outbox`` what this side's writes come from. Any thread
    may call; each call is short. ``devices`` are UCX's network devices; None: all there are.
    """

    def __init__(self, inbox: Bytes, outbox: Bytes, devices: str | None = None) -> None:
        self._nixl = nixl = bindings()
        config = nixl.nixlAgentConfig()
        config.useProgThread, config.useListenThread = True, False
        config.pthrDelay = PAUSE_US
        config.syncMode = nixl.NIXL_THREAD_SYNC_STRICT
        self._name = f"step3-hetero-{secrets.token_hex(16)}"
        self._calling = threading.Lock()
        self._writes: set[int] = set()
        self._peer, self._theirs, self._size = "", 0, 0
        self._outbox = outbox
        with _said(ConfigError, f"NIXL has no memory of ours to offer over {PLUGIN}"):
            with _environment(devices):
                self._agent: Any = nixl.nixlAgent(self._name, config)
                options, _ = self._agent.getPluginParams(PLUGIN)
                self._backends = [self._agent.createBackend(PLUGIN, options)]
            self._inside, self._outside = self._described(inbox), self._described(outbox)
            for memory in (self._inside, self._outside):
                self._agent.registerMem(memory, self._backends)

    def metadata(self) -> bytes:
        """Return what the peer has to know to write the inbox, in NIXL's own form."""
        with self._calling:
            said: bytes = self._agent.getLocalPartialMD(self._inside, True, self._backends)
            return said

    def meet(self, metadata: bytes, address: int, size: int) -> None:
        """Take in the peer's metadata, and where its inbox of ``size`` bytes lies.

        NIXL reads metadata as it likes: they have to come from a peer that proved the key.

        Raises:
            EdgeMismatch: NIXL makes nothing of them.
            RoleLost: the peer cannot be reached.
        """
        with self._calling:
            with _said(EdgeMismatch, "the peer's NIXL metadata are refused"):
                self._peer = self._agent.loadRemoteMD(metadata).decode()
            if self._peer == self._name:
                raise EdgeMismatch("the peer gave this side's own NIXL metadata")
            self._theirs, self._size = address, size
            with _said(RoleLost, "NIXL does not reach the peer"):
                self._agent.makeConnection(self._peer, self._backends)

    def write(self, source: int, target: int, nbytes: int) -> int:
        """Start to write bytes of the outbox into the peer's inbox; both places are from its start.

        Raises:
            RoleLost: the peer is gone, or the channel closed.
        """
        assert target + nbytes <= self._size, f"{nbytes} bytes at {target} of {self._size}"
        nixl = self._nixl
        with self._calling:
            self._check_open()
            here = self._outbox.ctypes.data + source
            with _said(RoleLost, "the peer's memory cannot be written"):
                handle: int = self._agent.createXferReq(
                    nixl.NIXL_WRITE,
                    nixl.nixlXferDList(nixl.DRAM_SEG, [(here, nbytes, 0)]),
                    nixl.nixlXferDList(nixl.DRAM_SEG, [(self._theirs + target, nbytes, 0)]),
                    self._peer,
                    "",
                    self._backends,
                )
                self._writes.add(handle)
                self._agent.postXferReq(handle)
            return handle

    def is_done(self, handle: int) -> bool:
        """Say whether a write has arrived; its handle is none then.

        Raises:
            RoleLost: as ``write``.
        """
        with self._calling:
            self._check_open()
            with _said(RoleLost, "the peer's memory was not written"):
                if self._agent.getXferStatus(handle) == self._nixl.NIXL_IN_PROG:
                    return False
                self._agent.releaseXferReq(handle)
            self._writes.discard(handle)
            return True

    def close(self) -> None:
        """Let go of the peer; afterwards nobody writes the inbox. May be called twice."""
        with self._calling:
            if self._agent is None:
                return
            for handle in self._writes:
                with suppress(Exception):  # under way: it ends with the agent
                    self._agent.releaseXferReq(handle)
            if self._peer:
                with suppress(Exception):  # the peer left first
                    self._agent.invalidateRemoteMD(self._peer)
            for memory in (self._inside, self._outside):
                with suppress(Exception):
                    self._agent.deregisterMem(memory, self._backends)
            self._agent = None

    def _described(self, memory: Bytes) -> Any:
        place = (memory.ctypes.data, memory.nbytes, 0, "")
        return self._nixl.nixlRegDList(self._nixl.DRAM_SEG, [place])

    def _check_open(self) -> None:
        if self._agent is None:
            raise RoleLost("the channel is closed")
