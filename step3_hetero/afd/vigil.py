"""Whether a peer that is being sent to lives, seen without reading what it says.

Whoever waits in sending does not read meanwhile: signs of life pile up in the socket. That there
are more of them than before is seen from a third thread, which must not read either.
"""

from __future__ import annotations

import array
import fcntl
import termios

from step3_hetero.transport.base import Channel

MOST_UNREAD = 64 << 10
"""So many bytes unread are frames, and the peer may itself wait in sending, without signs of life.
Over shared memory it hardly ever does: a ring holds more frames than are under way."""


class Vigil:
    """Looks at a link in which a frame is under way, once in every period of signs of life."""

    def __init__(self, channel: Channel) -> None:
        self._channel = channel
        self._seen: tuple[int, float] | None = None
        self._looks = 0

    def ends(self) -> None:
        """Forget what was seen: nothing is under way any more."""
        self._seen, self._looks = None, 0

    def silent_looks(self, last_seen_s: float) -> int:
        """Look once; return how many looks in a row have found nothing new.

        They are counted, not timed: a machine that stood still heard nobody, and owes them time.
        """
        unread = _unread_bytes(self._channel.fileno())
        seen = None if unread is None or unread > MOST_UNREAD else (unread, last_seen_s)
        self._looks = self._looks + 1 if seen is not None and seen == self._seen else 0
        self._seen = seen
        return self._looks


def _unread_bytes(descriptor: int) -> int | None:
    """Return the bytes that lie unread in a socket; None where there is no saying."""
    count = array.array("i", [0])
    try:
        fcntl.ioctl(descriptor, termios.FIONREAD, count)
    except (OSError, ValueError):
        return None
    return count[0]
