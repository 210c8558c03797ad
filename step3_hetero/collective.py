"""Ranks of one vendor that add up, gather and exchange arrays: TP and EP within an island.

Across vendors there is none: edges between roles go point to point (transport).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

Array = Any

Reduce = Callable[[Array], Array]
"""Returns the sum of every rank's array, the same bits on each: ``Collective.all_reduce``."""


def never() -> bool:
    """Return False: nobody is known to be gone."""
    return False


@dataclass(frozen=True, slots=True)
class Rendezvous:
    """Where the ranks of one group meet.

    ``rank`` is the number of this process among all. The first of a group's ranks listens at
    ``address``, host:port, the others come there. ``epoch`` tells one life of the group from the
    next: ranks of another epoch never meet. Nothing waits longer than ``deadline_s``, nor for ranks
    to come once ``is_off``, asked meanwhile, says that one of them will not.
    """

    address: str
    rank: int
    epoch: int
    deadline_s: float
    is_off: Callable[[], bool] = never


class Collective(ABC):
    """One life of a group, seen from one of its ranks; each is a process of its own.

    All ranks call the same methods in the same order, with arrays of one shape and dtype. An array
    is the device's own and is not changed; results are new. A call that fails ends the group for
    this rank, and so, within the deadline, for the others: they build another with a higher epoch.
    """

    ranks: tuple[int, ...]
    """The processes of the group, in the order in which results are added and laid side by side."""
    place: int
    """Which of ``ranks`` this process is."""
    epoch: int
    deadline_s: float

    @property
    def size(self) -> int:
        """Return the number of ranks."""
        return len(self.ranks)

    @abstractmethod
    def all_reduce(self, x: Array) -> Array:
        """Return the sum of every rank's ``x``, the same bits on each of them.

        Added in the order of ``ranks`` in float32 (float64 for float64), rounded once: no bit
        depends on who comes first, nor on where in the array an element stands.

        Raises:
            TransportTimeout: a rank is gone, or did not come within the deadline.
        """

    @abstractmethod
    def all_gather(self, x: Array) -> Array:
        """Return every rank's ``x`` in the order of ``ranks``: (n, ...) -> (size · n, ...).

        Raises:
            TransportTimeout: as ``all_reduce``.
        """

    @abstractmethod
    def all_to_all(self, x: Array) -> Array:
        """Return what every rank has for this one: (size · n, ...) -> (size · n, ...).

        Part i of ``x``, n rows, goes to the i-th of ``ranks``; part i of the result came from it.

        Raises:
            TransportTimeout: as ``all_reduce``.
            UnsupportedOp: the rows do not come out even.
        """

    @abstractmethod
    def abort(self) -> None:
        """End the group at once, for whoever waits in it too. A second time is fine."""
