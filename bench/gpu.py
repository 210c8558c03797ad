"""``python -m bench.gpu``: the CUDA kernels on the card of this machine, against their bounds.

Written without a card and never run on one: on a machine without, it says so and ends.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

import click

from bench.command import BenchCommand

if TYPE_CHECKING:
    from bench.gpu_work import Job, Sizes

CAP_S = 480.0
"""Eight minutes: what is not timed by then is listed as not run."""

EACH_S = 20.0
"""So long one line is timed at most, its warming up apart."""

WARM_UPS, RUNS = 3, 20

WORKERS = max(1, min(8, (os.cpu_count() or 1) // 2))
"""Processes of the conformance run: what takes its time is the reference on the host, and compiling
each kernel for each of its shapes."""

FIGURES, CERTIFICATE = Path("cuda-bench.json"), Path("docs/certificates/cuda.certificate.json")

EPILOG = """\b
Examples:
  python -m bench.gpu --json gpu.json
  python -m bench.gpu --test
"""


@click.command(
    cls=BenchCommand, epilog=EPILOG, context_settings={"help_option_names": ["-h", "--help"]}
)
@click.option("--test", is_flag=True, help="Run conformance in full instead of timing.")
@click.option("--json", "path", type=click.Path(dir_okay=False, path_type=Path), default=FIGURES,
              show_default=True, help="Write the figures here, after every line.")  # fmt: skip
def main(test: bool, path: Path) -> None:
    """Time MFA decode, experts and a layer on this machine's card, or certify it."""
    from step3_hetero.placement.written import check_writable
    from step3_hetero.registry import get_backend

    check_writable("--json", path)
    backend = get_backend("cuda")
    reason = backend.why_unavailable()
    if reason:
        click.echo(f"skipped: {reason}")
        return
    if test:
        sys.exit(certify(CAP_S))
    from bench.gpu_work import STEP3

    sys.exit(report(Bench(backend.open(0), STEP3, card_seconds), path, machine()))


def certify(cap_s: float) -> int:
    """Run every case on the card; the certificate goes beside the others. 1 if time runs out."""
    command = [sys.executable, "-m", "step3_hetero.cli", "conformance", "run", "--backend", "cuda",
               "--full", "--workers", str(WORKERS), "--json", str(CERTIFICATE)]  # fmt: skip
    try:
        return subprocess.run(command, check=False, timeout=cap_s).returncode
    except subprocess.TimeoutExpired:
        click.echo(f"conformance did not end within {cap_s:g} s: no certificate", err=True)
        return 1


def machine() -> dict[str, Any]:
    """Return what the figures are of: a certificate of the run, without its lines."""
    import torch

    from step3_hetero.conformance.digests import digests
    from step3_hetero.registry import get_backend

    return {
        "date": datetime.now(UTC).isoformat(timespec="minutes"),
        "card": torch.cuda.get_device_name(),
        "torch": version("torch"),
        "triton": version("triton"),
        "step3_hetero": version("step3-hetero"),
        "digests": digests(get_backend("cuda")),
    }


def card_seconds(work: Callable[[], Any], until: Callable[[], bool]) -> float:
    """Return the median time of ``work`` by the card's own clock, until ``until`` at most."""
    import torch

    for _ in range(WARM_UPS):
        work()
    times: list[float] = []
    clock: Any = torch.cuda.Event
    while len(times) < RUNS and not (times and until()):
        start, end = (clock(enable_timing=True) for _ in range(2))
        start.record()
        work()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / 1e3)
    return median(times)


Line = dict[str, Any]


@dataclass
class Bench:
    """Times every job of a device and sets it beside what the device can do at best.

    ``seconds`` times a call until a condition holds; ``now`` is the clock of the cap.
    """

    device: Any
    sizes: Sizes
    seconds: Callable[[Callable[[], Any], Callable[[], bool]], float]
    now: Callable[[], float] = time.monotonic
    cap_s: float = CAP_S

    def lines(self) -> Iterator[Line]:
        """Yield a line for each job: figures, or why there are none."""
        from bench.gpu_work import jobs

        start = self.now()
        bandwidth, peak = self._bandwidth(), self._peak()
        yield {"name": "copy bandwidth", "bytes_per_s": bandwidth}
        yield {"name": "bfloat16 GEMM", "flops_per_s": peak}
        found: dict[str, float] = {}
        for job in jobs(self.device, self.sizes):
            line: Line = {"name": job.name, "ours": job.ours}
            if self.now() - start > self.cap_s:
                line["not_run"] = f"{self.cap_s:g} s were over"
            else:
                line |= self._figures(job, bandwidth, peak, found)
            if "s" in line:
                found[job.name] = line["s"]
            yield line
            self._give_back()

    def _figures(self, job: Job, bandwidth: float, peak: float, found: Mapping[str, float]) -> Line:
        """Time one job; ``found`` are the seconds of those before, by name."""
        from bench.gpu_work import NotThere

        try:
            work = job.make()
            seconds = self._timed(work.call)
        except NotThere as reason:
            return {"not_there": str(reason)}
        except Exception as error:  # one line that fails must not take the others with it
            return {"failed": f"{type(error).__name__}: {error}"[:500]}
        line: dict[str, Any] = {
            "s": seconds, "bytes": work.nbytes, "flops": work.flops,
            "of_bandwidth": work.nbytes / seconds / bandwidth,
            "of_peak": work.flops / seconds / peak,
        }  # fmt: skip
        line["of_bound"] = max(line["of_bandwidth"], line["of_peak"])
        if work.against is not None and work.against in found:
            line |= {"against": work.against, "of_library": found[work.against] / seconds}
        if work.target is not None:
            reached = line.get("of_library", line["of_bound"])
            line |= {"target": work.target, "reached": reached >= work.target}
        return line

    def _timed(self, call: Callable[[], Any]) -> float:
        end = self.now() + EACH_S
        return self.seconds(call, lambda: self.now() > end)

    def _bandwidth(self) -> float:
        """Return bytes read and written a second by a copy far larger than any cache."""
        import torch

        n = self.sizes.copied_bytes
        source = torch.empty(n, dtype=torch.uint8, device=self.device.place)
        target = torch.empty_like(source)
        return 2 * n / self._timed(lambda: target.copy_(source))

    def _peak(self) -> float:
        """Return the FLOP a second of a large square bfloat16 product by the library."""
        import torch

        n = self.sizes.square
        a, b = (torch.randn(n, n, device=self.device.place).bfloat16() for _ in range(2))
        flops: float = 2 * n**3 / self._timed(lambda: a @ b)
        return flops

    def _give_back(self) -> None:
        """Return the last job's arrays to the card: the next one needs their memory."""
        import gc

        import torch

        gc.collect()
        if self.device.place.type == "cuda":
            torch.cuda.empty_cache()


def report(bench: Bench, path: Path, head: dict[str, Any]) -> int:
    """Print each line and keep all in ``path`` from the first on; 1 if a line of ours failed."""
    lines: list[Line] = []
    for line in bench.lines():
        lines.append(line)
        click.echo(in_words(line))
        part = path.with_name(path.name + ".part")
        part.write_text(json.dumps({**head, "lines": lines}, indent=1) + "\n", encoding="utf-8")
        part.replace(path)
    return int(any("failed" in line and line["ours"] for line in lines))


def in_words(line: Line) -> str:
    """Return a line as it is printed."""
    name = f"{line['name']:<42}"
    for key in ("not_run", "not_there", "failed"):
        if key in line:
            return f"{name} {key.replace('_', ' ')}: {line[key]}"
    if "s" not in line:
        value, unit = next((v, k) for k, v in line.items() if k != "name")
        return f"{name} {value:.3g} {unit.replace('_per_', '/')}"
    said = f"{name} {line['s'] * 1e6:11.1f} µs, {line['of_bandwidth']:6.1%} of bandwidth, "
    said += f"{line['of_peak']:6.1%} of peak"
    if "of_library" in line:
        said += f", {line['of_library']:.1%} of {line['against']}"
    if "target" in line:
        said += f", target {line['target']:.0%} {'reached' if line['reached'] else 'MISSED'}"
    return said


if __name__ == "__main__":
    main()
