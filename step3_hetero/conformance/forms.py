"""How the inputs of each op are drawn, and how the op is called on a device."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any

import numpy as np

from step3_hetero.backend import Array, Device, KVCache, Weights
from step3_hetero.conformance.case import Case, Inputs
from step3_hetero.conformance.draws import DRAWS, dtype_of, filling, lay_out, weight
from step3_hetero.conformance.forms_choice import draw_experts, draw_route, draw_sample
from step3_hetero.conformance.last import Last
from step3_hetero.conformance.scores import score_slack
from step3_hetero.conformance.trial import Expected, Results, expected_by_runs
from step3_hetero.ops import OPS
from step3_hetero.specs import SCALED, CacheSpec, HostArray, OpSpec, Scalar

Rng = np.random.Generator

PREPARED = Last()


@dataclass
class Placed:
    """A case's inputs in a device's memory."""

    arrays: dict[str, Array]
    weights: Weights | None = None
    cache: KVCache | None = None
    batch: Any = None


@dataclass(frozen=True)
class Form:
    """One op's way of being tried.

    ``rows`` are the inputs that have one row for each row of the results, if rows are independent;
    ``slack`` says what a row of a result may err by beside the reference's own rounding.
    """

    draw: Callable[[Case, Rng], Inputs]
    call: Callable[[Device, Case, Placed], tuple[Array, ...]]
    outputs: tuple[str, ...] = ("out",)
    rows: tuple[str, ...] = ()
    slack: Callable[[Case, Inputs, Expected], Results] | None = None


def place(device: Device, case: Case, inputs: Inputs, dtype: str) -> Placed:
    """Bring inputs into a device's memory, weights through ``prepare``, the cache filled."""
    placed = Placed({name: device.from_host(x) for name, x in inputs.arrays.items()})
    if inputs.weights:
        parameters = dict(case.parameters)
        if "out_dtype" in parameters and dtype == "float64":
            parameters["out_dtype"] = "float64"
        spec = OpSpec(case.op, dtype, {}, parameters, weight_format=case.held or "auto")
        placed.weights = PREPARED.get(
            device, (case.id, dtype), lambda: device.prepare(case.op, inputs.weights, spec)
        )
    if inputs.history is not None:
        k, v = inputs.history
        placed.cache = fill_cache(device, k, v, case.kv or dtype)
    if inputs.meta is not None:
        placed.batch = device.batch(inputs.meta)
    return placed


def fill_cache(device: Device, k: HostArray, v: HostArray, dtype: str) -> KVCache:
    """Open a cache in ``dtype`` that holds keys and values (blocks, 128, kv_heads, head_dim)."""
    blocks, _, kv_heads, head_dim = k.shape
    cache = device.open_cache(CacheSpec(kv_heads, head_dim, blocks, dtype))
    keys, values = (device.from_host(x.reshape(-1, kv_heads, head_dim)) for x in (k, v))
    cache.write(keys, values, device.batch(filling(blocks)))
    return cache


def call_plain(device: Device, case: Case, placed: Placed) -> tuple[Array, ...]:
    """Call the kernel: arrays by position, weights last, parameters by keyword."""
    weights = [] if placed.weights is None else [placed.weights]
    result = device.kernel(case.op)(*placed.arrays.values(), *weights, **case.parameters)
    return result if isinstance(result, tuple) else (result,)


def call_attention(device: Device, case: Case, placed: Placed) -> tuple[Array, ...]:
    """Write the batch's keys, then attend."""
    assert placed.cache is not None
    a = placed.arrays
    placed.cache.write(a["k"], a["v"], placed.batch)
    kernel = device.kernel("attention")
    return (kernel(a["q"], placed.cache, placed.batch, **case.parameters),)


def slack_attention(case: Case, inputs: Inputs, expected: Expected) -> Results:
    """Let a row err by one score's rounding; in bfloat16 its own rounding hides that."""
    if case.dtype != "float32":
        return {}
    assert inputs.meta is not None
    cache = expected.cache_want["k"], expected.cache_want["v"]
    scale, scaled = float(case.parameters["scale"]), case.kv in SCALED
    return {"out": score_slack(inputs.arrays["q"], cache, inputs.meta, scale, scaled=scaled)}


def call_cache(device: Device, case: Case, placed: Placed) -> tuple[Array, ...]:
    """Write rows at their slots, copy one block after another; read all blocks, some, and none."""
    cache = placed.cache
    assert cache is not None
    cache.write(placed.arrays["k"], placed.arrays["v"], placed.batch)
    blocks = case.size("blocks")
    cache.copy_blocks([(0, 1), (1, 2)])
    some = [blocks - 1, 0, blocks - 1]
    parts = (cache.read(chosen) for chosen in (range(blocks), some, []))
    return tuple(x for part in parts for x in part)


def draw_rows(*names: str, columns: str, vectors: tuple[str, ...] = (), factor: int = 1) -> Any:
    """Return a draw of matrices (tokens, columns) and of scale vectors (columns,)."""

    def draw(case: Case, rng: Rng) -> Inputs:
        shape = (case.size("tokens"), case.size(columns) * factor)
        arrays = {n: DRAWS[case.draw](rng, shape) for n in names}
        arrays |= {n: 0.5 + rng.random(shape[-1:]) for n in vectors}
        return Inputs({n: x.astype(dtype_of(case.dtype)) for n, x in arrays.items()})

    return draw


def draw_linear(case: Case, rng: Rng) -> Inputs:
    """x (tokens, in); one matrix for each size of ``out``; a bias where the draw asks for it.

    ``overflow`` leaves one value a row, 3e38 in every other, and weights of about ten: single
    products beyond float32, infinite whatever the order of summation.
    """
    name = "normal" if case.draw == "biased" else case.draw
    shape = (case.size("tokens"), case.size("in"))
    x = _lone(rng, shape) if name == "overflow" else DRAWS[name](rng, shape)
    gain = 10 * shape[1] ** 0.5 if name == "overflow" else 1.0
    weights = {
        f"w{i}": weight(rng, (out, shape[1]), case.dtype, case.stored, f"w{i}", gain=gain)
        for i, out in enumerate(case.sizes("out"))
    }
    if case.draw == "biased":
        weights["bias"] = weight(rng, (sum(case.sizes("out")),), case.dtype, "", "bias")
    return Inputs({"x": x.astype(dtype_of(case.dtype))}, weights)


def _lone(rng: Rng, shape: tuple[int, int]) -> HostArray:
    """Return rows that are zero but for one value: 3e38 in every other row, 1 in the rest."""
    x = np.zeros(shape)
    x[np.arange(shape[0]), rng.integers(0, shape[1], shape[0])] = np.where(
        np.arange(shape[0]) % 2 == 0, 3e38, 1.0
    )
    return x


def draw_embed(case: Case, rng: Rng) -> Inputs:
    """Ids that repeat, the first and the last row of the table among them."""
    vocab, tokens = case.size("vocab"), case.size("tokens")
    ids = rng.integers(0, vocab, tokens).astype(np.int32)
    ids[:2] = [0, vocab - 1][: len(ids)]
    table = weight(rng, (vocab, case.size("hidden")), case.dtype, case.stored, "table")
    return Inputs({"ids": ids}, {"table": table})


def draw_merge(case: Case, rng: Rng) -> Inputs:
    """Image rows whose places are shuffled; every third is skipped."""
    tokens, n, hidden = (case.size(d) for d in ("tokens", "rows", "hidden"))
    x, rows = (normal_of(rng, (k, hidden), case.dtype) for k in (tokens, n))
    index = rng.permutation(tokens)[:n].astype(np.int32)
    index[::3] = -1
    return Inputs({"x": x, "rows": rows, "index": index})


def draw_select(case: Case, rng: Rng) -> Inputs:
    """Rows in any order, some twice."""
    tokens, rows = case.size("tokens"), case.size("rows")
    x = normal_of(rng, (tokens, case.size("n")), case.dtype)
    return Inputs({"x": x, "rows": rng.integers(0, tokens, rows).astype(np.int32)})


def draw_concat(case: Case, rng: Rng) -> Inputs:
    """Arrays of different lengths, an empty one among them."""
    lengths = case.sizes("rows")
    return Inputs({
        f"x{i}": normal_of(rng, (n, case.size("n")), case.dtype)
        for i, n in enumerate(lengths)
    })  # fmt: skip


def draw_rope(case: Case, rng: Rng) -> Inputs:
    """Positions to the end of the context, the first and the last among them."""
    tokens, last = case.size("tokens"), case.size("last")
    positions = rng.integers(0, last + 1, tokens).astype(np.int32)
    positions[:2] = [last, 0][: len(positions)]
    shape = (tokens, case.size("heads"), case.size("head_dim"))
    x = DRAWS[case.draw](rng, shape).astype(dtype_of(case.dtype))
    return Inputs({"x": x, "positions": positions})


def draw_attention(case: Case, rng: Rng) -> Inputs:
    """q, k, v of the new tokens over a full cache whose other blocks must stay as they are.

    ``focused`` makes the first key of each sequence take most of every query's weight, ``large``
    the scores of all keys differ by hundreds.
    """
    meta = lay_out(rng, case.sizes("queries"), case.sizes("contexts"), case.size("blocks"),
                   case.size("padding"))  # fmt: skip
    heads, kv, d = (case.size(n) for n in ("heads", "kv_heads", "head_dim"))
    shape = (case.size("blocks"), 128, kv, d)
    k, v = (normal_of(rng, shape, case.dtype) for _ in range(2))
    q = DRAWS["large" if case.draw == "large" else "normal"](rng, (meta.tokens, heads, d))
    if case.draw == "focused":
        q += 3  # every query shares a direction, along which the first key is long enough
        weight_of_rest = np.log(meta.context_lens) + 5
        reach = weight_of_rest / (2 * d * float(case.parameters["scale"]))
        k[meta.block_tables[:, 0], 0] = reach[:, None, None].astype(k.dtype)
    new = {n: normal_of(rng, (meta.tokens, kv, d), case.dtype) for n in ("k", "v")}
    return Inputs({"q": q.astype(dtype_of(case.dtype)), **new}, {}, (k, v), meta)


def draw_cache(case: Case, rng: Rng) -> Inputs:
    """Rows for shuffled slots of a full cache; every fourth row writes nothing."""
    blocks, kv, d = (case.size(n) for n in ("blocks", "kv_heads", "head_dim"))
    tokens = case.size("tokens")
    slots = rng.permutation(blocks * 128)[:tokens].astype(np.int32)
    meta = filling(blocks)
    slots[::4] = -1
    ends = np.array([0, tokens], np.int32)
    meta = type(meta)(np.arange(tokens, dtype=np.int32), slots, ends, ends[1:], meta.block_tables)
    drawn = DRAWS[case.draw]
    history = tuple(normal_of(rng, (blocks, 128, kv, d), case.dtype) for _ in range(2))
    new = {n: drawn(rng, (tokens, kv, d)).astype(dtype_of(case.dtype)) for n in ("k", "v")}
    return Inputs(new, {}, (history[0], history[1]), meta)


def draw_self_attention(case: Case, rng: Rng) -> Inputs:
    """q, k, v of whole images."""
    shape = tuple(case.size(n) for n in ("images", "tokens", "heads", "head_dim"))
    return Inputs({n: normal_of(rng, shape, case.dtype) for n in ("q", "k", "v")})


def draw_conv2d(case: Case, rng: Rng) -> Inputs:
    """Images, channels last, kernels and bias."""
    channels, out, k = (case.size(n) for n in ("in", "out", "kernel"))
    shape = (case.size("images"), case.size("height"), case.size("width"), channels)
    x = normal_of(rng, shape, case.dtype)
    kernel = weight(rng, (out, channels, k, k), case.dtype, "", "weight")
    bias = weight(rng, (out,), case.dtype, "", "bias")
    return Inputs({"x": x}, {"weight": kernel, "bias": bias})


def draw_resize(case: Case, rng: Rng) -> Inputs:
    """One square of rows."""
    side = case.size("side")
    return Inputs({"x": normal_of(rng, (side, side, case.size("n")), case.dtype)})


def draw_dequantise(case: Case, rng: Rng) -> Inputs:
    """Codes over their whole range, -128 of int8 too, and scales of all sizes."""
    shape = (case.size("tokens"), case.size("n"))
    codes = rng.standard_normal(shape) * 60
    q = np.clip(np.rint(codes), -128, 127) if case.stored == "int8" else np.clip(codes, -448, 448)
    scale = 10.0 ** rng.uniform(-4, 4, (shape[0], -(-shape[1] // 128)))
    return Inputs({"q": q.astype(dtype_of(case.stored)), "scale": scale.astype(np.float32)})


def normal_of(rng: Rng, shape: tuple[int, ...], dtype: str) -> HostArray:
    """Draw standard normal values in ``dtype``."""
    return rng.standard_normal(shape, dtype=np.float32).astype(dtype_of(dtype))


DRAWN_ROWS = ("logits", "temperature", "top_k", "top_p", "uniform")

FORMS: Mapping[str, Form] = MappingProxyType({
    "add": Form(draw_rows("x", "y", columns="hidden"), call_plain, rows=("x", "y")),
    "attention": Form(
        draw_attention, call_attention, rows=("q", "k", "v"), slack=slack_attention
    ),
    "cast": Form(draw_rows("x", columns="n"), call_plain, rows=("x",)),
    "concat": Form(draw_concat, call_plain),
    "conv2d": Form(draw_conv2d, call_plain, rows=("x",)),
    "dequantise": Form(draw_dequantise, call_plain, rows=("q", "scale")),
    "embed": Form(draw_embed, call_plain, rows=("ids",)),
    "experts": Form(draw_experts, call_plain, rows=("u", "weights", "ids")),
    "kv_cache": Form(
        draw_cache, call_cache, ("k", "v", "some k", "some v", "no k", "no v")
    ),
    "layer_norm": Form(
        draw_rows("x", columns="n", vectors=("weight", "bias")), call_plain, rows=("x",)
    ),
    "linear": Form(draw_linear, call_plain, rows=("x",)),
    "merge_rows": Form(draw_merge, call_plain),
    "quantise": Form(draw_rows("x", columns="n"), call_plain, ("q", "scale"), rows=("x",)),
    "quick_gelu": Form(draw_rows("x", columns="n"), call_plain, rows=("x",)),
    "resize": Form(draw_resize, call_plain),
    "rms_norm": Form(draw_rows("x", columns="n", vectors=("weight",)), call_plain, rows=("x",)),
    "rope": Form(draw_rope, call_plain, rows=("x", "positions")),
    "route": Form(draw_route, call_plain, ("weights", "ids"), rows=("logits",)),
    "sample": Form(draw_sample, call_plain, ("ids",), DRAWN_ROWS),
    "select_rows": Form(draw_select, call_plain, rows=("rows",)),
    "self_attention": Form(draw_self_attention, call_plain, rows=("q", "k", "v")),
    "swiglu": Form(draw_rows("gate_up", columns="inter", factor=2), call_plain, rows=("gate_up",)),
})  # fmt: skip
"""Every op's form; ``kv_cache`` is the cache's own methods."""

assert FORMS.keys() == {*OPS, "kv_cache"}


@dataclass(frozen=True)
class OpTrial:
    """One case of one op, ready to be run on any device."""

    case: Case

    @property
    def id(self) -> str:
        """Return the case's id."""
        return self.case.id

    @property
    def op(self) -> str:
        """Return the op's name."""
        return self.case.op

    @property
    def dtype(self) -> str:
        """Return the case's dtype."""
        return self.case.dtype

    @property
    def full(self) -> bool:
        """Say whether a quick run leaves it out."""
        return self.case.full

    @property
    def exact(self) -> bool:
        """Say whether the op's result is defined to the bit."""
        return self.op == "kv_cache" or OPS[self.op].exact

    @property
    def stored(self) -> str:
        """Return the dtype in which the checkpoint holds the weights."""
        return self.case.stored

    @property
    def donated(self) -> frozenset[str]:
        """No op may change an input."""
        return frozenset()

    def specs(self) -> tuple[OpSpec, ...]:
        """Return what a device must claim."""
        return self.case.specs()

    def inputs(self) -> Inputs:
        """Draw the inputs."""
        return FORMS[self.op].draw(self.case, self.case.rng())

    def place(self, device: Device, inputs: Inputs, dtype: str) -> Placed:
        """Bring the inputs to a device."""
        return place(device, self.case, inputs, dtype)

    def call(self, device: Device, placed: Placed, dtype: str) -> dict[str, Array]:
        """Run the op once and return its results by name."""
        form = FORMS[self.op]
        asked = replace(self.case, parameters=self._parameters(dtype))
        return dict(zip(form.outputs, form.call(device, asked, placed), strict=True))

    def expect(self, inputs: Inputs) -> Expected:
        """Let the reference judge, noting what else a row may err by."""
        expected = expected_by_runs(self, inputs)
        slack = FORMS[self.op].slack
        return replace(expected, slack=slack(self.case, inputs, expected)) if slack else expected

    def _parameters(self, dtype: str) -> Mapping[str, Scalar]:
        """Return the parameters; in float64 a product is not rounded to what the case asks for."""
        if dtype == "float64" and "out_dtype" in self.case.parameters:
            return {**self.case.parameters, "out_dtype": dtype}
        return self.case.parameters
