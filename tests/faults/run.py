"""``make faults``: a hundred rounds of random faults on every rack, 64 requests under way in each.

Exits 1 if a request is lost or altered, a block or a process is left, or tokens stay away for
longer than the rack allows.
"""

from __future__ import annotations

import json
import random
import secrets
import sys
from collections.abc import Sequence
from dataclasses import asdict

import click
import pytest
from afd.leaks import MARK, Before
from rich import box
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from faults.rounds import FAULTS, RACKS, Rack, Round, requests_of, run_round, standing, undisturbed

EPILOG = """\b
Examples:
  PYTHONPATH=tests python -m faults.run --rounds 9 --requests 16
  PYTHONPATH=tests python -m faults.run --rack "1A1F and a spare" --fault "FFN killed"
"""


@click.command(epilog=EPILOG, context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--rounds", type=click.IntRange(1), default=100, show_default=True, help="In all.")
@click.option("--requests", type=click.IntRange(1), default=64, show_default=True)
@click.option("--seed", default=0, show_default=True)
@click.option("--rack", "racks", multiple=True, type=click.Choice([r.name for r in RACKS]))
@click.option("--fault", "faults", multiple=True, type=click.Choice([f.name for f in FAULTS]))
@click.option("--untimed", is_flag=True, help="Do not hold recoveries to their bounds.")
@click.option("--json", "as_json", is_flag=True)
def main(
    rounds: int, requests: int, seed: int, racks: Sequence[str], faults: Sequence[str],
    untimed: bool, as_json: bool,
) -> None:  # fmt: skip
    """Let faults strike at random and hold every answer against an undisturbed run."""
    draw = random.Random(seed)
    chosen = [r for r in RACKS if r.name in racks] or list(RACKS)
    allowed = [f for f in FAULTS if f.name in faults] or list(FAULTS)
    asked = requests_of(requests, seed)
    want = undisturbed(asked)
    done: list[Round] = []
    left: list[str] = []
    with Progress(console=Console(stderr=True)) as progress:
        task = progress.add_task("rounds", total=rounds)
        for number, rack in enumerate(chosen):
            share = len(range(number, rounds, len(chosen)))
            with pytest.MonkeyPatch.context() as patch:
                patch.setenv(MARK, mark := secrets.token_hex(8))
                before = Before(mark)
                with standing(rack, patch) as scene:
                    for _ in range(share):
                        done.append(run_round(scene, draw.choice(allowed), asked, want, draw))
                        progress.advance(task)
                left += [f"{rack.name}: {what}" for what in before.wait()]
    late = [r for r in done if r.away_s > r.within_s and not untimed]
    wrong = [r for r in done if not r.right]
    if as_json:
        click.echo(json.dumps({"rounds": [asdict(r) for r in done], "left": left}, indent=1))
    else:
        _show(chosen, done)
        for what in [*map(str, wrong), *(f"late: {r}" for r in late), *left]:
            click.echo(what)
    click.echo(
        f"{len(done)} rounds of {requests} requests: {len(wrong)} wrong, {len(late)} late, "
        f"{len(left)} things left over",
        err=True,
    )
    sys.exit(bool(wrong or late or left))


def _show(racks: Sequence[Rack], done: Sequence[Round]) -> None:
    table = Table(title="tokens came again after, s", title_justify="left", box=box.SIMPLE_HEAD)
    for column in ("rack", "fault", "rounds", "struck", "right", "median", "most", "allowed"):
        table.add_column(column, justify="left" if column in ("rack", "fault") else "right")
    for rack in racks:
        for fault in FAULTS:
            found = [r for r in done if (r.rack, r.fault) == (rack.name, fault.name)]
            if not found:
                continue
            away = sorted(r.away_s for r in found)
            table.add_row(
                rack.name, fault.name, str(len(found)), str(sum(r.struck for r in found)),
                str(sum(r.right for r in found)), f"{away[len(away) // 2]:.2f}",
                f"{away[-1]:.2f}", f"{found[0].within_s:g}",
            )  # fmt: skip
    Console().print(table)


if __name__ == "__main__":
    main()
