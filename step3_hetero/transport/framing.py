"""A frame's header as bytes: what both ends of a wire agree on before anything is given memory."""

from __future__ import annotations

import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from crc32c import crc32c

from step3_hetero.errors import EdgeMismatch
from step3_hetero.transport.base import Buffer, Frame, FrameLimits

VERSION = 2
"""Of greeting and frames. Since 2 a payload's checksum follows it, so that it is summed while it
travels."""

MAGIC = b"S3HF"

FIXED = struct.Struct("!4sHHIQIH")
"""magic, version, kind, epoch, seq, bytes of the head, number of parts"""

ALIGNMENT = 64
"""Of every received part: a cache line, more than any dtype asks for."""

MOST_PIECES = 512
"""Buffers handed to the kernel at a time; it takes 1,024 (IOV_MAX)."""

COPY_BYTES = 256 << 10
"""Of a frame that is still being written, so much is looked for, and copied, at a time."""

LENGTH_BYTES = 8
"""Of each part's length, in the table behind the fixed part."""

SUM = struct.Struct("!I")
"""A CRC-32C: of the header at its end, of the payload behind it."""


@dataclass(frozen=True, slots=True)
class Header:
    """A frame without its bytes."""

    kind: int
    epoch: int
    seq: int
    head_bytes: int
    part_bytes: tuple[int, ...]

    @property
    def payload_bytes(self) -> int:
        """Return the bytes of head and parts together."""
        return self.head_bytes + sum(self.part_bytes)

    def room_bytes(self) -> int:
        """Return the memory that the parts take, each at a multiple of ``ALIGNMENT``."""
        return sum(map(aligned, self.part_bytes))

    def parts_in(self, room: memoryview) -> list[memoryview]:
        """Return where the parts lie in memory of ``room_bytes``."""
        place, parts = 0, []
        for length in self.part_bytes:
            parts.append(room[place : place + length])
            place += aligned(length)
        return parts

    def frame(self, head: Buffer, parts: Sequence[Buffer]) -> Frame:
        """Return the frame with its bytes."""
        return Frame(self.kind, self.epoch, self.seq, head, parts)


def header_of(frame: Frame, limits: FrameLimits) -> Header:
    """Describe a frame.

    Raises:
        EdgeMismatch: it is larger than was agreed.
    """
    parts = tuple(map(nbytes, frame.parts))
    header = Header(frame.kind, frame.epoch, frame.seq, nbytes(frame.head), parts)
    check_size(header, limits)
    return header


def check_size(header: Header, limits: FrameLimits) -> None:
    """Refuse a frame that is larger than was agreed.

    Raises:
        EdgeMismatch: with its sizes and those allowed.
    """
    head, parts, bulk = header.head_bytes, len(header.part_bytes), sum(header.part_bytes)
    if head > limits.head_bytes or bulk > limits.part_bytes or parts > limits.parts:
        raise EdgeMismatch(
            f"a frame of {head:,} bytes of head and {bulk:,} bytes in {parts:,} parts refused; "
            f"agreed: to {limits.head_bytes:,}, {limits.part_bytes:,} and {limits.parts:,}"
        )


def packed(header: Header) -> bytes:
    """Return a header's bytes: fixed part, length of each part, checksum over both."""
    fixed = FIXED.pack(
        MAGIC, VERSION, header.kind, header.epoch, header.seq, header.head_bytes,
        len(header.part_bytes),
    )  # fmt: skip
    raw = fixed + struct.pack(f"!{len(header.part_bytes)}Q", *header.part_bytes)
    return raw + SUM.pack(crc32c(raw))


def rest_bytes(fixed: Buffer, limits: FrameLimits) -> int:
    """Return how many bytes of a header follow its fixed part.

    Raises:
        EdgeMismatch: this is no frame, of another version, or in too many parts.
    """
    magic, version, *_, parts = FIXED.unpack(fixed)
    if magic != MAGIC or version != VERSION:
        raise EdgeMismatch(
            f"{magic!r} version {version} is no frame; expected {MAGIC!r} version {VERSION}"
        )
    if parts > limits.parts:
        raise EdgeMismatch(f"a frame in {parts} parts refused; agreed: to {limits.parts}")
    return int(parts) * LENGTH_BYTES + SUM.size


def unpacked(fixed: Buffer, rest: Buffer, limits: FrameLimits) -> Header:
    """Return the header that ``packed`` wrote.

    Raises:
        EdgeMismatch: its checksum is wrong, or the frame larger than was agreed.
    """
    table, (said,) = rest[: -SUM.size], SUM.unpack(rest[-SUM.size :])
    if crc32c(table, crc32c(fixed)) != said:
        raise EdgeMismatch("a frame's header does not match its checksum")
    _, _, kind, epoch, seq, head, _ = FIXED.unpack(fixed)
    lengths = struct.unpack(f"!{len(table) // LENGTH_BYTES}Q", table)
    header = Header(kind, epoch, seq, head, lengths)
    check_size(header, limits)
    return header


def aligned(count: int) -> int:
    """Return ``count`` bytes rounded up to ``ALIGNMENT``."""
    return -(-count // ALIGNMENT) * ALIGNMENT


def nbytes(buffer: Buffer) -> int:
    """Return the length of a buffer in bytes, whatever its items are."""
    return memoryview(buffer).nbytes


def flat(buffers: Sequence[Buffer]) -> list[memoryview]:
    """Return buffers as bytes, those that are empty left out."""
    return [memoryview(b).cast("B") for b in buffers if nbytes(b)]


def filled(
    targets: Sequence[memoryview], frame: Frame, piece_bytes: int
) -> Iterator[tuple[int, slice]]:
    """Copy a frame's parts to their places, each piece once it is ready.

    Yields the number of a part, and which bytes of it are in place now.
    """
    before = 0
    for number, (target, part) in enumerate(zip(targets, frame.parts, strict=True)):
        source = memoryview(part).cast("B") if len(target) else target
        for start in range(0, len(target), piece_bytes):
            piece = slice(start, min(start + piece_bytes, len(target)))
            if frame.ready is not None:
                frame.ready(before + piece.stop)
            target[piece] = source[piece]
            yield number, piece
        before += len(target)


def chunks(buffers: Sequence[memoryview], chunk_bytes: int) -> list[list[memoryview]]:
    """Cut buffers, in order, into groups of ``chunk_bytes``; the last may be smaller.

    >>> [[bytes(b) for b in group] for group in chunks([memoryview(b"abc"), memoryview(b"de")], 2)]
    [[b'ab'], [b'c', b'd'], [b'e']]
    """
    groups: list[list[memoryview]] = []
    room = 0
    for buffer in buffers:
        place = 0
        while place < len(buffer):
            if not room or len(groups[-1]) == MOST_PIECES:
                groups.append([])
                room = chunk_bytes
            piece = buffer[place : place + room]
            groups[-1].append(piece)
            place += len(piece)
            room -= len(piece)
    return groups
