"""Norms, rotation, activation, quantised products as the vendor documents them.

Source: ``_op_plugin_docs.py`` in the wheel that schemas.json names, entries of the same names;
npu_add_rms_norm, which has none there: CANN's aclnnAddRmsNorm. Assumed wherever the documents name
no rounding: computed in float32 and rounded once.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from .checks import (
    CODES,
    REAL,
    require,
    require_contiguous,
    require_default,
    require_dtype,
    require_some,
)


def rms_norm(x: Tensor, gamma: Tensor, epsilon: float = 1e-6) -> tuple[Tensor, Tensor]:
    """x / rms(x), rounded, times gamma, rounded again; and 1 / rms(x).

    The documents name no rounding; CANN's published bfloat16 kernels of this family round twice.
    """
    op = "npu_rms_norm"
    require_some(op, x=x)
    require_dtype(op, "x", x, REAL)
    require(op, 2 <= x.dim() <= 8, f"{x.dim()} axes; documented: 2 to 8")
    require(op, gamma.dtype == x.dtype, f"gamma is {gamma.dtype}, x {x.dtype}")
    require(op, gamma.shape == x.shape[-1:], f"gamma {gamma.shape} for rows of {x.shape[-1]}")
    wide = x.float()
    rstd = torch.rsqrt(wide.square().mean(-1, keepdim=True) + epsilon)
    return (wide * rstd).to(x.dtype) * gamma, rstd


def add_rms_norm(
    x1: Tensor, x2: Tensor, gamma: Tensor, epsilon: float = 1e-6
) -> tuple[Tensor, Tensor, Tensor]:
    """rms_norm of x1 + x2, and the sum. Assumed: the norm is that of the rounded sum."""
    op = "npu_add_rms_norm"
    require(op, x1.shape == x2.shape and x1.dtype == x2.dtype, "x1 and x2 differ")
    x = (x1.float() + x2.float()).to(x1.dtype)
    y, rstd = rms_norm(x, gamma, epsilon)
    return y, rstd, x


def rotary_mul(
    x: Tensor, r1: Tensor, r2: Tensor, rotary_mode: str = "half", rotate: Tensor | None = None
) -> Tensor:
    """r1 · x + r2 · (-second half, first half). Shapes: x (B, S, N, D), r1, r2 broadcast over N."""
    op = "npu_rotary_mul"
    require_some(op, x=x)
    require(op, rotary_mode == "half" and rotate is None, "only the half mode is implemented here")
    for name, a in (("x", x), ("r1", r1), ("r2", r2)):
        require_dtype(op, name, a, REAL)
        require(op, a.dim() == 4, f"{name} has {a.dim()} axes, not 4")
    require(op, x.dtype == r1.dtype == r2.dtype, "x, r1 and r2 differ in dtype")
    b, s, n, d = x.shape
    require(op, d < 896 and d % 2 == 0, f"head dim {d}: even and under 896")
    require(op, b < 1000 and n < 1000, f"{b} and {n}: B and N lie under 1000")
    for r in (r1, r2):
        require(op, tuple(r.shape) in ((1, s, 1, d), (b, s, 1, d), (b, s, n, d)), f"r {r.shape}")
    w = x.float()
    first, second = w.chunk(2, -1)
    return (r1.float() * w + r2.float() * torch.cat((-second, first), -1)).to(x.dtype)


def apply_rotary_pos_emb(
    query: Tensor, key: Tensor, cos: Tensor, sin: Tensor, layout: str = "BSND",
    rotary_mode: str = "half",
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Refuse what the documents refuse: head dims other than 64 and 128."""
    op = "npu_apply_rotary_pos_emb"
    require(op, query.shape[-1] in (64, 128), f"head dim {query.shape[-1]}: 64 or 128")
    raise RuntimeError(f"{op}: no implementation in the stand-in")


def swiglu(x: Tensor, dim: int = -1) -> Tensor:
    """silu(a) · b of the two halves."""
    op = "npu_swiglu"
    require_some(op, x=x)
    require_dtype(op, "x", x, REAL)
    require(op, 1 <= x.dim() <= 8 and x.shape[dim] % 2 == 0, f"{tuple(x.shape)} has no halves")
    a, b = x.float().chunk(2, dim)
    return (torch.nn.functional.silu(a) * b).to(x.dtype)


def dynamic_quant(
    x: Tensor, *, smooth_scales: Tensor | None = None, group_index: Tensor | None = None,
    dst_type: int | None = None, quant_mode: str = "pertoken", dst_type_max: float = 0.0,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """round(x / scale) as int8, scale = largest magnitude of the row / 127.

    Assumed: to nearest, ties to even; a row of zeros stays zero.
    """
    op = "npu_dynamic_quant"
    require_some(op, x=x)
    require_dtype(op, "x", x, (torch.float16, torch.bfloat16))
    plain = smooth_scales is None and group_index is None and quant_mode == "pertoken"
    require(op, plain and x.dim() > 1, "only rows without smoothing are implemented here")
    require(op, dst_type in (None, 1), f"dst_type {dst_type}")
    wide = x.float()
    scale = wide.abs().amax(-1) / 127
    safe = torch.where(scale == 0, 1.0, scale)
    return (wide / safe[..., None]).round().to(torch.int8), scale


def quant_matmul(
    x1: Tensor,
    x2: Tensor,
    scale: Tensor,
    *,
    pertoken_scale: Tensor | None = None,
    output_dtype: int | None = None,
    **rest: Any,
) -> Tensor:
    """(x1 · x2) · scale · pertoken_scale. Shapes: x1 (m, k), x2 (k, n), scale (n,)."""
    op = "npu_quant_matmul"
    require_default(op, rest, {})
    require_some(op, x1=x1, x2=x2)
    for name, x in (("x1", x1), ("x2", x2)):
        require_dtype(op, name, x, (torch.int8,))
        require(op, x.dim() == 2 and x.shape[-1] <= 65535, f"{name} {tuple(x.shape)}")
    require_dtype(op, "scale", scale, (torch.float32, torch.bfloat16))
    require(op, scale.shape in (x2.shape[1:], (1,)), f"scale {tuple(scale.shape)}")
    assert pertoken_scale is not None
    require_dtype(op, "pertoken_scale", pertoken_scale, (torch.float32,))
    require(op, pertoken_scale.shape == x1.shape[:1], f"{tuple(pertoken_scale.shape)}")
    target = CODES.get(output_dtype or 1)
    require(op, target in (torch.bfloat16, torch.float16), f"output_dtype {output_dtype}")
    product = x1.double() @ x2.double()
    assert target is not None
    return (product.float() * scale.float() * pertoken_scale[:, None]).to(target)


def convolution(
    x: Tensor, weight: Tensor, bias: Tensor | None, stride: Sequence[int], padding: Sequence[int],
    dilation: Sequence[int], transposed: bool, output_padding: Sequence[int], groups: int,
) -> Tensor:  # fmt: skip
    """torch's own convolution; in HF32, with 11 bits after the point, while that is allowed."""
    require_contiguous("convolution", weight=weight)
    if torch.npu.conv.allow_hf32 and x.dtype == torch.float32:  # type: ignore[attr-defined]
        x, weight = (
            a.view(torch.int32).bitwise_and(-4096).view(torch.float32) for a in (x, weight)
        )
    return torch.convolution(
        x, weight, bias, stride, padding, dilation, transposed, output_padding, groups
    )


OPS: Mapping[str, Any] = {
    "npu_add_rms_norm": add_rms_norm,
    "npu_apply_rotary_pos_emb": apply_rotary_pos_emb,
    "npu_dynamic_quant": dynamic_quant,
    "npu_quant_matmul": quant_matmul,
    "npu_rms_norm": rms_norm,
    "npu_rotary_mul": rotary_mul,
    "npu_swiglu": swiglu,
}
