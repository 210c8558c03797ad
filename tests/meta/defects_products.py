"""Defects of the ops with weights: linear, experts, the router and conv2d; and of sampling."""

import numpy as np

from meta.twin import Defect, kernel, wrapped
from step3_hetero.backends.reference import linear
from step3_hetero.backends.reference.arrays import dtype_of, widen
from step3_hetero.backends.reference.device import KERNELS
from step3_hetero.backends.reference.moe import sigmoid, swiglu
from step3_hetero.backends.reference.quant import dequantise_blocks
from step3_hetero.specs import HostTensor


def prepared(op, what, change):
    """Return the defect of ``prepare``: ``change`` gets each tensor of ``op`` by name."""

    def plant(device):
        def prepare(asked, tensors, spec):
            if asked == op:
                tensors = {name: change(t) for name, t in tensors.items()}
            return linear.widen_tensors(tensors, spec.dtype, spec.weight_format)

        device.prepare = prepare

    return Defect(op, what, plant)


def spread(scale, rows, columns, block=128):
    """Return one scale for each element of a weight."""
    wide = np.repeat(scale, block, axis=-2)[..., :rows, :]
    return np.repeat(wide, block, axis=-1)[..., :columns]


def wrongly_scaled(scales):
    """Return a change of a block-FP8 tensor: its data times what ``scales`` makes of its scales."""

    def change(t):
        if t.scale_inv is None:
            return t
        return HostTensor(t.name, t.data.astype(np.float32) * scales(t.scale_inv, *t.shape[-2:]))

    return change


def transposed(scale, rows, columns):
    turned = np.swapaxes(scale, -1, -2)
    padded = np.pad(turned, [(0, 0)] * (scale.ndim - 2) + [(0, 9), (0, 9)], mode="edge")
    return spread(padded, rows, columns)


def last_full_block_only(scale, rows, columns):
    every = spread(scale, rows, columns)
    every[..., columns - columns % 128 :] = 1
    return every


def edge_one_late(scale, rows, columns):
    every = spread(scale, rows, columns)
    return np.concatenate([every[..., :1], every[..., :-1]], axis=-1)


def rounded_twice(t):
    """Round scales to bfloat16 before the product, which is rounded again."""
    if t.scale_inv is None:
        return t
    scale = t.scale_inv.astype(dtype_of("bfloat16")).astype(np.float32)
    return HostTensor(t.name, t.data, scale)


def weights_in_bfloat16(t):
    return HostTensor(t.name, dequantise_blocks(t).astype(dtype_of("bfloat16")))


def matrices_reversed(x, weights, *, out_dtype=None):
    parts = dict(reversed(list(weights.parts.items())))
    return KERNELS["linear"](x, _with(weights, parts), out_dtype=out_dtype)


def without_bias(x, weights, *, out_dtype=None):
    parts = {n: part for n, part in weights.parts.items() if n != "bias"}
    return KERNELS["linear"](x, _with(weights, parts), out_dtype=out_dtype)


def multiples_of_eight(x, weights, *, out_dtype=None):
    whole = x.shape[-1] // 8 * 8
    parts = {n: p if n == "bias" else p[:, :whole] for n, p in weights.parts.items()}
    return KERNELS["linear"](x[:, :whole], _with(weights, parts), out_dtype=out_dtype)


def logits_rounded(x, weights, *, out_dtype=None):
    out = KERNELS["linear"](x, weights)
    return out.astype(dtype_of(out_dtype)) if out_dtype else out


def clipped_products(x, weights, *, out_dtype=None):
    out = KERNELS["linear"](x, weights, out_dtype=out_dtype)
    return np.clip(widen(out), -3e38, 3e38).astype(out.dtype)


def partial_sums_rounded(x, weights, *, out_dtype=None):
    """Add up 64 columns at a time and keep the sums in bfloat16."""
    total = 0
    for start in range(0, x.shape[-1], 64):
        k = slice(start, start + 64)
        parts = {n: p[:, k] for n, p in weights.parts.items() if n != "bias"}
        part = KERNELS["linear"](x[:, k], _with(weights, parts), out_dtype="float32")
        total = (total + part).astype(dtype_of("bfloat16")).astype(np.float32)
    total = total + weights.parts.get("bias", 0)
    return total.astype(dtype_of(out_dtype) if out_dtype else x.dtype)


def _with(weights, parts):
    return linear.ReferenceWeights(parts, weights.dtype, weights.source, weights.method)


LINEAR = (
    prepared("linear", "transposed block scales", wrongly_scaled(transposed)),
    prepared("linear", "columns beyond the last full block unscaled",
             wrongly_scaled(last_full_block_only)),
    prepared("linear", "block edge off by one", wrongly_scaled(edge_one_late)),
    prepared("linear", "block scales applied twice",
             wrongly_scaled(lambda scale, *shape: spread(scale * scale, *shape))),
    prepared("linear", "weights rounded twice", rounded_twice),
    prepared("linear", "weights rounded to bfloat16 for float32", weights_in_bfloat16),
    kernel("linear", "matrices in another order", matrices_reversed),
    kernel("linear", "bias forgotten", without_bias),
    kernel("linear", "columns beyond a multiple of eight left out", multiples_of_eight),
    kernel("linear", "router logits rounded on the way", logits_rounded),
    kernel("linear", "partial sums rounded to bfloat16", partial_sums_rounded),
)  # fmt: skip


def with_stack(change):
    """Return an experts kernel whose stack goes through ``change``, by name."""

    def experts(u, weights, ids, stack):
        return KERNELS["experts"](u, weights, ids, _with(stack, change(stack.parts)))

    return experts


def minus_one_as_the_last(u, weights, ids, stack):
    last = np.int32(len(stack.parts["gate"]) - 1)
    return KERNELS["experts"](u, weights, np.where(ids < 0, last, ids), stack)


def capacity_of_sixteen(u, weights, ids, stack):
    """Drop what an expert gets beyond its first 16 tokens, as a static buffer would."""
    kept = ids.copy()
    for expert in np.unique(ids[ids >= 0]):
        tokens, column = np.nonzero(ids == expert)
        kept[tokens[16:], column[16:]] = -1
    return KERNELS["experts"](u, weights, kept, stack)


def summed_in_t(u, weights, ids, stack):
    """Round the weighted sum after each expert."""
    total = np.zeros(u.shape, u.dtype)
    for place in range(ids.shape[1]):
        column = slice(place, place + 1)
        total += KERNELS["experts"](u, weights[:, column], ids[:, column], stack)
    return total


def weights_before_down(u, weights, ids, stack):
    """Weigh the inner activations and round them: the sum is the same but for rounding."""
    out = np.zeros(u.shape, np.float32)
    for t, place in np.argwhere(ids >= 0):
        gate, up, down = (stack.parts[n][ids[t, place]] for n in ("gate", "up", "down"))
        both = np.concatenate([gate @ widen(u[t]), up @ widen(u[t])]).astype(u.dtype)
        inner = swiglu(both[None])[0] * weights[t, place]
        out[t] += down @ widen(inner)
    return out.astype(u.dtype)


EXPERTS = (
    kernel("experts", "each expert's weights one place on",
           with_stack(lambda p: {n: np.roll(part, 1, axis=0) for n, part in p.items()})),
    kernel("experts", "gate and up swapped",
           with_stack(lambda p: {**p, "gate": p["up"], "up": p["gate"]})),
    kernel("experts", "id -1 taken for the last expert", minus_one_as_the_last),
    kernel("experts", "tokens beyond an expert's capacity dropped", capacity_of_sixteen),
    kernel("experts", "routing weights in another order",
           lambda u, w, ids, stack: KERNELS["experts"](u, w[:, ::-1], ids, stack)),
    kernel("experts", "first choice only",
           lambda u, w, ids, stack: KERNELS["experts"](u, w[:, :1], ids[:, :1], stack)),
    prepared("experts", "transposed block scales", wrongly_scaled(transposed)),
    prepared("experts", "columns beyond the last full block unscaled",
             wrongly_scaled(last_full_block_only)),
)  # fmt: skip


def sigmoid_router(logits, *, top_k, renormalise):
    p = sigmoid(logits)
    ids = np.argsort(-p, axis=-1, kind="stable")[:, :top_k].astype(np.int32)
    weights = np.take_along_axis(p, ids, axis=-1)
    return weights / weights.sum(-1, keepdims=True) if renormalise else weights, ids


def ties_to_the_higher(logits, *, top_k, renormalise):
    weights, ids = KERNELS["route"](logits[:, ::-1], top_k=top_k, renormalise=renormalise)
    return weights, np.int32(logits.shape[-1] - 1) - ids


def rising(logits, *, top_k, renormalise):
    weights, ids = KERNELS["route"](logits, top_k=top_k, renormalise=renormalise)
    return weights[:, ::-1].copy(), ids[:, ::-1].copy()


ROUTE = (
    kernel("route", "renormalised always",
           lambda x, *, top_k, renormalise: KERNELS["route"](x, top_k=top_k, renormalise=True)),
    kernel("route", "never renormalised",
           lambda x, *, top_k, renormalise: KERNELS["route"](x, top_k=top_k, renormalise=False)),
    kernel("route", "sigmoid for softmax", sigmoid_router),
    kernel("route", "ties to the higher expert", ties_to_the_higher),
    kernel("route", "smallest first", rising),
)  # fmt: skip


def sampled(change):
    """Return a sample kernel whose operands go through ``change``."""

    def sample(logits, temperature, top_k, top_p, uniform, *, banned=-1):
        given = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "banned": banned}
        given |= change(given)
        return KERNELS["sample"](logits, given["temperature"], given["top_k"], given["top_p"],
                                 uniform, banned=given["banned"])  # fmt: skip

    return sample


def ties_to_the_last(logits, temperature, top_k, top_p, uniform, *, banned=-1):
    ids = KERNELS["sample"](logits, temperature, top_k, top_p, uniform, banned=banned)
    allowed = logits.copy()
    allowed[:, banned if banned >= 0 else slice(0, 0)] = -np.inf
    last = logits.shape[1] - 1 - allowed[:, ::-1].argmax(1)
    return np.where(temperature == 0, last, ids).astype(np.int32)


SAMPLE = (
    kernel("sample", "top-k off by one", sampled(lambda g: {"top_k": g["top_k"] // 20 * 19})),
    kernel("sample", "top-p ignored", sampled(lambda g: {"top_p": g["top_p"] * 0 + 1})),
    kernel("sample", "temperature ignored",
           sampled(lambda g: {"temperature": g["temperature"] > 0})),
    kernel("sample", "banned id chosen", sampled(lambda g: {"banned": -1})),
    kernel("sample", "ties to the highest id", ties_to_the_last),
)  # fmt: skip


def flipped(x, weights, *, stride, padding):
    parts = {**weights.parts, "weight": weights.parts["weight"][:, :, ::-1, ::-1]}
    return KERNELS["conv2d"](x, _with(weights, parts), stride=stride, padding=padding)


def padded_behind_only(x, weights, *, stride, padding):
    wide = np.pad(x, ((0, 0), (0, 2 * padding), (0, 2 * padding), (0, 0)))
    return KERNELS["conv2d"](wide, weights, stride=stride, padding=0)


def nearest(x, *, size):
    """Return the nearest samples: what a resize gives that looks at no neighbours."""
    at = ((np.arange(size) + 0.5) * len(x) / size).astype(int)
    return widen(x)[at][:, at]


VISION = (
    kernel("conv2d", "convolution for cross-correlation", flipped),
    kernel("conv2d", "padding behind the image only", padded_behind_only),
    kernel("resize", "nearest samples, no antialias", nearest),
    wrapped("resize", "rounded to the activation's dtype",
            lambda out: out.astype(dtype_of("bfloat16")).astype(np.float32)),
)  # fmt: skip


DEFECTS = (*LINEAR, *EXPERTS, *ROUTE, *SAMPLE, *VISION)
