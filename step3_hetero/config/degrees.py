"""Which roles can split their stages over processes, and into what sets."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from step3_hetero.config.document import Document, Problem

if TYPE_CHECKING:
    from step3_hetero.config.schema import Config


def degree_problems(config: Config, name: str, document: Document) -> Iterator[Problem]:
    """Yield what is wrong with a role's ``ep`` and ``tp``, or what this build does not split."""
    role = config.roles[name]
    if role.instances % role.ep:
        message = f"roles.{name}.instances: {role.instances} is no multiple of ep"
        yield Problem(
            document.place(("roles", name, "instances")), f"{message}, which is {role.ep}"
        )
    kinds = {selector.kind for selector in role.selectors}
    among = "stages other than ffn"
    refused = {
        "tp": f"{among} and without attention" if "attention" not in kinds else "",
        "ep": among,
    }
    if "attention" in kinds and role.tp > 1 and config.transport.kind == "inproc":
        message = f"roles.{name}.tp: {role.tp} of attention is not available yet over inproc"
        place = document.place(("roles", name, "tp"))
        yield Problem(place, f"{message}: ranks are processes of their own; use shm, tcp or nixl")
    for degree, why in refused.items() if kinds != {"ffn"} else ():
        if why and getattr(role, degree) > 1:
            message = f"roles.{name}.{degree}: {getattr(role, degree)} is not available yet"
            place = document.place(("roles", name, degree))
            yield Problem(place, f"{message} with {why}; give those another role")
