"""How long ``step3-hetero --help`` takes."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path
from statistics import median

import click

from bench.command import BenchCommand

RUNS = 7
LARGEST_S = 0.5

EPILOG = """\b
Examples:
  python -m bench.startup
"""


@click.command(
    cls=BenchCommand, epilog=EPILOG, context_settings={"help_option_names": ["-h", "--help"]}
)
def main() -> None:
    """Time the command line's help, median of 7; exit 1 from half a second on."""
    program = Path(sys.executable).with_name("step3-hetero")
    times = []
    for _ in range(RUNS):
        start = time.perf_counter()
        subprocess.run([program, "--help"], check=True, stdout=subprocess.DEVNULL)
        times.append(time.perf_counter() - start)
    took = median(times)
    click.echo(f"step3-hetero --help: {took:.3f} s, median of {RUNS}; allowed: under {LARGEST_S}")
    sys.exit(took >= LARGEST_S)


if __name__ == "__main__":
    main()
