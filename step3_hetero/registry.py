"""Find backends by entry point. The core never imports a vendor by name."""

from __future__ import annotations

from functools import cache
from importlib.metadata import EntryPoint, entry_points

from step3_hetero.backend import API_VERSION, Backend
from step3_hetero.errors import BackendNotFound

GROUP = "step3_hetero.backends"


def backend_names() -> list[str]:
    """Return the registered names, without importing any backend."""
    return sorted({ep.name for ep in entry_points(group=GROUP)})


@cache
def get_backend(name: str) -> Backend:
    """Import and return one backend.

    Raises:
        BackendNotFound: no package registers ``name``, two do, it does not import, or it is built
            for another API.
    """
    entry = _entry(name)
    try:
        backend: Backend = entry.load()()
    except Exception as cause:  # a stranger's package may raise anything
        raise BackendNotFound(f"{name!r} of {_owner(entry)} does not load: {cause!r}") from cause
    owner, versions = _owner(entry), list(getattr(backend, "api_versions", ()))
    if API_VERSION not in versions:
        raise BackendNotFound(
            f"{name!r} of {owner} is built for backend API {versions}, this is {API_VERSION}; "
            "install a matching version"
        )
    if not isinstance(backend, Backend) or backend.name != name:
        raise BackendNotFound(f"{name!r} of {owner} gives {backend!r}, no Backend of that name")
    return backend


def _entry(name: str) -> EntryPoint:
    # An editable install may show one entry point twice; two packages are two values or owners.
    found = {(_owner(ep), ep.value): ep for ep in entry_points(group=GROUP, name=name)}
    if not found:
        installed = ", ".join(backend_names()) or "none"
        raise BackendNotFound(f"no backend {name!r}; installed: {installed}")
    if len(found) > 1:
        owners = ", ".join(sorted(f"{owner} ({value})" for owner, value in found))
        raise BackendNotFound(f"two packages register {name!r}: {owners}; uninstall one")
    return next(iter(found.values()))


def _owner(entry: EntryPoint) -> str:
    return entry.dist.name if entry.dist is not None else "an unknown package"
