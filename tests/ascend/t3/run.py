"""Tier 3: the Triton kernels through the vendor's open compiler, without a card.

Planned for each 910B (plans.json), and their lowered form run on this CPU. ``--write`` renews
plans.json. Exit code 0 also when nothing could be run; the reason is printed then. Exit code 1 when
a plan, a number or one of the checks themselves is wrong.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterable
from pathlib import Path

from opencompiler import HERE, PACKAGES, NotRun, OnCpu, prepare

STAND_IN = HERE.parent / "device"


def check_plans(write: bool) -> list[str]:
    """Plan every tile; return what is wrong, the control included."""
    import plans

    found = plans.plan()
    if write:
        plans.TABLE.write_text(plans.written(found), encoding="utf-8")
    committed = json.loads(plans.TABLE.read_text(encoding="utf-8"))
    wrong = [*plans.differences(found, committed), *plans.faults(found)]
    cells = [plan for row in found.values() for plan in row.values()]
    refused = [
        (n, p["refused"]) for n, row in found.items() for p in row.values() if "refused" in p
    ]
    accepted = sum("bytes" in plan for plan in cells)
    chips = ", ".join(plans.TARGETS)
    print(f"plans for {chips}: {len(found)} tiles, {accepted} taken, {len(refused)} refused")
    for name, said in refused:
        print(f"  refused: {name}: {said}")
    if not any(name.startswith("attend") and "BLOCK_N=512" in name for name, _ in refused):
        wrong.append("control: a tile of 512 keys over the limit was not refused")
    for seeded, check in (
        ({"bytes": {"L1": 1}}, lambda table: plans.differences(table, committed)),
        ({"bytes": {"unified buffer": 196609}}, plans.faults),
        ({"refused": "unified buffer"}, plans.faults),
    ):
        name = next(name for name in found if plans.in_use(name))
        if not list(check({**found, name: {" ".join(plans.TARGETS): seeded}})):
            wrong.append(f"control: a table with {name} altered to {seeded} passes")
    return wrong


def check_numbers() -> list[str]:
    """Run the lowered kernels against the reference; return what is wrong."""
    import kernel_cases as numbers

    launch, wrong = OnCpu(), []
    worst, count = 0.0, 0
    for how, result in numbers.all_results(launch):
        worst, count = max(worst, result.worst), count + 1
        if result.status != "passed":
            said = "; ".join(f"{f.check}: {f.message}" for f in result.findings) or result.reason
            wrong.append(f"{result.id}, {how}: {result.status}: {said}")
    print(f"numbers: {count} cases, worst error {worst:.2f} of what rounding explains; "
          f"programs run: {launch.programs}")  # fmt: skip
    if numbers.reads_beyond(launch):
        wrong.append("what lies in the cache beyond the contexts changes the result")
    if not all(launch.programs.get(name) for name in ("attend", "combine")):
        wrong.append(f"control: the kernels did not run: {launch.programs}")
    return wrong


def check_defects() -> list[str]:
    """Run kernels with seeded defects; return which pass all the same."""
    import kernel_cases as numbers

    missed = []
    for name in numbers.DEFECTS:
        split = numbers.SPLIT if name in numbers.MERGE else 0
        launch = numbers.mutant(name)
        found = list(numbers.results(launch, numbers.FAULTY, split))
        told = sorted({f.check for r in found for f in r.findings})
        told += ["NaN beyond the contexts"] if numbers.reads_beyond(launch) else []
        print(f"  seeded: {name}: {'found by ' + ', '.join(told) if told else 'NOT FOUND'}")
        if not told:
            missed.append(f"control: a kernel with a defect passes: {name}")
    return missed


def load_stand_in() -> None:
    """Put the kernels' arrays in host memory.

    Raises:
        NotRun: the stand-in of tier 1 cannot be built.
    """
    from step3_hetero.backends.ascend.driver import VARIABLE
    from step3_hetero.registry import get_backend

    os.environ[VARIABLE] = str(STAND_IN)
    if reason := get_backend("ascend").why_unavailable():
        raise NotRun(reason)


def report(wrong: Iterable[str]) -> int:
    """Print what is wrong and return the exit code."""
    said = list(wrong)
    for one in said:
        print(f"  wrong: {one}")
    print(f"tier 3: {'FAILED' if said else 'passed'}")
    return 1 if said else 0


def main() -> int:
    """Print the report and return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", action="store_true", help="renew plans.json")
    write, start = parser.parse_args().write, time.monotonic()
    try:
        prepare()
        load_stand_in()
    except NotRun as reason:
        print(f"tier 3: not run: {reason}")
        return 0
    print(f"{', '.join(PACKAGES)}; ready after {time.monotonic() - start:.0f} s")
    try:
        return report([*check_plans(write), *check_numbers(), *check_defects()])
    except subprocess.TimeoutExpired as late:
        return report([f"{Path(late.cmd[1]).name} did not end within {late.timeout:g} s"])


if __name__ == "__main__":
    sys.exit(main())
