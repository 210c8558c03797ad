"""``python -m bench.transport``: round trips of one A2F and one F2A, beside pyzmq and a pipe.

0.9 MB go out and 1.8 MB come back: 128 tokens of 7168 in FP8 and in bfloat16. Both processes keep
to a core of their own where there are two.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from multiprocessing.connection import Connection
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

import click

from bench.machine import describe, sentence
from step3_hetero.transport.base import Frame, FrameLimits
from step3_hetero.transport.registry import get_transport

OUT_BYTES = 128 * 7168
BACK_BYTES = 2 * OUT_BYTES
LIMITS = FrameLimits(1 << 16, 1 << 24, 8)
SPAWN = multiprocessing.get_context("spawn")

Trip = Callable[[], None]

TARGETS_US = {"shm": 120, "tcp": 900}


def _stay(core: int) -> None:
    cores = sorted(os.sched_getaffinity(0))
    if len(cores) > 1:
        os.sched_setaffinity(0, {cores[core % len(cores)]})


def _answer_frames(name: str, address: str) -> None:
    _stay(1)
    channel, back = get_transport(name).connect(address, LIMITS, 30), bytes(BACK_BYTES)
    while len(frame := channel.receive(60).parts) == 1 and len(frame[0]) > 1:
        channel.send(Frame(9, 0, 0, b"{}", [back]), 30)


@contextmanager
def ours(name: str) -> Iterator[Trip]:
    """Give a round trip over one of our transports."""
    listener = get_transport(name).listen("", LIMITS)
    process = SPAWN.Process(target=_answer_frames, args=(name, listener.address))
    process.start()
    channel, out = listener.accept(60), bytes(OUT_BYTES)

    def trip() -> None:
        channel.send(Frame(8, 0, 0, b"{}", [out]), 30)
        assert len(channel.receive(30).parts[0]) == BACK_BYTES

    yield trip
    channel.send(Frame(8, 0, 0, b"", [b"x"]), 30)
    process.join()
    channel.close()
    listener.close()


def _answer_zmq(address: str) -> None:
    import zmq

    _stay(1)
    socket, back = zmq.Context.instance().socket(zmq.REP), bytes(BACK_BYTES)
    socket.bind(address)
    while len(socket.recv(copy=False)) > 1:
        socket.send(back, copy=False)


@contextmanager
def pyzmq(address: str) -> Iterator[Trip]:
    """Give a round trip over pyzmq, without copies where it can."""
    import zmq

    process = SPAWN.Process(target=_answer_zmq, args=(address,))
    process.start()
    socket, out = zmq.Context.instance().socket(zmq.REQ), bytes(OUT_BYTES)
    socket.connect(address)

    def trip() -> None:
        socket.send(out, copy=False)
        assert len(socket.recv(copy=False)) == BACK_BYTES

    yield trip
    socket.send(b"x")
    process.join()
    socket.close()


def _answer_pipe(end: Connection) -> None:
    _stay(1)
    back = bytes(BACK_BYTES)
    while len(end.recv_bytes()) > 1:
        end.send_bytes(back)


@contextmanager
def pipe() -> Iterator[Trip]:
    """Give a round trip over a pipe of multiprocessing."""
    here, there = SPAWN.Pipe()
    process = SPAWN.Process(target=_answer_pipe, args=(there,))
    process.start()
    out = bytes(OUT_BYTES)

    def trip() -> None:
        here.send_bytes(out)
        assert len(here.recv_bytes()) == BACK_BYTES

    yield trip
    here.send_bytes(b"x")
    process.join()


def measure(sides: dict[str, Any], trips: int) -> list[dict[str, Any]]:
    """Return median and 99th percentile of each side, in microseconds."""
    rows = []
    for name, side in sides.items():
        times = []
        with side() as trip:
            for number in range(trips + 20):
                start = time.perf_counter()
                trip()
                if number >= 20:
                    times.append((time.perf_counter() - start) * 1e6)
        times.sort()
        rows.append({"side": name, "median_us": median(times), "p99_us": times[int(0.99 * trips)]})
    return rows


@click.command()
@click.option("--trips", default=500, show_default=True, help="Round trips of each side.")
@click.option("--json", "as_json", is_flag=True)
def main(trips: int, as_json: bool) -> None:
    """Measure every side, one after another, in one run."""
    machine = describe()
    _stay(0)
    with TemporaryDirectory() as folder:
        sides = {
            "shm": partial(ours, "shm"),
            "tcp": partial(ours, "tcp"),
            "pyzmq tcp": partial(pyzmq, "tcp://127.0.0.1:25917"),
            "pyzmq ipc": partial(pyzmq, f"ipc://{folder}/bench"),
            "multiprocessing pipe": pipe,
        }
        rows = measure(sides, trips)
    if as_json:
        click.echo(json.dumps({"machine": machine, "rows": rows}, indent=1))
        return
    click.echo(sentence(machine))
    for row in rows:
        aim = TARGETS_US.get(row["side"])
        told = f", aim {aim} us" if aim else ""
        click.echo(
            f"{row['side']:<22} {row['median_us']:7.0f} us median, {row['p99_us']:7.0f} p99{told}"
        )


if __name__ == "__main__":
    main()
