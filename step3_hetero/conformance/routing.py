"""When another expert is no error: the router's margin against the rounding of its logits."""

from __future__ import annotations

from types import TracebackType
from typing import Any

import numpy as np

from step3_hetero.backend import Device
from step3_hetero.conformance.tolerance import FACTOR, ROUNDOFF, Bool, Float64
from step3_hetero.specs import HostArray


class RouteSpy:
    """Keeps the logits that a device's router is given, run by run."""

    def __init__(self, device: Device) -> None:
        self.device = device
        self.logits: list[HostArray] = []

    def __enter__(self) -> RouteSpy:
        """Put itself before the kernel."""
        kernel = self.device.kernel("route")

        def route(logits: Any, **parameters: Any) -> Any:
            self.logits.append(self.device.to_host(logits))
            return kernel(logits, **parameters)

        self._kernels = self.device.kernels
        self.device.kernels = {**self._kernels, "route": route}
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        """Take itself out."""
        self.device.kernels = self._kernels


def near_ties(exact: HostArray, rounded: HostArray, top_k: int) -> Bool:
    """Return the rows whose choice or order of experts rounding may change.

    Shapes: exact, rounded (tokens, experts) -> (tokens,) bool. ``exact`` are the logits in float64,
    ``rounded`` the reference's in the case's dtype. Two logits may each be off by twice the
    reference's own error in the row (or the mean row's); a gap below both is a tie.
    """
    if len(exact) == 0:
        return np.zeros(0, bool)
    error = np.abs(rounded - exact).max(-1)
    allowed = np.sqrt(FACTOR) * np.maximum(error, error.mean())
    near: Bool = margins(exact, top_k) <= 2 * allowed
    return near


def weights_slack(logit_error: HostArray, dtype: str) -> Float64:
    """Return what a row of routing weights in ``dtype`` may err by whatever its own error is.

    Shapes: logit_error (tokens,), the reference's largest in each row -> (tokens,), squared and
    relative. A probability p_i changes by p_i · (δl_i - Σ p·δl): at most twice the largest error of
    a logit, relative to itself. A row holds top_k weights only, too few to tell their error by
    themselves.

    >>> weights_slack(np.array([0.0, 0.0]), "float32") == 4 * 2.0**-48
    array([ True,  True])
    """
    if len(logit_error) == 0:
        return np.zeros(0)
    error = np.maximum(logit_error, logit_error.mean())
    slack: Float64 = FACTOR * (2 * error + ROUNDOFF[dtype]) ** 2
    return slack


def margins(logits: HostArray, top_k: int) -> HostArray:
    """Return, for each row, the smallest gap between neighbours of the first top_k + 1 in rank.

    Shapes: logits (tokens, experts) -> (tokens,).

    >>> margins(np.array([[0.0, 3.0, 1.0]]), 1).tolist()
    [2.0]
    """
    falling = -np.sort(-logits.astype(np.float64), axis=-1)[:, : top_k + 1]
    gaps: HostArray = (falling[:, :-1] - falling[:, 1:]).min(-1)
    return gaps
