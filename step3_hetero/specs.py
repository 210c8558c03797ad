"""Plain data that graph and backends share: what is stored, and what is asked of a device.

Dimensions carry one set of names everywhere: tokens, seqs, hidden, heads, kv_heads, head_dim,
experts, top_k, inter, blocks, block_size, vocab, layers. Dtypes are NumPy names; ``bfloat16`` and
``float8_e4m3fn`` come from ml_dtypes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import ClassVar, Literal

import numpy as np

from step3_hetero.tensors import FP8_BLOCK as FP8_BLOCK
from step3_hetero.tensors import Cut as Cut
from step3_hetero.tensors import HostArray as HostArray
from step3_hetero.tensors import HostTensor as HostTensor
from step3_hetero.tensors import TensorSource as TensorSource

Scalar = int | float | bool | str

SCALED = ("float8_e4m3fn", "int8")
"""Formats of numbers that stand beside a float32 scale."""

INT8_OPS = ("linear", "experts")
"""Ops whose weights may be asked for as int8."""

LOGICAL_BLOCK = 128
"""Tokens in a logical KV block; a backend's physical block divides it."""


def wide(dtype: str) -> str:
    """Return the dtype in which sums over ``dtype`` are kept: float32, or float64 for float64.

    >>> wide("bfloat16"), wide("float64")
    ('float32', 'float64')
    """
    return "float64" if dtype == "float64" else "float32"


def itemsize(dtype: str) -> int:
    """Return the bytes of one element.

    >>> itemsize("bfloat16"), itemsize("float8_e4m3fn")
    (2, 1)
    """
    import ml_dtypes  # noqa: F401  registers bfloat16 and float8 under their names

    return int(np.dtype(dtype).itemsize)


def weight_bytes(elements: int, rows: int, dtype: str) -> int:
    """Return the bytes of weights held in ``dtype``; of int8 with a float32 scale for each row.

    >>> weight_bytes(6, 2, "bfloat16"), weight_bytes(6, 2, "int8")
    (12, 14)
    """
    scales = rows * itemsize("float32") if dtype == "int8" else 0
    return elements * itemsize(dtype) + scales


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """One tensor of an edge: dimensions by name, row-major."""

    name: str
    dims: tuple[str, ...]
    dtype: str


@dataclass(frozen=True, slots=True)
class OpSpec:
    """One op as a device is asked for it, before anything is opened.

    ``dims`` holds upper bounds by dimension name, ``parameters`` the op's keyword arguments.
    ``weight_format`` is the dtype to which weights are rounded before use, ``auto`` (or None) none
    but ``dtype``; how a device holds them beyond that is its own business. ``int8`` rounds weights
    and activations alike: see op linear. ``kv_format`` is the
    dtype of the KV cache that the op reads, None where it reads none.
    """

    op: str
    dtype: str
    dims: Mapping[str, int] = field(default_factory=dict)
    parameters: Mapping[str, Scalar] = field(default_factory=dict)
    weight_format: str | None = None
    kv_format: str | None = None

    def __str__(self) -> str:
        dims = ",".join(f"{k}={v}" for k, v in {**self.dims, **self.parameters}.items())
        return f"{self.op}[{self.dtype}{',' if dims else ''}{dims}]"


@dataclass(frozen=True, slots=True)
class CacheSpec:
    """The KV cache of one layer. ``blocks`` counts logical blocks of 128 tokens.

    ``dtype`` float8_e4m3fn or int8: every token's key, and its value, of each KV head is written as
    op quantise rounds a run, with one float32 scale of its own. The other dtypes round to nearest.
    """

    kv_heads: int
    head_dim: int
    blocks: int
    dtype: str

    @property
    def nbytes(self) -> int:
        """Return the bytes of keys and values together, their scales included."""
        head = self.head_dim * np.dtype(self.dtype).itemsize
        head += np.dtype(np.float32).itemsize if self.scaled else 0
        return self.blocks * LOGICAL_BLOCK * 2 * self.kv_heads * head

    @property
    def scaled(self) -> bool:
        """Say whether a scale stands beside each token's key and value."""
        return self.dtype in SCALED


@dataclass(frozen=True, slots=True)
class Limits:
    """Upper bounds of one micro-batch; buffers are sized by them once."""

    tokens: int
    seqs: int
    blocks_per_seq: int


@dataclass(frozen=True, slots=True)
class EmbedSpec:
    """Token rows, with image rows merged in. token_ids, [image_rows, image_index] -> x."""

    kind: ClassVar[Literal["embed"]] = "embed"
    dtype: str
    vocab: int
    hidden: int
    batch_invariant: bool = False

    def ops(self, weight_format: str) -> tuple[OpSpec, ...]:
        """Return the ops this stage is made of, for ``Backend.supports``."""
        dims = {"vocab": self.vocab, "hidden": self.hidden}
        return (
            OpSpec("embed", self.dtype, dims, weight_format="auto"),
            OpSpec("merge_rows", self.dtype, {"hidden": self.hidden}),
            OpSpec("concat", self.dtype, {"n": self.hidden}),
        )


@dataclass(frozen=True, slots=True)
class RouterSpec:
    """How an attention stage of a MoE layer chooses experts, and the dtype of its logits."""

    experts: int
    top_k: int
    renormalise: bool
    logits_dtype: str


@dataclass(frozen=True, slots=True)
class AttentionSpec:
    """MFA, the norms around it and, in a MoE layer, the router. x, [y] -> x, u, [weights, ids].

    ``adds``: the stage first adds y, the FFN output of the layer before; the first layer has none.
    ``kv_dtype`` is that of the cache, empty for ``dtype``.
    """

    kind: ClassVar[Literal["attention"]] = "attention"
    dtype: str
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    q_rank: int
    eps: float
    theta: float
    max_positions: int
    adds: bool
    router: RouterSpec | None = None
    batch_invariant: bool = False
    kv_dtype: str = ""

    def cache(self, blocks: int) -> CacheSpec:
        """Return the cache of this layer with so many logical blocks."""
        return CacheSpec(self.kv_heads, self.head_dim, blocks, self.kv_dtype or self.dtype)

    @property
    def scale(self) -> float:
        """Return the factor on q·k."""
        return float(self.head_dim**-0.5)

    @property
    def widths(self) -> tuple[int, int, int]:
        """Return the columns of q_low, k and v in the fused projection's output."""
        return self.q_rank, self.kv_heads * self.head_dim, self.kv_heads * self.head_dim

    def ops(self, weight_format: str) -> tuple[OpSpec, ...]:
        """Return the ops this stage is made of, for ``Backend.supports``."""
        heads = {"heads": self.heads, "kv_heads": self.kv_heads, "head_dim": self.head_dim}
        held = self.kv_dtype or self.dtype
        shapes = [
            (self.hidden, sum(self.widths)),
            (self.q_rank, self.heads * self.head_dim),
            (self.heads * self.head_dim, self.hidden),
        ]
        ops = [OpSpec("rms_norm", self.dtype, {"n": self.hidden}, {"eps": self.eps})]
        ops += [_linear(self.dtype, k, n, weight_format) for k, n in shapes]
        ops += [
            OpSpec("rope", self.dtype, heads, {"theta": self.theta}),
            OpSpec("attention", self.dtype, heads, {"scale": self.scale}, kv_format=held),
            OpSpec("add", self.dtype, {"hidden": self.hidden}),
        ]
        return (*ops, *self._router_ops())

    def _router_ops(self) -> tuple[OpSpec, ...]:
        r = self.router
        if r is None:
            return ()
        parameters: dict[str, Scalar] = {"top_k": r.top_k, "renormalise": r.renormalise}
        return (
            _linear(self.dtype, self.hidden, r.experts, "auto", out_dtype=r.logits_dtype),
            OpSpec("route", wide(self.dtype), {"experts": r.experts}, parameters),
            OpSpec("cast", wide(self.dtype), {}, {"dtype": self.dtype}),
        )


@dataclass(frozen=True, slots=True)
class FfnSpec:
    """One layer's FFN, stateless. u, [weights, ids] -> y. ``experts`` 0 is the dense SwiGLU.

    ``inter`` is the width of one expert (of the dense FFN when there are none), ``shared_inter``
    that of the shared expert.
    """

    kind: ClassVar[Literal["ffn"]] = "ffn"
    dtype: str
    hidden: int
    inter: int
    experts: int = 0
    top_k: int = 0
    shared_inter: int = 0
    batch_invariant: bool = False

    def ops(self, weight_format: str) -> tuple[OpSpec, ...]:
        """Return the ops this stage is made of, for ``Backend.supports``."""
        width = self.shared_inter if self.experts else self.inter
        ops = (
            _linear(self.dtype, self.hidden, 2 * width, weight_format),
            OpSpec("swiglu", self.dtype, {"inter": width}),
            _linear(self.dtype, width, self.hidden, weight_format),
        )
        if not self.experts:
            return ops
        dims = {"experts": self.experts, "top_k": self.top_k, "hidden": self.hidden}
        dims["inter"] = self.inter
        experts = OpSpec("experts", self.dtype, dims, weight_format=weight_format)
        return (*ops, experts, OpSpec("add", self.dtype, {"hidden": self.hidden}))


@dataclass(frozen=True, slots=True)
class HeadSpec:
    """Final norm and lm_head on the selected rows. x, y, rows -> logits (float32 or float64)."""

    kind: ClassVar[Literal["head"]] = "head"
    dtype: str
    hidden: int
    vocab: int
    eps: float
    batch_invariant: bool = False

    def ops(self, weight_format: str) -> tuple[OpSpec, ...]:
        """Return the ops this stage is made of, for ``Backend.supports``."""
        return (
            OpSpec("add", self.dtype, {"hidden": self.hidden}),
            OpSpec("select_rows", self.dtype, {"n": self.hidden}),
            OpSpec("rms_norm", self.dtype, {"n": self.hidden}, {"eps": self.eps}),
            _linear(self.dtype, self.hidden, self.vocab, "auto"),
            OpSpec("cast", self.dtype, {}, {"dtype": wide(self.dtype)}),
            OpSpec("sample", wide(self.dtype), {"vocab": self.vocab}, {"banned": -1}),
        )


@dataclass(frozen=True, slots=True)
class VisionSpec:
    """The vision tower, both downsamplers and the projector. pixels -> rows."""

    kind: ClassVar[Literal["vision"]] = "vision"
    dtype: str
    channels: int
    width: int
    layers: int
    heads: int
    inter: int
    patch: int
    image_size: int
    down_width: int
    hidden: int
    stride: int
    eps: float
    batch_invariant: bool = False

    @property
    def head_dim(self) -> int:
        """Return the columns of one head."""
        return self.width // self.heads

    def ops(self, weight_format: str) -> tuple[OpSpec, ...]:
        """Return the ops this stage is made of, for ``Backend.supports``."""
        shapes = [(self.width, 3 * self.width), (self.width, self.width)]
        shapes += [(self.width, self.inter), (self.inter, self.width)]
        heads = {"heads": self.heads, "head_dim": self.head_dim}
        grid = self.image_size // self.patch
        return (
            self._conv(self.channels, self.width, self.patch, self.patch, 0),
            self._conv(self.width, self.down_width, 2, 2, 0),
            self._conv(self.down_width, 2 * self.down_width, 3, self.stride, 1),
            OpSpec("resize", self.dtype, {"n": self.width}, {"size": grid}),
            OpSpec("cast", wide(self.dtype), {}, {"dtype": self.dtype}),
            OpSpec("concat", self.dtype, {"n": self.width}),
            *(_linear(self.dtype, k, n, "auto") for k, n in shapes),
            OpSpec("self_attention", self.dtype, heads, {"scale": float(self.head_dim**-0.5)}),
            OpSpec("layer_norm", self.dtype, {"n": self.width}, {"eps": self.eps}),
            OpSpec("quick_gelu", self.dtype, {"n": self.inter}),
            OpSpec("add", self.dtype, {"hidden": self.width}),
            _linear(self.dtype, 2 * self.down_width, self.hidden, "auto"),
        )

    def _conv(self, channels: int, out: int, kernel: int, stride: int, padding: int) -> OpSpec:
        dims = {"in": channels, "out": out, "kernel": kernel}
        return OpSpec(
            "conv2d", self.dtype, dims, {"stride": stride, "padding": padding}, weight_format="auto"
        )


StageSpec = EmbedSpec | VisionSpec | AttentionSpec | FfnSpec | HeadSpec

SPEC_OF_KIND: Mapping[str, type[StageSpec]] = MappingProxyType(
    {s.kind: s for s in (EmbedSpec, VisionSpec, AttentionSpec, FfnSpec, HeadSpec)}
)


def _linear(
    dtype: str, columns: int, rows: int, weight_format: str, out_dtype: str | None = None
) -> OpSpec:
    parameters: dict[str, Scalar] = {"out_dtype": out_dtype or dtype}
    dims = {"in": columns, "out": rows}
    return OpSpec("linear", dtype, dims, parameters, weight_format=weight_format)
