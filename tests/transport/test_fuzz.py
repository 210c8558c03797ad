"""Strangers by the thousand: each costs at most its own connection, and memory stays bounded.

``make fuzz`` runs 100,000 of them on each transport, the test suite 1,000.
"""

import multiprocessing
import os
import resource
import select
import socket
import threading
import time
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest

from step3_hetero.errors import EdgeMismatch, RoleLost, Step3HeteroError, TransportTimeout
from step3_hetero.transport.base import CorruptFrame, Frame
from step3_hetero.transport.registry import get_transport
from transport.strangers import (
    LIMITS,
    bell_bytes,
    frame_bytes,
    greeted,
    header_bytes,
    raw,
    shm_ring,
)

ROUNDS = int(os.environ.get("STEP3_HETERO_FUZZ_ROUNDS", "1000"))
GREETING_SHARE = 4
"""One stranger in so many does not even greet properly."""

FRIEND_EVERY = 50
NEWCOMER_EVERY = 200

GROWTH_BYTES = 48 << 20
"""What a listener's memory may grow by. Its due: 64 channels (MOST_WAITING) of 0.3 MB, 16 threads
of greetings, and what malloc keeps. One frame of 64 KiB leaked in each of 1,000 rounds is more."""


def serve(name, pipe):
    """Echo what comes on any number of channels, as a role does; say at the end what it took."""
    listener = get_transport(name).listen("", LIMITS)
    pipe.send(listener.address)
    channels, corrupt = [], 0
    while True:
        for one in select.select([pipe, listener, *channels], [], [], 60)[0]:
            if one is pipe:
                if pipe.recv() == "end":
                    listener.close()
                    for channel in channels:
                        channel.close()
                    return
                took = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10
                found = len(list(Path("/proc/self/fd").iterdir()))
                pipe.send((took, found, threading.active_count(), corrupt))
            elif one is listener:
                with suppress(TransportTimeout):
                    channels.append(listener.accept(0.1))
            elif one in channels:
                try:
                    frame = one.receive(1.0)
                    one.send(Frame(9, frame.epoch, frame.seq, frame.head, frame.parts), 1.0)
                except CorruptFrame:
                    corrupt += 1
                except (EdgeMismatch, RoleLost, TransportTimeout):
                    one.close()
                    channels.remove(one)


def mutated(data, rng):
    """Flip a bit, cut, drop, double or overwrite a piece, or do nothing."""
    data = bytearray(data)
    at, length = int(rng.integers(len(data))), int(rng.integers(1, 9))
    match int(rng.integers(6)):
        case 0:
            data[at] ^= 1 << int(rng.integers(8))
        case 1:
            del data[at:]
        case 2:
            del data[at : at + length]
        case 3:
            data[at:at] = data[at : at + length]
        case 4:
            data[at : at + length] = rng.bytes(length)
    return bytes(data)


def odd_number(rng):
    """Return a number near an edge of what a field may hold, or any."""
    edges = (0, 1, 63, 64, LIMITS.part_bytes, LIMITS.head_bytes, 1 << 31, 1 << 32, 1 << 63)
    near = int(rng.choice(np.array(edges, np.uint64))) + int(rng.integers(-1, 2))
    return min(max(near, 0), (1 << 64) - 1)


def nasty(name, rng):
    """Return what a stranger that has greeted sends: random, mutated, or well formed and lying."""
    parts = [rng.bytes(int(rng.integers(0, 300))) for _ in range(int(rng.integers(0, 7)))]
    if name == "tcp":
        good = frame_bytes(parts)
        lying = header_bytes(odd_number(rng) & 0xFFFFFFFF, [odd_number(rng) for _ in parts])
    else:
        good = bell_bytes(parts=[len(p) for p in parts], place=64, count=128)
        lying = bell_bytes(parts=[odd_number(rng) for _ in parts], place=odd_number(rng),
                           count=odd_number(rng))  # fmt: skip
    return [
        rng.bytes(int(rng.integers(1, 400))),
        mutated(good, rng),
        mutated(lying, rng),
        lying,
        good + mutated(good, rng),
    ][int(rng.integers(5))]


def attack(name, address, rng):
    """Be one stranger, from the connection to its end."""
    sock = raw(name, address)
    memory = None
    with suppress(OSError, Step3HeteroError):  # it is cut off as soon as it shows
        if rng.integers(GREETING_SHARE) == 0:
            if rng.integers(2):
                hello = sock.recv(4096)
                sock.send(mutated(hello, rng))
            else:
                sock.send(rng.bytes(int(rng.integers(1, 200))))
        else:
            greeted(sock)
            if name == "shm" and rng.integers(8):
                memory = shm_ring(sock)
                memory.count = odd_number(rng)
            sock.sendall(nasty(name, rng))
        if rng.integers(2):
            sock.shutdown(socket.SHUT_WR)
    sock.close()


class Friend:
    """A peer that keeps the rules, before, between and after the strangers."""

    def __init__(self, name, address):
        self.channel = get_transport(name).connect(address, LIMITS, 30)
        self.asked = 0

    def ask(self):
        self.asked += 1
        sent = bytes([self.asked % 251]) * 5000
        self.channel.send(Frame(1, 0, self.asked, b"head", [sent]), 10)
        back = self.channel.receive(30)
        assert (back.seq, bytes(back.head), bytes(back.parts[0])) == (self.asked, b"head", sent)


def asked(pipe):
    pipe.send("how much")
    assert pipe.poll(60), "the listener hangs"
    return pipe.recv()


@pytest.mark.parametrize("name", ["shm", "tcp"])
def test_strangers_cost_at_most_their_connection_and_memory_stays_bounded(name):
    spawn = multiprocessing.get_context("spawn")
    pipe, there = spawn.Pipe()
    process = spawn.Process(target=serve, args=(name, there), daemon=True)
    process.start()
    try:
        siege(name, pipe)
        pipe.send("end")
        process.join(60)
        assert process.exitcode == 0
    finally:
        process.kill()
        process.join()
        process.close()


def siege(name, pipe):
    """Send strangers, friends and newcomers to a listener in another process."""
    assert pipe.poll(120)
    address, rng = pipe.recv(), np.random.default_rng(5)
    friend = Friend(name, address)
    friend.ask()
    _, descriptors, threads, _ = asked(pipe)
    warm_bytes = 0
    for number in range(ROUNDS):
        if number == ROUNDS // 10:  # it has seen some of everything
            warm_bytes = asked(pipe)[0]
        attack(name, address, rng)
        if number % FRIEND_EVERY == 0:
            friend.ask()
        if number % NEWCOMER_EVERY == 0:
            newcomer = Friend(name, address)
            newcomer.ask()
            newcomer.channel.close()
    friend.ask()
    until = time.monotonic() + 60
    while (after := asked(pipe))[1] > descriptors or after[2] > threads:
        assert time.monotonic() < until, f"{after} after, {descriptors} and {threads} before"
        time.sleep(0.2)  # the last strangers are being let go
    assert after[0] - warm_bytes < GROWTH_BYTES
    if name == "tcp":
        assert after[3] > 0, "no frame was damaged behind its header"
    friend.channel.close()
