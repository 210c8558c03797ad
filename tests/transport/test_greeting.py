"""The greeting of two peers: a wrong key is told to both, one that leaves meanwhile is lost."""

import secrets
import socket
import ssl
import threading

import pytest

from step3_hetero.errors import EdgeMismatch, RoleLost
from step3_hetero.transport import shm
from step3_hetero.transport.base import FrameLimits
from step3_hetero.transport.framing import VERSION
from step3_hetero.transport.sockets import HELLO, HELLO_MAGIC, Patience, Stream, shake_hands
from step3_hetero.transport.tls import TlsStream

LIMITS = FrameLimits(1 << 16, 1 << 20, 8)


@pytest.fixture(params=[socket.SOCK_STREAM, socket.SOCK_SEQPACKET], ids=["stream", "packets"])
def ends(request):
    """Return two ends of a connection."""
    pair = socket.socketpair(socket.AF_UNIX, request.param)
    yield pair
    for end in pair:
        end.close()


def greet(sock, key, *, listens=False):
    stream = Stream(sock)
    try:
        shake_hands(stream, LIMITS, key, Patience(10), listens=listens)
    finally:
        stream.close()


@pytest.mark.parametrize("listens", [False, True])
def test_peer_that_leaves_between_hello_and_proof_is_lost_and_refuses_nothing(ends, listens):
    here, there = ends
    sizes = (LIMITS.head_bytes, LIMITS.part_bytes, LIMITS.parts)
    there.send(HELLO.pack(HELLO_MAGIC, VERSION, *sizes, secrets.token_bytes(32)))
    there.shutdown(socket.SHUT_WR)
    with pytest.raises(RoleLost, match="the peer left while it was greeted"):
        greet(here, b"k", listens=listens)


def test_wrong_key_is_told_to_both_sides(ends):
    told = []

    def listen():
        try:
            greet(ends[1], b"k", listens=True)
        except EdgeMismatch as refused:
            told.append(str(refused))

    thread = threading.Thread(target=listen)
    thread.start()
    with pytest.raises(EdgeMismatch, match="the peer does not know the key"):
        greet(ends[0], b"other")
    thread.join()
    assert told == ["the peer does not know the key"]


@pytest.mark.parametrize("whole", [False, True], ids=["its writing end", "both ends"])
def test_peer_that_leaves_before_it_gives_a_ring_is_lost(ends, whole):
    here, there = ends
    there.shutdown(socket.SHUT_RDWR if whole else socket.SHUT_WR)
    with pytest.raises(RoleLost, match="left before it gave a ring"):
        shm._swapped(here, here.fileno(), Patience(10))


def test_listener_that_leaves_during_the_tls_handshake_is_lost():
    here, there = socket.socketpair()
    there.shutdown(socket.SHUT_WR)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    with pytest.raises(RoleLost, match="left during the TLS handshake"):
        TlsStream.met(here, context, Patience(10), None)
    there.close()
