"""Roles as Ray actors. Ray finds them a place; what they say to each other goes over TCP."""

from __future__ import annotations

import os
import secrets
import threading
from collections.abc import Mapping
from contextlib import suppress
from importlib import import_module
from typing import Any

from step3_hetero.afd.elsewhere import Watched
from step3_hetero.afd.key import VARIABLE, shared_key
from step3_hetero.afd.launcher import GRACE_S, Handle, Launcher, Member
from step3_hetero.afd.local import Given, slots
from step3_hetero.afd.ray_actor import RoleActor
from step3_hetero.config import Config
from step3_hetero.errors import PlacementError, RequestError
from step3_hetero.runtime.resolving import Resolved

RESOURCE = {"cuda": "GPU", "ascend": "NPU"}
"""What Ray calls one card of a backend; the others run on CPUs."""

PLACE_S = 60.0
"""How long a cluster may take to find room for all roles."""


class RayActorRole(Watched):
    """A role in an actor; a thread asks it for facts and sees its end."""

    def __init__(self, ray: Any, member: Member, actor: Any, arguments: tuple[Any, ...]) -> None:
        super().__init__(member.name)
        self._ray, self._actor = ray, actor
        self._serving = actor.serve.remote(*arguments)
        self._thread = threading.Thread(target=self._watch, name=f"of {self.name}", daemon=True)
        self._thread.start()

    def ask(self) -> None:
        """See Handle.ask."""
        self._actor.ask.remote()

    def kill(self) -> None:
        """See Handle.kill."""
        self._ray.kill(self._actor)

    def end(self, *, at_once: bool = False) -> None:
        """See Handle.end."""
        if not at_once:
            self._thread.join(GRACE_S)
        self.kill()
        self._thread.join(GRACE_S)
        super().end()

    def _watch(self) -> None:
        try:
            facts, over = self._actor.facts.remote(), False
            while not over:
                done, _ = self._ray.wait([self._serving, facts], num_returns=1)
                over = self._serving in done
                if facts in done:
                    self._hear(self._ray.get(facts))
                    facts = self._actor.facts.remote()
            self._ray.get(self._serving)
            self.ended("its actor done")
        except Exception as cause:  # Ray wraps whatever the actor raised
            self.ended(f"{type(cause).__name__}: {' '.join(str(cause).split())[-200:]}")

    def _hear(self, facts: list[dict[str, Any]]) -> None:
        for fact in facts:
            self.pid = fact.pop("pid", self.pid)
            if fact:
                self.tells(**fact)


class RayRoles(Launcher):
    """Starts roles as actors in one placement group, a bundle each, spread over the nodes.

    An actor that dies is started again by the front, or by ``up``, in its bundle: Ray itself does
    not know which of a role's requests are lost with it. ``step3_hetero`` is installed on every
    node, and the checkpoint lies at the same path.
    """

    def __init__(
        self,
        resolved: Resolved,
        ablate: str | None,
        *,
        stands: bool = False,
        where: Mapping[str, str] | None = None,
    ) -> None:
        """Connect to the cluster of RAY_ADDRESS, else start one here, and reserve the roles' room.

        Raises:
            RequestError: Ray is not installed.
            ConfigError: the config does not fit it.
            PlacementError: the cluster has no room within `PLACE_S`.
        """
        config = resolved.config
        members = slots(config, resolved.placement)
        self._members = [m for m in members if not config.roles[m.role].hosts]
        self._where = where or {}
        _check(config, stands)
        self._ray = _ray()
        self._key = _key(config)
        values = config.values()  # the key travels with the actor, not as a file of its node
        values["transport"] = {**values.get("transport", {}), "key_file": None}
        given = Given(values, str(config.folder.absolute()), ablate, stands)
        self._line = given.line()
        self._bundles = [_bundle(config, m) for m in self._members]
        self._started_ray = not self._ray.is_initialized()
        if self._started_ray:
            self._ray.init(**_options(len(self._bundles)))
        try:
            self._group = self._room()
        except BaseException:
            self._shut_down()
            raise

    def launch(self, member: Member) -> Handle:
        """See Launcher.launch."""
        number = self._members.index(member)
        bundle = dict(self._bundles[number])
        strategies = import_module("ray.util.scheduling_strategies")
        place = strategies.PlacementGroupSchedulingStrategy(
            self._group, placement_group_bundle_index=number
        )
        actor = self._ray.remote(RoleActor).options(
            num_cpus=bundle.pop("CPU"), num_gpus=bundle.pop("GPU", 0), resources=bundle,
            max_concurrency=4, max_restarts=0, scheduling_strategy=place,
        ).remote()  # fmt: skip
        address = self._where.get(member.name, "")
        arguments = (self._line, member.role, member.number, address, self._key)
        return RayActorRole(self._ray, member, actor, arguments)

    def close(self) -> None:
        """See Launcher.close."""
        with suppress(Exception):  # a cluster that has gone needs no group removed
            import_module("ray.util").remove_placement_group(self._group)
        self._shut_down()

    def _room(self) -> Any:
        group = import_module("ray.util").placement_group(self._bundles, strategy="SPREAD")
        if not group.wait(PLACE_S):
            has = {k: v for k, v in self._ray.cluster_resources().items() if ":" not in k}
            raise PlacementError(
                f"the Ray cluster found no room for {self._bundles} within {PLACE_S:g} s; it has "
                f"{has}"
            )
        return group

    def _shut_down(self) -> None:
        if self._started_ray:
            self._ray.shutdown()


def _ray() -> Any:
    try:
        return import_module("ray")
    except ImportError:
        raise RequestError(
            "--launcher ray needs Ray: pip install 'step3-hetero[distributed]'"
        ) from None


def _options(roles: int) -> dict[str, Any]:
    """Return how to connect, or to start a cluster of this machine with room for all roles."""
    if "RAY_ADDRESS" in os.environ:
        return {"address": "auto"}
    return {"num_cpus": max(roles, os.cpu_count() or 1), "include_dashboard": False}


def _check(config: Config, stands: bool) -> None:
    if config.transport.kind != "tcp":
        raise config.error(
            "transport.kind", f"{config.transport.kind!r} refused with --launcher ray; use tcp"
        )
    for name, role in config.roles.items():
        if role.tp > 1 and any(s.kind == "attention" for s in role.selectors):
            raise config.error(
                f"roles.{name}.tp",
                f"{role.tp} of attention refused with --launcher ray, which spreads roles over "
                "nodes; allowed: 1, or ranks on one machine by another launcher",
            )
        if role.devices is not None:
            raise config.error(
                f"roles.{name}.devices", "refused with --launcher ray, which chooses the cards"
            )
    if stands and shared_key(config) is None:
        raise config.error(
            "transport.key_file", f"up --launcher ray needs a key: name a file, or set {VARIABLE}"
        )


def _key(config: Config) -> str:
    """Return the config's key; without one, a fresh one that this process and its actors share."""
    key = shared_key(config)
    if key is None:
        return os.environ.setdefault(VARIABLE, secrets.token_hex(32))
    try:
        return key.decode()
    except UnicodeDecodeError:
        raise config.error(
            "transport.key_file", "holds no text; with --launcher ray the key is text"
        ) from None


def _bundle(config: Config, member: Member) -> dict[str, float]:
    card = RESOURCE.get(config.roles[member.role].backend)
    return {"CPU": 1.0} | ({card: 1.0} if card else {})
