"""Ranks as threads of one process that meet in their sums, for stages without a group."""

import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np

PATIENT_S = 60.0


class Meeting:
    """Adds what the ranks bring, rank 0 first, widened, and rounds once: as ``all_reduce`` does.

    One rank runs at a time, until it waits for the others: Triton's interpreter bears no threads.
    """

    def __init__(self, size):
        self.size = size
        self.sums = 0
        self._brought = [None] * size
        self._all = threading.Barrier(size, timeout=PATIENT_S)
        self._turn = threading.Lock()

    def reduce(self, rank, device):
        """Return the ``reduce`` of one rank's stage."""

        def reduce(x):
            self._brought[rank] = device.to_host(x)
            self._wait()
            first, *others = self._brought
            total = first.astype(np.promote_types(np.float32, first.dtype))
            for other in others:
                total = total + other
            self._wait()  # nobody brings the next before all have taken this
            self.sums += rank == 0
            return device.from_host(total.astype(first.dtype))

        return reduce

    def each(self, work):
        """Return ``work(rank)`` of all ranks, in step."""

        def in_turn(rank):
            with self._turn:
                return work(rank)

        with ThreadPoolExecutor(self.size) as pool:
            return list(pool.map(in_turn, range(self.size)))

    def _wait(self):
        self._turn.release()
        try:
            self._all.wait()
        finally:
            self._turn.acquire()
