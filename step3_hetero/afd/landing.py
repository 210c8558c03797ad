"""Arrays on their way from a channel to a device: large ones in pieces, copied as they come."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

from step3_hetero.afd.leaving import COPY_S, is_large, pieces
from step3_hetero.afd.parcel import unpacked
from step3_hetero.backend import Array, Device, Event
from step3_hetero.errors import Step3HeteroError
from step3_hetero.specs import HostArray
from step3_hetero.transport.base import Bytes, CopyFailed, Frame

NONE_LANDED: Mapping[str, Landed] = MappingProxyType({})


@dataclass(slots=True, eq=False)
class Landed:
    """A received array that is, or soon will be, in a device's memory too.

    ``host`` is the array that was received: another one in its place has not landed.
    """

    device: Device
    array: Array
    events: list[Event] = field(default_factory=list)
    host: HostArray | None = None

    def there(self) -> Array:
        """Return the array once it is complete.

        Raises:
            CopyFailed: the device did not copy it.
        """
        try:
            for event in self.events:
                event.wait(COPY_S)
        except (Step3HeteroError, RuntimeError) as cause:  # torch's are RuntimeErrors
            name = self.device.info.name
            raise CopyFailed(f"{name} did not copy what has come: {cause}") from cause
        self.events.clear()
        return self.array


class Landing:
    """Copies what a channel receives to one device; see ``transport.base.Landing``.

    What cannot be landed comes on the host alone: whoever moves it from there meets the same error
    where it can be answered. Nothing is believed before ``taken``, which follows the checksum.
    """

    def __init__(self, device: Device, kinds: tuple[int, ...]) -> None:
        self._device = device
        self._kinds = kinds
        self._landed: dict[str, Landed] = {}
        self._coming: deque[tuple[int, HostArray, Array, Landed]] = deque()

    def memory(self, nbytes: int) -> Bytes:
        """Return memory from which copies to the device are fastest."""
        return self._device.host_buffer(nbytes)

    def begin(self, frame: Frame) -> None:
        """Make room on the device for the large arrays of a frame, whose kind has such."""
        self._forget()
        if frame.kind not in self._kinds:
            return
        try:
            self._expect(unpacked(frame, "the peer", copy=False)[1])
        except (Step3HeteroError, RuntimeError):  # a head that lies, or no memory
            self._forget()

    def came(self, nbytes: int) -> None:
        """Start to copy the pieces of which the last byte is there."""
        try:
            while self._coming and self._coming[0][0] <= nbytes:
                _, source, target, landed = self._coming.popleft()
                landed.events.append(self._device.copy_in(source, target))
        except (Step3HeteroError, RuntimeError):
            self._forget()

    def taken(self, arrays: Mapping[str, HostArray]) -> Mapping[str, Landed]:
        """Return which arrays of the frame that has been received are on the device, by name."""
        landed = self._landed
        self._forget()
        for name, one in landed.items():
            one.host = arrays[name]
        return landed

    def _expect(self, arrays: Mapping[str, HostArray]) -> None:
        place = 0
        for name, x in arrays.items():
            if is_large(x.nbytes):
                landed = Landed(self._device, self._device.empty(x.shape, x.dtype.name))
                source, target = x.reshape(-1), landed.array.reshape(-1)
                for piece in pieces(x.nbytes, x.itemsize):
                    end = place + piece.stop * x.itemsize
                    self._coming.append((end, source[piece], target[piece], landed))
                self._landed[name] = landed
            place += x.nbytes

    def _forget(self) -> None:
        self._landed, self._coming = {}, deque()
