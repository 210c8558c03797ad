"""SwiGLU, the router and the routed experts."""

from __future__ import annotations

import numpy as np

from step3_hetero.backends.reference.arrays import Float, Int32, widen
from step3_hetero.backends.reference.attention import softmax
from step3_hetero.backends.reference.linear import ReferenceWeights, multiply


def swiglu(gate_up: Float) -> Float:
    """Return silu(gate) · up, the gate being the first half of the columns.

    Shapes: gate_up (tokens, 2 · inter) -> (tokens, inter), same dtype. Rounded once.

    Source: Shazeer 2020, eq. 6.

    >>> swiglu(np.array([[0.0, 1.0, 5.0, 2.0]], np.float32)).round(4)
    array([[0.    , 1.4621]], dtype=float32)
    """
    gate, up = np.split(widen(gate_up), 2, axis=-1)
    out: Float = (gate * sigmoid(gate) * up).astype(gate_up.dtype)
    return out


def sigmoid(x: Float) -> Float:
    """Return 1 / (1 + exp(-x)) without overflow.

    >>> sigmoid(np.array([-1000.0, 0.0, 1000.0]))
    array([0. , 0.5, 1. ])
    """
    small = np.exp(-np.abs(x))
    p: Float = np.where(x >= 0, 1, small) / (1 + small)
    return p


def route(logits: Float, *, top_k: int, renormalise: bool) -> tuple[Float, Int32]:
    """Choose ``top_k`` experts for each token.

    Shapes: logits (tokens, experts) -> weights (tokens, top_k), ids (tokens, top_k) int32.

    Softmax over all experts first, top-k of the probabilities after. Without ``renormalise`` the
    weights of a row sum to less than 1. On equal probabilities the lower expert number wins.

    Source: Step-3 paper, section 4; modeling_step3.py, Step3vMoEMLP.

    >>> weights, ids = route(np.array([[0.0, 1.0, 1.0]]), top_k=2, renormalise=True)
    >>> weights, ids
    (array([[0.5, 0.5]]), array([[1, 2]], dtype=int32))
    """
    p = softmax(logits)
    ids = np.argsort(-p, axis=-1, kind="stable")[:, :top_k].astype(np.int32)
    weights: Float = np.take_along_axis(p, ids, axis=-1)
    if renormalise:
        weights = weights / weights.sum(axis=-1, keepdims=True)
    return weights, ids


def experts(u: Float, weights: Float, ids: Int32, stack: ReferenceWeights) -> Float:
    """Add up, for each token, the weighted outputs of the experts it was routed to.

    Shapes: u (tokens, hidden), weights, ids (tokens, top_k); stack gate, up (experts, inter,
    hidden), down (experts, hidden, inter) -> (tokens, hidden), dtype of u.

    The products are rounded as ``linear`` and ``swiglu`` round them, the sum over the chosen
    experts, in the order of ids' columns, only at its end. Id -1 adds nothing.

    Source: Step-3 paper, section 4; modeling_step3.py, MoELinear.
    """
    chosen: Float = np.zeros((*ids.shape, u.shape[-1]), u.dtype)
    for expert in np.unique(ids[ids >= 0]).tolist():
        tokens, column = np.nonzero(ids == expert)
        both = [multiply(u[tokens], stack, name, expert) for name in ("gate", "up")]
        inner = swiglu(np.concatenate(both, axis=-1).astype(u.dtype))
        chosen[tokens, column] = multiply(inner, stack, "down", expert).astype(u.dtype)
    total: Float = np.zeros(u.shape, widen(u[:0]).dtype)
    for place in range(ids.shape[1]):
        total = total + widen(chosen[:, place]) * widen(weights[:, place, None])
    return total.astype(u.dtype)
