"""Which checkpoint tensors a stage holds, what a device makes of them, how they are sharded."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache

from step3_hetero.graph.graph import Param, Shard
from step3_hetero.model.config import ModelConfig
from step3_hetero.model.layout import is_fp8_linear, tensor_shapes
from step3_hetero.specs import (
    AttentionSpec,
    EmbedSpec,
    FfnSpec,
    HeadSpec,
    OpSpec,
    Scalar,
    VisionSpec,
)


class _Maker:
    """Makes Params whose shapes come from the checkpoint's layout."""

    def __init__(self, model: ModelConfig, dtype: str, prefix: str = "") -> None:
        self.shapes = _shapes(model)
        self.dtype = dtype
        self.prefix = prefix

    def plain(self, name: str, tensor: str) -> Param:
        """Return a plain array."""
        return self._param(name, {"value": tensor}, None, "replicate")

    def linear(
        self, name: str, *tensors: str, shard: Shard = "replicate", out_dtype: str | None = None
    ) -> Param:
        """Return matrices that share their input, outputs side by side."""
        compressible = all(is_fp8_linear(self.prefix + t) for t in tensors)
        named = {t.rsplit(".", 1)[0].rsplit(".", 1)[-1]: t for t in tensors}
        parameters: dict[str, Scalar] = {"out_dtype": out_dtype or self.dtype}
        spec = OpSpec("linear", self.dtype, {}, parameters)
        return self._param(name, named, spec, shard, compressible)

    def biased(self, name: str, op: str, stem: str) -> Param:
        """Return a weight and, when the layout has one, its bias."""
        named = {"weight": f"{stem}.weight"}
        if self.prefix + f"{stem}.bias" in self.shapes:
            named["bias"] = f"{stem}.bias"
        return self._param(name, named, OpSpec(op, self.dtype), "replicate")

    def table(self, name: str, tensor: str) -> Param:
        """Return an embedding table."""
        return self._param(name, {"table": tensor}, OpSpec("embed", self.dtype), "replicate")

    def experts(self, name: str, stem: str) -> Param:
        """Return the stacked experts."""
        named = {part: f"{stem}.{part}_proj.weight" for part in ("gate", "up", "down")}
        return self._param(name, named, OpSpec("experts", self.dtype), "experts", True)

    def _param(
        self,
        name: str,
        tensors: Mapping[str, str],
        spec: OpSpec | None,
        shard: Shard,
        compressible: bool = False,
    ) -> Param:
        full = {key: self.prefix + tensor for key, tensor in tensors.items()}
        shapes = {key: self.shapes[tensor] for key, tensor in full.items()}
        return Param(name, full, shapes, spec, shard, compressible)


@cache
def _shapes(model: ModelConfig) -> Mapping[str, tuple[int, ...]]:
    return tensor_shapes(model)


def embed_params(model: ModelConfig, spec: EmbedSpec) -> tuple[Param, ...]:
    """Return the token table."""
    return (_Maker(model, spec.dtype).table("table", "model.embed_tokens.weight"),)


def attention_params(model: ModelConfig, spec: AttentionSpec, layer: int) -> tuple[Param, ...]:
    """Return MFA's projections, the three norms and, in a MoE layer, the router."""
    make = _Maker(model, spec.dtype, f"model.layers.{layer}.")
    proj = [f"self_attn.{name}_proj.weight" for name in ("q", "k", "v")]
    params = [
        make.plain("input_norm", "input_layernorm.weight"),
        make.linear("qkv", *proj),
        make.plain("inter_norm", "self_attn.inter_norm.weight"),
        make.linear("wq", "self_attn.wq.weight", shard="columns"),
        make.linear("o_proj", "self_attn.o_proj.weight", shard="rows"),
        make.plain("post_norm", "post_attention_layernorm.weight"),
    ]
    if spec.router:
        logits = spec.router.logits_dtype
        params.append(make.linear("router", "moe.gate.weight", out_dtype=logits))
    return tuple(params)


def ffn_params(model: ModelConfig, spec: FfnSpec, layer: int) -> tuple[Param, ...]:
    """Return the dense SwiGLU, or the experts and the shared one."""
    make = _Maker(model, spec.dtype, f"model.layers.{layer}.")
    if not spec.experts:
        return _swiglu(make, "", "mlp")
    return (make.experts("experts", "moe"), *_swiglu(make, "shared_", "share_expert"))


def _swiglu(make: _Maker, prefix: str, stem: str) -> tuple[Param, ...]:
    gate, up, down = (f"{stem}.{part}_proj.weight" for part in ("gate", "up", "down"))
    return (
        make.linear(f"{prefix}gate_up", gate, up, shard="columns"),
        make.linear(f"{prefix}down", down, shard="rows"),
    )


def head_params(model: ModelConfig, spec: HeadSpec) -> tuple[Param, ...]:
    """Return the final norm and lm_head."""
    make = _Maker(model, spec.dtype)
    return (make.plain("norm", "model.norm.weight"), make.linear("lm_head", "lm_head.weight"))


def vision_params(model: ModelConfig, spec: VisionSpec) -> tuple[Param, ...]:
    """Return the tower's, the downsamplers' and the projector's weights."""
    tower = _Maker(model, spec.dtype, "vision_model.")
    after = _Maker(model, spec.dtype)
    params = [
        tower.plain("class_row", "embeddings.class_embedding"),
        tower.plain("positions", "embeddings.position_embedding.weight"),
        tower.biased("patch", "conv2d", "embeddings.patch_embedding"),
    ]
    for layer in range(spec.layers):
        params += _vision_block(tower, layer)
    return (
        *params,
        after.biased("down1", "conv2d", "vit_downsampler"),
        after.biased("down2", "conv2d", "vit_downsampler2"),
        after.biased("projector", "linear", "vit_large_projector"),
    )


def _vision_block(make: _Maker, layer: int) -> list[Param]:
    stem = f"transformer.layers.{layer}"
    norms = [
        make.plain(f"{layer}.norm{n}.{part}", f"{stem}.layer_norm{n}.{part}")
        for n in (1, 2)
        for part in ("weight", "bias")
    ]
    return [
        make.biased(f"{layer}.qkv", "linear", f"{stem}.self_attn.qkv_proj"),
        make.biased(f"{layer}.out", "linear", f"{stem}.self_attn.out_proj"),
        make.biased(f"{layer}.fc1", "linear", f"{stem}.mlp.fc1"),
        make.biased(f"{layer}.fc2", "linear", f"{stem}.mlp.fc2"),
        *norms,
    ]
