"""What two processes must agree on before weights are loaded, and what is said when they do not."""

from __future__ import annotations

from collections.abc import Mapping
from hashlib import sha256
from pathlib import Path
from typing import Any

from step3_hetero.backend import API_VERSION
from step3_hetero.config import Config, stage_ranges
from step3_hetero.errors import EdgeMismatch
from step3_hetero.graph import StageGraph
from step3_hetero.runtime.placing import Placement

PROTOCOL = 1
"""Raised when a frame changes its meaning."""

Contract = Mapping[str, Any]


def edge_contract(config: Config, placement: Placement, folder: Path) -> Contract:
    """Return what this process takes the placement to be: plain data, the same in every process."""
    graph, transport = placement.graph, config.transport
    return {
        "protocol": PROTOCOL,
        "api": API_VERSION,
        "model": model_digest(folder),
        "dtype": graph.by_name["head"].spec.dtype,
        "hidden": graph.by_name["head"].spec.hidden,
        "a2f_dtype": transport.a2f_dtype,
        "f2a_dtype": transport.f2a_dtype,
        "batch_invariant": config.runtime.batch_invariant,
        "router_logits": config.runtime.router_logits,
        "kv_blocks": placement.kv_blocks,
        "microbatches": config.runtime.microbatches,
        "tokens": placement.limits.tokens,
        "roles": {name: stage_ranges(role.stages) for name, role in placement.roles.items()},
        "sharding": {name: [f"ep {r.ep}", f"tp {r.tp}"] for name, r in config.roles.items()},
    }


def agree(mine: Contract, theirs: Contract, me: str, them: str) -> None:
    """Hold two contracts against each other.

    Raises:
        EdgeMismatch: naming every key that differs, with both sides' values.
    """
    differ = [key for key in mine if mine[key] != theirs.get(key)]
    differ += [key for key in theirs if key not in mine]
    if differ:
        said = "; ".join(f"{key}: {mine.get(key)!r} and {theirs.get(key)!r}" for key in differ)
        raise EdgeMismatch(
            f"{me} and {them} do not agree: {said}; start both from the same config and checkpoint"
        )


def model_digest(folder: Path) -> str:
    """Return a SHA-256 over a checkpoint's config and the headers of its weight files.

    A header holds every tensor's name, dtype, shape and place; the bytes themselves are digested
    tensor by tensor when conformance asks.
    """
    seen = sha256((folder / "config.json").read_bytes())
    for path in sorted(folder.glob("*.safetensors")):
        with path.open("rb") as file:
            length = file.read(8)
            seen.update(f"{path.name}:{path.stat().st_size}".encode())
            seen.update(length + file.read(int.from_bytes(length, "little")))
    return seen.hexdigest()


def part_bytes(graph: StageGraph, tokens: int) -> int:
    """Return the most bytes that one stage's inputs or outputs take on the wire, with scales."""
    widest = max(s.spec.hidden for s in graph.stages if s.kind != "vision")
    image = 1 << 26  # one image's views or rows: 728² pixels in float32 take a tenth of it
    return max(8 * tokens * widest, image)
