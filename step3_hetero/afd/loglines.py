"""Lines that roles write, on their way to a terminal or a file. A role never waits for either."""

from __future__ import annotations

import os
import queue
import threading
from collections.abc import Callable
from pathlib import Path
from typing import IO

from step3_hetero.errors import RequestError

OnLine = Callable[[str, str], None]
"""Called with a role's name and a line that it wrote; may be slow, and may fail."""

MOST_WAITING = 10_000
"""Lines kept for a terminal or disk that takes none; those that come then are dropped."""

LONGEST_LINE = 1 << 16
"""Bytes; a longer line is cut in pieces."""


class LogLines:
    """Takes lines from roles' pipes and hands them on, in a thread that may be kept waiting.

    Two kinds of threads: one a role reads its pipe and never waits, one writes. A full disk, a
    terminal that was stopped or a reader that is gone costs lines, which are counted, and no role.
    """

    def __init__(self, on_line: OnLine) -> None:
        self._on_line = _Counted(on_line)
        self._queue: queue.SimpleQueue[tuple[str, str] | None] = queue.SimpleQueue()
        self._writer = threading.Thread(target=self._write, name="log lines", daemon=True)
        self._writer.start()

    def follow(self, name: str, stream: IO[bytes]) -> threading.Thread:
        """Read a role's output to its end, in a thread."""
        thread = threading.Thread(target=self._read, args=(name, stream), daemon=True)
        thread.start()
        return thread

    def close(self, deadline_s: float = 1.0) -> None:
        """Write what waits, for so long at most."""
        self._queue.put(None)
        self._writer.join(deadline_s)  # a daemon: where it is kept waiting, the process ends it

    def _read(self, name: str, stream: IO[bytes]) -> None:
        lost = 0
        with stream:
            while line := stream.readline(LONGEST_LINE):
                if self._queue.qsize() >= MOST_WAITING:
                    lost += 1
                    continue
                if lost:
                    self._queue.put((name, _note(lost)))
                    lost = 0
                self._queue.put((name, line.decode(errors="replace").rstrip("\n")))
        if lost:
            self._queue.put((name, _note(lost)))

    def _write(self) -> None:
        while (entry := self._queue.get()) is not None:
            self._on_line(*entry)


class _Counted:
    """A sink whose failures are counted and told to it once it takes lines again."""

    def __init__(self, sink: OnLine) -> None:
        self._sink = sink
        self._refused: dict[str, int] = {}

    def __call__(self, name: str, line: str) -> None:
        try:
            if lost := self._refused.get(name, 0):
                self._sink(name, _note(lost))
                del self._refused[name]
            self._sink(name, line)
        except (OSError, ValueError):  # a full disk, a reader that is gone, a closed file
            self._refused[name] = self._refused.get(name, 0) + 1


def _note(lost: int) -> str:
    return f"({lost} lines were lost here)"


class LogFiles:
    """Writes each role's lines to a file of its own in a folder, at the end of what is there."""

    def __init__(self, folder: Path) -> None:
        """Make the folder if it is missing.

        Raises:
            RequestError: it cannot be made, or not be written to.
        """
        self._folder = folder
        self._files: dict[str, IO[bytes]] = {}
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as cause:
            raise RequestError(f"--log-dir {folder}: {cause.strerror}; give another") from cause
        if not os.access(folder, os.W_OK):
            raise RequestError(f"--log-dir {folder}: not ours to write to; give another")

    def __call__(self, name: str, line: str) -> None:
        """Write a line; OSError if the disk takes none, and the next line is tried again."""
        if name not in self._files:
            path = self._folder / f"{name.replace(':', '-')}.log"
            self._files[name] = path.open("ab", buffering=0)
        self._files[name].write(line.encode() + b"\n")

    def close(self) -> None:
        """Close the files."""
        for file in self._files.values():
            file.close()


def to_all(*sinks: OnLine) -> OnLine:
    """Return what hands a line to every sink; one that fails keeps it from no other."""
    counted = [_Counted(sink) for sink in sinks]

    def on_line(name: str, line: str) -> None:
        for sink in counted:
            sink(name, line)

    return on_line
