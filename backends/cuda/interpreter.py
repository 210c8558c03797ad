"""Triton's interpreter, mended where it is wrong, for devices opened with ``interpret: true``.

A kernel is the same source here and on a card. The interpreter of Triton 3.7 multiplies bfloat16
as raw integers, truncates float32 to bfloat16, decodes the NaN codes of e4m3 as 480 and wraps
values beyond its range; the mend below does what a card does. tests/cuda/test_interpreter.py fails
on the day when a fault is gone, so that its mend can go too.

Programs run one after another: a race between them does not show here.
"""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import cache
from types import SimpleNamespace
from typing import Any

import ml_dtypes
import numpy as np
import triton.language as tl
import triton.runtime.interpreter as upstream
from triton.runtime.interpreter import InterpretedFunction, TensorHandle
from triton.runtime.jit import JITFunction

NUMPY_FLOAT = {
    tl.bfloat16: np.dtype(ml_dtypes.bfloat16),
    tl.float8e4nv: np.dtype(ml_dtypes.float8_e4m3fn),
    tl.float16: np.dtype(np.float16),
    tl.float32: np.dtype(np.float32),
    tl.float64: np.dtype(np.float64),
}

LARGEST_E4M3 = 448.0
"""What a card saturates to (PTX: cvt.rn.satfinite.e4m3x2.f32); ml_dtypes gives NaN beyond it."""

CARRIED = (tl.bfloat16, tl.float8e4nv)
"""Dtypes that the interpreter holds as integers of the same width."""


def run(kernel: Any, grid: tuple[int, ...], args: tuple[Any, ...], named: dict[str, Any]) -> None:
    """Run every program of ``grid`` in order, over tensors in host memory.

    What a compiler would take (num_warps, num_stages) is ignored.
    """
    function = _rewritten(kernel.fn)
    wanted = inspect.signature(kernel.fn).parameters
    bound = inspect.getcallargs(kernel.fn, *args, **{n: v for n, v in named.items() if n in wanted})
    constant = {p.name for p in kernel.params if p.is_constexpr}
    with interpreting(), np.errstate(all="ignore"):
        given = {n: v if n in constant else upstream._implicit_cvt(v) for n, v in bound.items()}
        sizes = (*grid, 1, 1)[:3]
        upstream.interpreter_builder.set_grid_dim(*sizes)
        for place in itertools.product(*(range(n) for n in sizes)):
            upstream.interpreter_builder.set_grid_idx(*place)
            function(**given)


@dataclass
class Traffic:
    """What kernels asked of memory and multiplied, counted over all their programs.

    Accesses are (bytes of an element, addresses). ``flops`` are those of matrix products, two for
    each term.
    """

    loads: list[tuple[int, Any]] = field(default_factory=list)
    stores: list[tuple[int, Any]] = field(default_factory=list)
    flops: int = 0

    @property
    def asked_bytes(self) -> int:
        """Return the bytes of all loads and stores."""
        return sum(size * len(places) for size, places in (*self.loads, *self.stores))

    @property
    def least_bytes(self) -> int:
        """Return the bytes with each address read once and written once."""
        return _once(self.loads) + _once(self.stores)


def _once(accesses: list[tuple[int, Any]]) -> int:
    by_size: dict[int, list[Any]] = {}
    for size, places in accesses:
        by_size.setdefault(size, []).append(places)
    return sum(size * len(np.unique(np.concatenate(p))) for size, p in by_size.items())


_TRAFFIC: ContextVar[Traffic | None] = ContextVar("traffic", default=None)


@contextmanager
def counting() -> Iterator[Traffic]:
    """Count the traffic of every kernel that is interpreted meanwhile."""
    traffic = Traffic()
    token = _TRAFFIC.set(traffic)
    try:
        yield traffic
    finally:
        _TRAFFIC.reset(token)


@contextmanager
def interpreting() -> Iterator[None]:
    """Let ``tl`` work on NumPy arrays, mended; compiling is impossible meanwhile."""
    scope = upstream._patch_lang(SimpleNamespace(__globals__={"tl": tl, "core": tl.core}))
    builder = upstream.InterpreterBuilder
    scope.set_attr(builder, "create_dot", _dot)
    scope.set_attr(builder, "create_masked_load", _noted(builder.create_masked_load, "loads", 1))
    scope.set_attr(builder, "create_masked_store", _noted(builder.create_masked_store, "stores", 2))
    scope.set_attr(builder, "cast_impl", _cast)
    scope.set_attr(builder, "create_fp_to_fp", lambda self, src, to, _: _cast(self, src, to))
    scope.set_attr(builder, "binary_op", _binary(builder.binary_op))
    scope.set_attr(JITFunction, "__call__", _call)
    try:
        yield
    finally:
        scope.restore()


@cache
def _rewritten(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return a kernel with its assignments wrapped, as the interpreter wants them."""
    rewritten: Callable[..., Any] = InterpretedFunction(function).rewrite()
    return rewritten


def _call(self: JITFunction[Any], *args: Any, **named: Any) -> Any:
    """Call one device function from another; outside a kernel Triton refuses this."""
    named.pop("_semantic", None)
    return _rewritten(self.fn)(*args, **named)


def _floats(handle: TensorHandle) -> Any:
    """Return a handle's numbers in a dtype that NumPy computes in."""
    dtype = handle.dtype.scalar
    if dtype in CARRIED:
        return handle.data.view(NUMPY_FLOAT[dtype]).astype(np.float32)
    return handle.data


def _noted(access: Callable[..., Any], kind: str, mask: int) -> Callable[..., Any]:
    """Return a load or a store that is noted where traffic is counted; ``mask`` is its argument."""

    def noted(self: Any, ptrs: TensorHandle, *rest: Any) -> Any:
        traffic = _TRAFFIC.get()
        if traffic is not None:
            size = max(1, ptrs.get_element_ty().primitive_bitwidth // 8)
            getattr(traffic, kind).append((size, ptrs.data[rest[mask - 1].data].ravel()))
        return access(self, ptrs, *rest)

    return noted


def _dot(self: Any, a: TensorHandle, b: TensorHandle, d: TensorHandle, *_: Any) -> TensorHandle:
    """Multiply what the operands mean, sums in the accumulator's dtype.

    float32 operands as a card without tensor cores for them does it: one fused multiply and add
    after another, each rounded once (products and sums of two float32 are near exact in float64).
    """
    left, right, total = _floats(a), _floats(b), d.data
    if (traffic := _TRAFFIC.get()) is not None:
        traffic.flops += 2 * left.shape[0] * left.shape[1] * right.shape[1]
    if d.dtype.scalar == tl.int32:  # float64 holds these sums exactly, and NumPy has BLAS for it
        found = np.matmul(left.astype(np.float64), right.astype(np.float64))
        return TensorHandle(found.astype(np.int32) + total, tl.int32)
    if a.dtype.scalar != tl.float32 or d.dtype.scalar != tl.float32:
        return TensorHandle(np.matmul(left, right, dtype=total.dtype) + total, d.dtype.scalar)
    left, right = left.astype(np.float64), right.astype(np.float64)
    for k in range(left.shape[1]):
        total = (left[:, k, None] * right[None, k, :] + total).astype(np.float32)
    return TensorHandle(total, d.dtype.scalar)


def _cast(self: Any, src: TensorHandle, to: Any) -> TensorHandle:
    """Convert between dtypes: to nearest, ties to even; to e4m3 saturating, as a card does."""
    source, target = src.dtype.scalar, to.scalar
    if source not in CARRIED and target not in CARRIED:
        return TensorHandle(src.data.astype(upstream._get_np_dtype(to)), target)
    x = _floats(src)
    if target == tl.float8e4nv:
        x = np.clip(x, -LARGEST_E4M3, LARGEST_E4M3)
    if target in CARRIED:
        held = x.astype(np.float32).astype(NUMPY_FLOAT[target])
        return TensorHandle(held.view(upstream._get_np_dtype(to)), target)
    return TensorHandle(x.astype(upstream._get_np_dtype(to)), target)


def _binary(plain: Callable[..., TensorHandle]) -> Callable[..., TensorHandle]:
    """Return a binary operation that computes with bfloat16 numbers, not with their bits."""

    def apply(self: Any, lhs: TensorHandle, rhs: TensorHandle, op: Any) -> TensorHandle:
        dtype = lhs.dtype.scalar
        if dtype not in CARRIED:
            return plain(self, lhs, rhs, op)
        found = op(_floats(lhs), _floats(rhs))
        if found.dtype == bool:
            return TensorHandle(found, tl.int1)
        return _cast(self, TensorHandle(found, tl.float32), dtype)

    return apply
