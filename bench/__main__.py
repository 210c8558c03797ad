"""``python -m bench``: what there is to measure; runs what needs no other engine."""

from __future__ import annotations

import subprocess
import sys

import click

BENCHES = {
    "decode": "decode speed beside vLLM's CPU build (here without it)",
    "agreement": "log-probabilities beside vLLM's; not run here: bench/setup_vllm.sh first",
    "memory": "resident memory after loading",
    "transport": "round trips of an A2F and an F2A, beside pyzmq and a pipe",
    "afd": "decode speed with attention and FFN in processes of their own, beside colocated",
    "startup": "time of step3-hetero --help",
    "planner": "planning time from 16 to a million cards; --generate: predicted beside measured",
    "gpu": "CUDA kernels on this machine's card, beside libraries; says so where there is none",
    "gpu_compiled": "every CUDA kernel compiled for sm_80 and sm_90, held against the kept table",
    "gpu_roofline": "bytes and FLOP of every CUDA kernel, counted in Triton's interpreter",
}
"""Each bench and what it measures; ``python -m bench.NAME --help`` says more."""

ALONE = (("startup",), ("memory",), ("decode", "--no-vllm"))

EPILOG = """\b
Examples:
  python -m bench
  python -m bench --list
  python -m bench.decode --help
"""


@click.command(epilog=EPILOG, context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--list", "only_list", is_flag=True, help="Name the benches, run none.")
def main(only_list: bool) -> None:
    """Run every bench that needs nothing but this package; exit 1 if one is over its bound."""
    for name, what in BENCHES.items():
        click.echo(f"python -m bench.{name:<13} {what}")
    failed = False
    for name, *options in () if only_list else ALONE:
        click.echo(f"\n{name} {' '.join(options)}".rstrip())
        command = [sys.executable, "-m", f"bench.{name}", *options]  # each in a fresh process
        failed |= subprocess.run(command, check=False).returncode != 0
    sys.exit(failed)


if __name__ == "__main__":
    main()
