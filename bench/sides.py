"""Starts the sides of a comparison and asks them, one at a time."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any, Self

import click

WORKER = Path(__file__).with_name("worker.py")

VLLM_PYTHON = Path(".venv-vllm/bin/python")
"""Where ``bench/setup_vllm.sh .venv-vllm`` puts it."""


class Running:
    """A worker process and those it starts, all stopped (SIGSTOP) except while they are asked.

    An idle side can then take neither a core nor memory bandwidth from the other, however its
    threads wait.
    """

    def __init__(self, side: str, python: Path, folder: Path, **options: Any) -> None:
        self.side = side
        self.log = folder / f"{side}.log"
        command = [str(python), "-P", str(WORKER), side, str(folder), json.dumps(options)]
        with self.log.open("w", encoding="utf-8") as log:
            self.process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                start_new_session=True,  # a process group of its own, to stop as a whole
            )
        self.version: str = self._answer()["version"]
        self._signal(signal.SIGSTOP)

    def ask(self, do: str, **command: Any) -> dict[str, Any]:
        """Send one command and wait for its answer.

        Raises:
            click.ClickException: the worker ended; the message has the end of its log.
        """
        assert self.process.stdin is not None
        self._signal(signal.SIGCONT)
        try:
            print(json.dumps({"do": do, **command}), file=self.process.stdin, flush=True)
            return self._answer()
        finally:
            self._signal(signal.SIGSTOP)

    def close(self) -> None:
        """End the worker and everything it started."""
        self._signal(signal.SIGTERM)
        self._signal(signal.SIGCONT)
        try:
            self.process.wait(timeout=20)
        except subprocess.TimeoutExpired:
            self._signal(signal.SIGKILL)

    def __enter__(self) -> Self:
        """Return the side itself."""
        return self

    def __exit__(self, *exc: Any) -> None:
        """End it."""
        self.close()

    def _answer(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            end = self.log.read_text(encoding="utf-8", errors="replace")[-2000:]
            raise click.ClickException(f"{self.side} ended; {self.log} closes with:\n{end}")
        found: dict[str, Any] = json.loads(line)
        return found

    def _signal(self, number: int) -> None:
        try:
            os.killpg(self.process.pid, number)
        except ProcessLookupError:
            return


def end_politely() -> None:
    """Have SIGTERM leave by the ``with`` blocks: a stopped worker would outlive this process."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))


def engine(folder: Path, backend: str, cores: int | None = None) -> Running:
    """Start this project's engine on a checkpoint, on so many cores (None: all)."""
    return Running("engine", Path(sys.executable), folder, backend=backend, cores=cores)


def vllm(python: Path, folder: Path, dtype: str, cores: int | None = None) -> Running:
    """Start vLLM on a checkpoint, on so many cores (None: all)."""
    return Running("vllm", python, folder, dtype=dtype, cores=cores)


def find_vllm(python: Path) -> Path:
    """Return ``python`` if it is there.

    Raises:
        click.UsageError: its environment is not there.
    """
    if not python.exists():
        raise click.UsageError(
            f"no vLLM at {python}; `bench/setup_vllm.sh .venv-vllm` installs its CPU build (Python "
            "3.11, 3.4 GB), --vllm-python names another environment"
        )
    return python
