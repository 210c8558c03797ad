"""The table of plans: which tiles the compiler takes for each chip, and what they occupy.

plans.json is committed, so that a change of kernel, compiler or limit shows in review.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

from opencompiler import HERE, KERNELS, launches, lower

from step3_hetero.backends.ascend import decode, limits

TABLE = HERE / "plans.json"
TARGETS = ("Ascend910B1", "Ascend910B2", "Ascend910B3", "Ascend910B4")
HEADS = (64, 32, 16)
HEAD_DIM = 256
TILES = (16, 32, 64, 128, 256, 512)
MERGED = (16, 32, 64, 128)

Table = dict[str, dict[str, Any]]


def jobs() -> list[dict[str, Any]]:
    """Return what is planned: every tile for Step-3's 64 heads, the tile in use for the others."""
    made = []
    for heads in HEADS:
        for tile in TILES if heads == max(HEADS) else (decode.TILE,):
            for split in (False, True):
                sizes = decode.constants(heads, HEAD_DIM, tile, split=split)
                made.append(launches(heads, split=split)[0].with_constants(**sizes))
    merge = launches(max(HEADS), split=True)[1]
    made += [merge.with_constants(ROWS=rows) for rows in MERGED]
    return [{**one.job(KERNELS), "targets": TARGETS} for one in made]


def plan() -> Table:
    """Ask the compiler for every plan; chips whose plans are the same share a line."""
    asked, table = jobs(), {}
    for job, results in zip(asked, lower(asked), strict=True):
        said: dict[str, Any] = {}
        for target, result in zip(TARGETS, results, strict=True):
            said[target] = result
        alike = all(result == results[0] for result in results)
        table[_name(job)] = {" ".join(TARGETS): results[0]} if alike else said
    return table


def _name(job: Mapping[str, Any]) -> str:
    return job["kernel"] + "".join(f" {n}={v}" for n, v in job["constants"].items())


def written(table: Table) -> str:
    """Return the table as it is committed: a line for each plan."""
    lines = [f"  {json.dumps(name)}: {json.dumps(plans)}" for name, plans in table.items()]
    return "{\n" + ",\n".join(lines) + "\n}\n"


def differences(found: Table, committed: Table) -> Iterator[str]:
    """Say where a table is not the committed one."""
    for name in sorted({*found, *committed}):
        if found.get(name) != committed.get(name):
            yield f"{name}: committed {committed.get(name)}, planned now {found.get(name)}"


def faults(table: Table) -> Iterator[str]:
    """Say where a table contradicts the backend's limits, or its kernels in use do not fit."""
    for name, plans in table.items():
        for chips, plan in plans.items():
            said = f"{name} on {chips}"
            if "failed" in plan:
                yield f"{said}: the compiler fails: {plan['failed']}"
            for memory, nbytes in plan.get("bytes", {}).items():
                if nbytes > limits.ON_CHIP_BYTES[memory]:
                    yield f"{said}: {nbytes} bytes of {memory}"
            if in_use(name) and "bytes" not in plan:
                yield f"{said}: in use, and refused: {plan}"
            yield from (f"{said}: {fault}" for fault in _estimate(name, plan))


def in_use(name: str) -> bool:
    """Say whether decode.py launches this kernel."""
    return f" BLOCK_N={decode.TILE} " in name or f" ROWS={decode.MERGED_ROWS} " in name


def _estimate(name: str, plan: Mapping[str, Any]) -> Iterator[str]:
    """Hold limits.decode_bytes against the plan: equal where it lets a tile pass."""
    if not name.startswith("attend"):
        return
    sizes = dict(part.split("=") for part in name.split()[1:])
    heads, tile = int(sizes["HEADS"]), int(sizes["BLOCK_N"])
    estimate = limits.decode_bytes(heads, HEAD_DIM, tile)
    if any(nbytes > limits.ON_CHIP_BYTES[memory] for memory, nbytes in estimate.items()):
        return
    if "refused" in plan:
        yield f"the backend's own limits let it pass: {plan['refused']}"
    for memory, nbytes in estimate.items():
        if plan.get("bytes", {}).get(memory) != nbytes:
            yield f"limits.decode_bytes says {nbytes} bytes of {memory}, the plan is {plan}"
