"""Every tensor of a published Step-3 checkpoint: name, shape, group, and whether FP8 may store it.

Weights of linear maps are (out, in); experts are stacked, (experts, out, in). Names are those of
the published checkpoints; :func:`canonical` takes the transformers class's spelling to them.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from types import MappingProxyType

from step3_hetero.model.config import ModelConfig, TextConfig, VisionConfig
from step3_hetero.specs import FP8_BLOCK

Shape = tuple[int, ...]
Shapes = dict[str, Shape]

SCALE_SUFFIX = "_scale_inv"
PROJECTOR_BIAS = "vit_large_projector.bias"

RENAMED: Mapping[str, str] = MappingProxyType(
    {
        "model.language_model.": "model.",
        "model.vision_model.": "vision_model.",
        "model.vit_": "vit_",
    }
)
"""Prefixes as the published transformers class spells them, and as the checkpoints do."""

GROUPS = (
    "embed",
    "attention",
    "dense ffn",
    "experts",
    "shared expert",
    "router",
    "norms",
    "vision",
    "head",
)
"""Parts of the model, as summaries list them."""

_FP8_LINEAR = re.compile(
    r"model\.layers\.\d+\."
    r"(self_attn\.([qkvo]_proj|wq)|(mlp|moe|share_expert)\.(gate|up|down)_proj)\.weight"
)

_GROUP_OF = (
    (re.compile(r"vision_model\.|vit_"), "vision"),
    (re.compile(r"model\.embed_tokens\."), "embed"),
    (re.compile(r"lm_head\."), "head"),
    (re.compile(r".*norm\.weight"), "norms"),
    (re.compile(r".*\.self_attn\."), "attention"),
    (re.compile(r".*\.mlp\."), "dense ffn"),
    (re.compile(r".*\.share_expert\."), "shared expert"),
    (re.compile(r".*\.moe\.gate\."), "router"),
    (re.compile(r".*\.moe\."), "experts"),
)


def tensor_shapes(config: ModelConfig) -> Shapes:
    """Return every tensor's shape by name, in reading order; scales of FP8 tensors not included.

    The projector's bias is there when ``projector_bias`` is true, not while it is undecided.
    """
    t = config.text
    shapes: Shapes = {"model.embed_tokens.weight": (t.vocab_size, t.hidden_size)}
    for layer in range(t.num_hidden_layers):
        parts = _attention(t) | (
            _moe(t) if t.is_moe(layer) else _swiglu("mlp", t.intermediate_size, t)
        )
        shapes |= {f"model.layers.{layer}.{name}": shape for name, shape in parts.items()}
    shapes["model.norm.weight"] = (t.hidden_size,)
    shapes["lm_head.weight"] = (t.vocab_size, t.hidden_size)
    if config.vision is not None:
        shapes |= _vision(config.vision)
        shapes["vit_large_projector.weight"] = (t.hidden_size, 2 * config.vision.output_hidden_size)
        if config.projector_bias:
            shapes[PROJECTOR_BIAS] = (t.hidden_size,)
    return shapes


def parameter_count(config: ModelConfig, prefix: str = "") -> int:
    """Return the number of parameters in the tensors whose names start with ``prefix``."""
    shapes = tensor_shapes(config).items()
    return sum(math.prod(shape) for name, shape in shapes if name.startswith(prefix))


def is_fp8_linear(name: str) -> bool:
    """Tell whether a block-FP8 checkpoint may store this tensor as e4m3.

    These are the linear maps of the language model; embeddings, head, norms, router and the
    vision path never are.

    >>> is_fp8_linear("model.layers.4.moe.gate_proj.weight")
    True
    >>> is_fp8_linear("model.layers.4.moe.gate.weight")
    False
    """
    return _FP8_LINEAR.fullmatch(name) is not None


def scale_shape(shape: Shape) -> Shape:
    """Return the shape of the scales of a tensor: one per started block of the last two axes.

    >>> scale_shape((48, 5120, 200))
    (48, 40, 2)
    """
    return (*shape[:-2], *(-(-n // FP8_BLOCK) for n in shape[-2:]))


def canonical(name: str) -> str:
    """Return the checkpoint's spelling of a name in either spelling.

    >>> canonical("model.language_model.norm.weight"), canonical("model.norm.weight")
    ('model.norm.weight', 'model.norm.weight')
    """
    for renamed, published in RENAMED.items():
        if name.startswith(renamed):
            return published + name.removeprefix(renamed)
    return name


def group_of(name: str) -> str:
    """Return which of ``GROUPS`` a tensor of the layout belongs to.

    >>> group_of("model.layers.4.self_attn.inter_norm.weight")
    'norms'
    """
    for pattern, group in _GROUP_OF:
        if pattern.match(name):
            return group
    raise KeyError(f"{name!r} is no tensor of the layout")


def _attention(t: TextConfig) -> Shapes:
    """Return what every layer has: multi-matrix factorised attention, and the norms around it."""
    kv, heads = t.kv_heads * t.head_dim, t.num_attention_heads * t.head_dim
    return {
        "input_layernorm.weight": (t.hidden_size,),
        "self_attn.q_proj.weight": (t.share_q_dim, t.hidden_size),
        "self_attn.k_proj.weight": (kv, t.hidden_size),
        "self_attn.v_proj.weight": (kv, t.hidden_size),
        "self_attn.inter_norm.weight": (t.share_q_dim,),
        "self_attn.wq.weight": (heads, t.share_q_dim),
        "self_attn.o_proj.weight": (t.hidden_size, heads),
        "post_attention_layernorm.weight": (t.hidden_size,),
    }


def _swiglu(stem: str, inter: int, t: TextConfig, stack: Shape = ()) -> Shapes:
    return {
        f"{stem}.gate_proj.weight": (*stack, inter, t.hidden_size),
        f"{stem}.up_proj.weight": (*stack, inter, t.hidden_size),
        f"{stem}.down_proj.weight": (*stack, t.hidden_size, inter),
    }


def _moe(t: TextConfig) -> Shapes:
    """Return router, routed experts and shared expert."""
    return {
        "moe.gate.weight": (t.moe_num_experts, t.hidden_size),
        **_swiglu("moe", t.moe_intermediate_size, t, (t.moe_num_experts,)),
        **_swiglu("share_expert", t.share_expert_dim, t),
    }


def _vision(v: VisionConfig) -> Shapes:
    """Return the tower and the two downsamplers."""
    width, out = v.hidden_size, v.output_hidden_size
    rows = 1 + (v.image_size // v.patch_size) ** 2  # row 0 is the class's
    stem = "vision_model.embeddings"
    shapes: Shapes = {f"{stem}.class_embedding": (1, width)}
    patch = (width, v.num_channels, v.patch_size, v.patch_size)
    shapes |= _with_bias(f"{stem}.patch_embedding", patch)
    shapes[f"{stem}.position_embedding.weight"] = (rows, width)
    for layer in range(v.num_hidden_layers):
        shapes |= _vision_block(f"vision_model.transformer.layers.{layer}", v)
    shapes |= _with_bias("vit_downsampler", (out, width, 2, 2))
    return shapes | _with_bias("vit_downsampler2", (2 * out, out, 3, 3))


def _vision_block(stem: str, v: VisionConfig) -> Shapes:
    width, inter = v.hidden_size, v.intermediate_size
    return {
        **_with_bias(f"{stem}.self_attn.qkv_proj", (3 * width, width)),
        **_with_bias(f"{stem}.self_attn.out_proj", (width, width)),
        **_with_bias(f"{stem}.layer_norm1", (width,)),
        **_with_bias(f"{stem}.mlp.fc1", (inter, width)),
        **_with_bias(f"{stem}.mlp.fc2", (width, inter)),
        **_with_bias(f"{stem}.layer_norm2", (width,)),
    }


def _with_bias(stem: str, shape: Shape) -> Shapes:
    return {f"{stem}.weight": shape, f"{stem}.bias": shape[:1]}
