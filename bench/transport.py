"""``python -m bench.transport``: round trips of one A2F and one F2A, beside what they are made of.

0.9 MB go out and 1.8 MB come back: 128 tokens of 7168 in FP8 and in bfloat16. Both processes keep
to a core of their own where there are two. All sides are open at once and take turns, so that
whatever else the machine does falls on all alike: judge by the ratios of one run.

pyzmq is a peer to compare with and no more: without it (extra ``bench``) its rows are left out.
``memcpy`` copies the same bytes once within one process; ``bare`` sides send them over a socket, or
copy them and ring a bell, without header, checksum or deadline. ``cards`` are tcp between emulated
cards whose copies to and from the host take their time, one after the other or in pieces beside the
wire, of 1024 tokens.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from functools import partial
from importlib.util import find_spec
from multiprocessing.connection import Connection
from multiprocessing.shared_memory import SharedMemory
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

import click

from bench.command import BenchCommand
from bench.machine import describe, sentence
from bench.transport_cards import cards
from step3_hetero.transport.base import Frame, FrameLimits
from step3_hetero.transport.registry import get_transport

OUT_BYTES = 128 * 7168
BACK_BYTES = 2 * OUT_BYTES
LIMITS = FrameLimits(1 << 16, 1 << 24, 8)
CORES = sorted(os.sched_getaffinity(0))
HERE, THERE = CORES[0], CORES[-1]
"""Read before this process keeps to one: a child inherits that, and has to be told of the other."""

SPAWN = multiprocessing.get_context("spawn")

Trip = Callable[[], None]

TURN_TRIPS, WARM_TRIPS = 20, 5
"""A side makes so many trips in a row, after some that warm the caches again."""

TARGETS_US = {"shm": 120, "tcp": 900}


def _stay(core: int) -> None:
    os.sched_setaffinity(0, {core})


def _answer_frames(core: int, name: str, address: str) -> None:
    _stay(core)
    channel, back = get_transport(name).connect(address, LIMITS, 30), os.urandom(BACK_BYTES)
    while len(frame := channel.receive(60).parts) == 1 and len(frame[0]) > 1:
        channel.send(Frame(9, 0, 0, b"{}", [back]), 30)


@contextmanager
def ours(name: str) -> Iterator[Trip]:
    """Give a round trip over one of our transports."""
    listener = get_transport(name).listen("", LIMITS)
    process = SPAWN.Process(target=_answer_frames, args=(THERE, name, listener.address))
    process.start()
    channel, out = listener.accept(60), os.urandom(OUT_BYTES)

    def trip() -> None:
        channel.send(Frame(8, 0, 0, b"{}", [out]), 30)
        assert len(channel.receive(30).parts[0]) == BACK_BYTES

    yield trip
    channel.send(Frame(8, 0, 0, b"", [b"x"]), 30)
    process.join()
    channel.close()
    listener.close()


def _filled(sock: socket.socket, view: memoryview) -> memoryview:
    place = 0
    while place < len(view) and (count := sock.recv_into(view[place:])):
        place += count
    return view[:place]


def _answer_bare(core: int, sock: socket.socket) -> None:
    _stay(core)
    back, room = os.urandom(BACK_BYTES), memoryview(bytearray(OUT_BYTES))
    while len(_filled(sock, room)) == OUT_BYTES:
        sock.sendall(back)


def _tcp_pair() -> tuple[socket.socket, socket.socket]:
    with socket.create_server(("127.0.0.1", 0)) as server:
        here = socket.create_connection(server.getsockname())
        there, _ = server.accept()
    for end in (here, there):
        end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return here, there


@contextmanager
def bare(pair: Callable[[], tuple[socket.socket, socket.socket]]) -> Iterator[Trip]:
    """Give a round trip over a socket alone, into a buffer that is kept."""
    here, there = pair()
    process = SPAWN.Process(target=_answer_bare, args=(THERE, there))
    process.start()
    there.close()
    out, room = os.urandom(OUT_BYTES), memoryview(bytearray(BACK_BYTES))

    def trip() -> None:
        here.sendall(out)
        assert len(_filled(here, room)) == BACK_BYTES

    yield trip
    here.close()
    process.join()


def _whole(memory: SharedMemory) -> memoryview:
    assert memory.buf is not None  # it is None once closed
    return memory.buf


def _answer_shared(core: int, bell: socket.socket, name: str) -> None:
    _stay(core)
    memory, back = SharedMemory(name), os.urandom(BACK_BYTES)
    room = _whole(memory)[OUT_BYTES:]
    while bell.recv(1):
        room[:] = back
        bell.send(b"!")
    room.release()
    memory.close()


@contextmanager
def shared() -> Iterator[Trip]:
    """Give a round trip of two copies in shared memory, each with a byte over a socket."""
    here, there = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    memory, out = SharedMemory(create=True, size=OUT_BYTES + BACK_BYTES), os.urandom(OUT_BYTES)
    process = SPAWN.Process(target=_answer_shared, args=(THERE, there, memory.name))
    process.start()
    there.close()
    room = _whole(memory)[:OUT_BYTES]

    def trip() -> None:
        room[:] = out
        here.send(b"!")
        assert here.recv(1)

    yield trip
    here.close()
    process.join()
    room.release()
    memory.close()
    memory.unlink()


@contextmanager
def memcpy() -> Iterator[Trip]:
    """Give two copies within this process, of the bytes that go out and of those that come back."""
    pairs = [(os.urandom(n), memoryview(bytearray(n))) for n in (OUT_BYTES, BACK_BYTES)]

    def trip() -> None:
        for source, target in pairs:
            target[:] = source

    yield trip


def _answer_zmq(core: int, address: str) -> None:
    import zmq

    _stay(core)
    context: Any = zmq.Context.instance()  # typed only where it is installed
    end, back = context.socket(zmq.REP), os.urandom(BACK_BYTES)
    end.bind(address)
    while len(end.recv(copy=False)) > 1:
        end.send(back, copy=False)


@contextmanager
def pyzmq(address: str) -> Iterator[Trip]:
    """Give a round trip over pyzmq, without copies where it can."""
    import zmq

    process = SPAWN.Process(target=_answer_zmq, args=(THERE, address))
    process.start()
    context: Any = zmq.Context.instance()
    end, out = context.socket(zmq.REQ), os.urandom(OUT_BYTES)
    end.connect(address)

    def trip() -> None:
        end.send(out, copy=False)
        assert len(end.recv(copy=False)) == BACK_BYTES

    yield trip
    end.send(b"x")
    process.join()
    end.close()


def _answer_pipe(core: int, end: Connection) -> None:
    _stay(core)
    back = os.urandom(BACK_BYTES)
    while len(end.recv_bytes()) > 1:
        end.send_bytes(back)


@contextmanager
def pipe() -> Iterator[Trip]:
    """Give a round trip over a pipe of multiprocessing."""
    here, there = SPAWN.Pipe()
    process = SPAWN.Process(target=_answer_pipe, args=(THERE, there))
    process.start()
    out = os.urandom(OUT_BYTES)

    def trip() -> None:
        here.send_bytes(out)
        assert len(here.recv_bytes()) == BACK_BYTES

    yield trip
    here.send_bytes(b"x")
    process.join()


def measure(
    sides: dict[str, Callable[[], AbstractContextManager[Trip]]], trips: int
) -> list[dict[str, Any]]:
    """Return median, 10th and 99th percentile of each side, in microseconds."""
    times: dict[str, list[float]] = {name: [] for name in sides}
    with ExitStack() as stack:
        taken = {name: stack.enter_context(side()) for name, side in sides.items()}
        for _ in range(-(-trips // TURN_TRIPS)):
            for name, trip in taken.items():
                for number in range(-WARM_TRIPS, TURN_TRIPS):
                    start = time.perf_counter()
                    trip()
                    if number >= 0:
                        times[name].append((time.perf_counter() - start) * 1e6)
    rows = []
    for name, found in times.items():
        found.sort()
        rows.append(
            {
                "side": name,
                "median_us": median(found),
                "p10_us": found[trips // 10],
                "p99_us": found[int(0.99 * trips)],
            }
        )
    return rows


def sides(folder: str) -> dict[str, Callable[[], AbstractContextManager[Trip]]]:
    """Return every side by its name, those of pyzmq if that is installed; say so if it is not."""
    found: dict[str, Callable[[], AbstractContextManager[Trip]]] = {
        "memcpy": memcpy,
        "shm": partial(ours, "shm"),
        "tcp": partial(ours, "tcp"),
        "cards, one by one": partial(cards, THERE, _stay, False),
        "cards, in pieces": partial(cards, THERE, _stay, True),
        "bare shared memory": shared,
        "bare tcp": partial(bare, _tcp_pair),
        "bare socketpair": partial(bare, socket.socketpair),
        "pyzmq tcp": partial(pyzmq, "tcp://127.0.0.1:25917"),
        "pyzmq ipc": partial(pyzmq, f"ipc://{folder}/bench"),
        "multiprocessing pipe": pipe,
    }
    if find_spec("zmq") is None:
        click.echo(
            "no pyzmq here, its rows are left out: pip install 'step3-hetero[bench]'", err=True
        )
        found = {name: side for name, side in found.items() if not name.startswith("pyzmq")}
    return found


EPILOG = """\b
Examples:
  python -m bench.transport
  python -m bench.transport --trips 200 --json
  python -m bench.transport --side shm --side tcp
"""


@click.command(
    cls=BenchCommand, epilog=EPILOG, context_settings={"help_option_names": ["-h", "--help"]}
)
@click.option("--trips", type=click.IntRange(1), default=500, show_default=True,
              help="Round trips of each side.")  # fmt: skip
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of a table.")
@click.option("--side", "names", multiple=True, help="Only this one, and memcpy; again for more.")
def main(trips: int, as_json: bool, names: tuple[str, ...]) -> None:
    """Measure every side in one run."""
    machine = describe()
    _stay(HERE)
    with TemporaryDirectory() as folder:
        found = sides(folder)
        if unknown := set(names) - set(found):
            raise click.UsageError(f"no side {', '.join(unknown)}; there are {', '.join(found)}")
        asked = {n: side for n, side in found.items() if not names or n in ("memcpy", *names)}
        rows = measure(asked, trips)
    if as_json:
        click.echo(json.dumps({"machine": machine, "rows": rows}, indent=1))
        return
    click.echo(sentence(machine))
    copied = rows[0]["median_us"]
    click.echo(f"{'side':<22} {'median':>8} {'10th':>8} {'99th':>8} us  memcpys  target")
    for row in rows:
        target = TARGETS_US.get(row["side"], "")
        click.echo(
            f"{row['side']:<22} {row['median_us']:8.0f} {row['p10_us']:8.0f} {row['p99_us']:8.0f}"
            f"     {row['median_us'] / copied:7.1f}  {target}"
        )


if __name__ == "__main__":
    main()
