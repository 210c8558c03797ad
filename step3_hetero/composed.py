"""Stages composed of a device's kernels: every stage's meaning, and the default for any backend.

A fused stage must give what these give, up to rounding; conformance holds one against the other.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, ClassVar

from step3_hetero.backend import Array, BatchMeta, Device, KVCache, Reduce, Stage, Weights
from step3_hetero.errors import UnsupportedOp
from step3_hetero.specs import (
    AttentionSpec,
    EmbedSpec,
    FfnSpec,
    HeadSpec,
    Limits,
    StageSpec,
    VisionSpec,
    wide,
)

Named = Mapping[str, Array]

CLASS_ROWS = 4
"""The class row stands four times before an image's patches (step3-model: vision path)."""


class ComposedStage(Stage):
    """One stage over plain kernels. ``out`` is filled by copies: clarity before speed."""

    def __init__(
        self, device: Device, spec: StageSpec, weights: Mapping[str, Weights | Array]
    ) -> None:
        self.device = device
        self.spec = spec
        self.w = weights
        self.batch: Any = None

    def plan(self, meta: BatchMeta) -> None:
        """Keep the batch in the device's form."""
        self.batch = self.device.batch(meta)

    def run(self, inputs: Named, out: Named | None = None) -> Named:
        """Run the ops one after another."""
        return deliver(self.forward(inputs), out)

    def forward(self, inputs: Named) -> Named:
        """Compute the outputs by name."""
        raise NotImplementedError

    def op(self, name: str, *arrays: Any, **parameters: Any) -> Any:
        """Call one of the device's kernels."""
        return self.device.kernel(name)(*arrays, **parameters)


def deliver(results: Named, out: Named | None) -> Named:
    """Copy ``results`` into ``out`` when the caller brought buffers."""
    if out is None:
        return results
    for name, value in results.items():
        out[name][...] = value
    return out


def copied(device: Device, x: Array, dtype: str) -> Array:
    """Copy ``x``, which has this dtype: what a stage gives lasts until its next run."""
    copy = device.empty(x.shape, dtype)
    copy[...] = x
    return copy


class Embed(ComposedStage):
    """token_ids -> x, with image rows in place of their tokens."""

    spec: EmbedSpec

    def forward(self, inputs: Named) -> Named:
        """See ops embed and merge_rows."""
        x = self.op("embed", inputs["token_ids"], self.w["table"])
        if "image_rows" in inputs:
            x = self.op("merge_rows", x, inputs["image_rows"], inputs["image_index"])
        return {"x": x}


class Attention(ComposedStage):
    """The attention half of a layer: norm, MFA, residual, norm, router.

    Source: Step-3 paper, section 3 (MFA); modeling_step3.py, Step3TextAttention.
    """

    spec: AttentionSpec

    def __init__(
        self,
        device: Device,
        spec: AttentionSpec,
        weights: Mapping[str, Weights | Array],
        cache: KVCache,
        reduce: Reduce | None = None,
    ) -> None:
        super().__init__(device, spec, weights)
        self.cache = cache
        self.reduce = reduce

    def forward(self, inputs: Named) -> Named:
        """Return the residual x, the FFN's input u and, in a MoE layer, its routing."""
        s = self.spec
        x = self.op("add", inputs["x"], inputs["y"]) if s.adds else inputs["x"]
        h = self.op("rms_norm", x, self.w["input_norm"], eps=s.eps)
        attended = self.op("linear", self._mfa(h), self.w["o_proj"])
        x = self.op("add", x, self.reduce(attended) if self.reduce else attended)
        u = self.op("rms_norm", x, self.w["post_norm"], eps=s.eps)
        return {"x": x, "u": u, **self._route(u)}

    def _mfa(self, h: Array) -> Array:
        s = self.spec
        rank, width, _ = s.widths
        qkv = self.op("linear", h, self.w["qkv"])
        low = self.op("rms_norm", qkv[:, :rank], self.w["inter_norm"], eps=s.eps)
        q = self.op("linear", low, self.w["wq"]).reshape(-1, s.heads, s.head_dim)
        k = qkv[:, rank : rank + width].reshape(-1, s.kv_heads, s.head_dim)
        v = qkv[:, rank + width :].reshape(-1, s.kv_heads, s.head_dim)
        q = self.op("rope", q, self.batch.positions, theta=s.theta)
        k = self.op("rope", k, self.batch.positions, theta=s.theta)
        self.cache.write(k, v, self.batch)
        o = self.op("attention", q, self.cache, self.batch, scale=s.scale)
        return o.reshape(-1, s.heads * s.head_dim)

    def _route(self, u: Array) -> Named:
        r = self.spec.router
        if r is None:
            return {}
        logits = self.op("linear", u, self.w["router"], out_dtype=r.logits_dtype)
        logits = self.op("cast", logits, dtype=wide(self.spec.dtype))
        weights, ids = self.op("route", logits, top_k=r.top_k, renormalise=r.renormalise)
        return {"weights": self.op("cast", weights, dtype=self.spec.dtype), "ids": ids}


class Ffn(ComposedStage):
    """The FFN half of a layer: dense SwiGLU, or routed experts plus the shared one."""

    spec: FfnSpec

    def forward(self, inputs: Named) -> Named:
        """Return y, which the next attention stage or the head adds to the residual."""
        u = inputs["u"]
        if not self.spec.experts:
            return {"y": self._swiglu(u, "gate_up", "down")}
        routed = self.op("experts", u, inputs["weights"], inputs["ids"], self.w["experts"])
        shared = self._swiglu(u, "shared_gate_up", "shared_down")
        return {"y": self.op("add", routed, shared)}

    def _swiglu(self, u: Array, gate_up: str, down: str) -> Array:
        inner = self.op("swiglu", self.op("linear", u, self.w[gate_up]))
        return self.op("linear", inner, self.w[down])


class Head(ComposedStage):
    """x + y of the selected rows -> logits."""

    spec: HeadSpec

    def forward(self, inputs: Named) -> Named:
        """Return logits (rows, vocab) in float32 (float64 for float64)."""
        x, y = (self.op("select_rows", inputs[n], inputs["rows"]) for n in ("x", "y"))
        h = self.op("rms_norm", self.op("add", x, y), self.w["norm"], eps=self.spec.eps)
        logits = self.op("linear", h, self.w["lm_head"])
        return {"logits": self.op("cast", logits, dtype=wide(self.spec.dtype))}


class Vision(ComposedStage):
    """pixels (images, size, size, channels) -> rows (images · n, hidden).

    Source: modeling_step3.py, Step3VisionTransformer and the two downsampling convolutions. A block
    normalises the output of each half, not its input.
    """

    spec: VisionSpec

    def forward(self, inputs: Named) -> Named:
        """Return the projected rows, image after image, each row-major."""
        s = self.spec
        patches = self.op("conv2d", inputs["pixels"], self.w["patch"], stride=s.patch, padding=0)
        images, grid = patches.shape[:2]
        x = self._with_positions(patches.reshape(images, grid * grid, s.width), grid)
        for layer in range(s.layers):
            x = self._block(x, layer, images)
        maps = x.reshape(images, CLASS_ROWS + grid * grid, s.width)[:, CLASS_ROWS:]
        return {"rows": self._project(maps.reshape(images, grid, grid, s.width))}

    def _with_positions(self, patches: Array, grid: int) -> Array:
        """Return (images · (4 + grid²), width): the class row four times, then the patches."""
        table: Array = self.w["positions"]
        top = self.op("add", self.w["class_row"], table[:1])
        places = self._grid_positions(table[1:], grid)
        rows: list[Array] = []
        for image in patches:
            rows += [top] * CLASS_ROWS + [self.op("add", image, places)]
        return self.op("concat", *rows)

    def _grid_positions(self, places: Array, grid: int) -> Array:
        s = self.spec
        native = s.image_size // s.patch
        if grid == native:
            return places
        square = self.op("resize", places.reshape(native, native, s.width), size=grid)
        return self.op("cast", square, dtype=s.dtype).reshape(grid * grid, s.width)

    def _block(self, x: Array, layer: int, images: int) -> Array:
        x = self.op("add", x, self._norm(self._attend(x, layer, images), f"{layer}.norm1"))
        inner = self.op("quick_gelu", self.op("linear", x, self.w[f"{layer}.fc1"]))
        mlp = self.op("linear", inner, self.w[f"{layer}.fc2"])
        return self.op("add", x, self._norm(mlp, f"{layer}.norm2"))

    def _attend(self, x: Array, layer: int, images: int) -> Array:
        s = self.spec
        qkv = self.op("linear", x, self.w[f"{layer}.qkv"])
        heads = (images, -1, s.heads, s.head_dim)
        q, k, v = (qkv[:, i * s.width : (i + 1) * s.width].reshape(*heads) for i in range(3))
        o = self.op("self_attention", q, k, v, scale=s.head_dim**-0.5)
        return self.op("linear", o.reshape(-1, s.width), self.w[f"{layer}.out"])

    def _norm(self, x: Array, name: str) -> Array:
        weight, bias = self.w[f"{name}.weight"], self.w[f"{name}.bias"]
        return self.op("layer_norm", x, weight, bias, eps=self.spec.eps)

    def _project(self, maps: Array) -> Array:
        maps = self.op("conv2d", maps, self.w["down1"], stride=2, padding=0)
        maps = self.op("conv2d", maps, self.w["down2"], stride=self.spec.stride, padding=1)
        return self.op("linear", maps.reshape(-1, maps.shape[-1]), self.w["projector"])


class PerRow(Stage):
    """Runs another stage on one row (one image) at a time: the batch around a row cannot matter.

    Every call has the same shapes and freshly allocated operands, so that neither tiling nor
    alignment depends on the batch: bitwise invariance at the price of the batch's speed.
    """

    ROWS: ClassVar[Mapping[str, str]] = MappingProxyType(
        {"attention": "x", "ffn": "u", "head": "rows", "vision": "pixels"}
    )

    def __init__(self, device: Device, inner: Stage) -> None:
        self.device = device
        self.inner = inner
        self.spec = inner.spec
        self.meta: BatchMeta | None = None

    def plan(self, meta: BatchMeta) -> None:
        """Keep the batch; each row is planned as a batch of its own."""
        self.meta = meta

    def run(self, inputs: Named, out: Named | None = None) -> Named:
        """Run row by row, in order: a row's keys are cached before the next one reads them."""
        rows = inputs[self.ROWS[self.spec.kind]].shape[0]
        if rows == 0:
            if self.meta is not None:
                self.inner.plan(self.meta)
            return self.inner.run(inputs, out)
        parts = [self._row(inputs, row) for row in range(rows)]
        return deliver({n: self._concat(*(p[n] for p in parts)) for n in parts[0]}, out)

    def _row(self, inputs: Named, row: int) -> Named:
        if self.spec.kind == "attention" and self.meta is not None:
            self.inner.plan(self.meta.token(row))
        whole = {"x", "y"} if self.spec.kind == "head" else set()
        one = {
            name: value if name in whole else self._concat(value[row : row + 1])
            for name, value in inputs.items()
        }
        return {name: self._concat(value) for name, value in self.inner.run(one).items()}

    def _concat(self, *parts: Array) -> Array:
        return self.device.kernel("concat")(*parts)


def compose(
    device: Device,
    spec: StageSpec,
    weights: Mapping[str, Weights | Array],
    cache: KVCache | None,
    limits: Limits,
    reduce: Reduce | None = None,
) -> Stage:
    """Build a stage of the device's kernels; a batch-invariant one runs row by row."""
    if isinstance(spec, AttentionSpec):
        if cache is None:
            raise UnsupportedOp("an attention stage needs a KV cache; open_cache gives one")
        return invariant(device, Attention(device, spec, weights, cache, reduce))
    kinds: dict[str, type[ComposedStage]] = {
        "embed": Embed, "ffn": Ffn, "head": Head, "vision": Vision
    }  # fmt: skip
    return invariant(device, kinds[spec.kind](device, spec, weights))


def invariant(device: Device, stage: Stage) -> Stage:
    """Wrap ``stage`` in PerRow if its spec asks for invariance; a look-up has it anyway."""
    if stage.spec.batch_invariant and stage.spec.kind in PerRow.ROWS:
        return PerRow(device, stage)
    return stage
