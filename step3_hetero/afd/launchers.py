"""Launchers by the name that a command line gives."""

from __future__ import annotations

from step3_hetero.afd.launcher import Launcher
from step3_hetero.errors import RequestError
from step3_hetero.runtime.resolving import Resolved

NAMES = ("local", "ray")


def launcher_of(name: str, resolved: Resolved, ablate: str | None = None) -> Launcher | None:
    """Return a launcher for a config's roles; None: the executor's own, of this machine.

    Raises:
        RequestError: there is none of this name, or its library is not installed.
    """
    if name == "local":
        return None
    if name != "ray":
        raise RequestError(f"launcher {name!r} refused; allowed: {', '.join(NAMES)}")
    from step3_hetero.afd.ray_roles import RayRoles

    return RayRoles(resolved, ablate)
