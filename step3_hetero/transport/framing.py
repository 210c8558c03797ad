"""A frame's header as bytes: what both ends of a wire agree on before anything is given memory."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass

from crc32c import crc32c

from step3_hetero.errors import EdgeMismatch
from step3_hetero.transport.base import Buffer, Frame, FrameLimits

VERSION = 1
MAGIC = b"S3HF"

FIXED = struct.Struct("!4sHHIQIHI")
"""magic, version, kind, epoch, seq, bytes of the head, number of parts, checksum of the payload"""

LENGTH = struct.Struct("!Q")
SUM = struct.Struct("!I")


@dataclass(frozen=True, slots=True)
class Header:
    """A frame without its bytes."""

    kind: int
    epoch: int
    seq: int
    head_bytes: int
    part_bytes: tuple[int, ...]
    checksum: int

    @property
    def payload_bytes(self) -> int:
        """Return the bytes of head and parts together."""
        return self.head_bytes + sum(self.part_bytes)

    def frame(self, payload: memoryview) -> Frame:
        """Return the frame whose head and parts lie one after another in ``payload``."""
        place, parts = self.head_bytes, []
        for length in self.part_bytes:
            parts.append(payload[place : place + length])
            place += length
        return Frame(self.kind, self.epoch, self.seq, payload[: self.head_bytes], parts)


def header_of(frame: Frame, limits: FrameLimits, *, summed: bool) -> Header:
    """Describe a frame, with a CRC-32C over its payload if it is ``summed``.

    Raises:
        EdgeMismatch: it is larger than was agreed.
    """
    head, parts = nbytes(frame.head), tuple(map(nbytes, frame.parts))
    header = Header(frame.kind, frame.epoch, frame.seq, head, parts, 0)
    check_size(header, limits)
    if not summed:
        return header
    checksum = 0
    for buffer in (frame.head, *frame.parts):
        checksum = crc32c(buffer, checksum)
    return Header(frame.kind, frame.epoch, frame.seq, head, parts, checksum)


def check_size(header: Header, limits: FrameLimits) -> None:
    """Refuse a frame that is larger than was agreed.

    Raises:
        EdgeMismatch: with its sizes and those allowed.
    """
    sizes = (header.head_bytes, sum(header.part_bytes), len(header.part_bytes))
    allowed = (limits.head_bytes, limits.part_bytes, limits.parts)
    if any(size > most for size, most in zip(sizes, allowed, strict=True)):
        raise EdgeMismatch(
            "a frame of {:,} bytes of head and {:,} bytes in {:,} parts refused; agreed: to {:,}, "
            "{:,} and {:,}".format(*sizes, *allowed)
        )


def packed(header: Header) -> bytes:
    """Return a header's bytes: fixed part, length of each part, checksum over both."""
    fixed = FIXED.pack(
        MAGIC, VERSION, header.kind, header.epoch, header.seq, header.head_bytes,
        len(header.part_bytes), header.checksum,
    )  # fmt: skip
    raw = fixed + b"".join(map(LENGTH.pack, header.part_bytes))
    return raw + SUM.pack(crc32c(raw))


def rest_bytes(fixed: bytes, limits: FrameLimits) -> int:
    """Return how many bytes of a header follow its fixed part.

    Raises:
        EdgeMismatch: this is no frame, of another version, or in too many parts.
    """
    magic, version, *_, parts, _ = FIXED.unpack(fixed)
    if magic != MAGIC or version != VERSION:
        raise EdgeMismatch(
            f"{magic!r} version {version} is no frame; expected {MAGIC!r} version {VERSION}"
        )
    if parts > limits.parts:
        raise EdgeMismatch(f"a frame in {parts} parts refused; agreed: to {limits.parts}")
    return int(parts) * LENGTH.size + SUM.size


def unpacked(fixed: bytes, rest: bytes, limits: FrameLimits) -> Header:
    """Return the header that ``packed`` wrote.

    Raises:
        EdgeMismatch: its checksum is wrong, or the frame larger than was agreed.
    """
    table, (said,) = rest[: -SUM.size], SUM.unpack(rest[-SUM.size :])
    if crc32c(table, crc32c(fixed)) != said:
        raise EdgeMismatch("a frame's header does not match its checksum")
    _, _, kind, epoch, seq, head, _, checksum = FIXED.unpack(fixed)
    lengths = tuple(n for (n,) in LENGTH.iter_unpack(table))
    header = Header(kind, epoch, seq, head, lengths, checksum)
    check_size(header, limits)
    return header


def nbytes(buffer: Buffer) -> int:
    """Return the length of a buffer in bytes, whatever its items are."""
    return memoryview(buffer).nbytes


def flat(buffers: Sequence[Buffer]) -> list[memoryview]:
    """Return buffers as bytes, those that are empty left out."""
    return [memoryview(b).cast("B") for b in buffers if nbytes(b)]
