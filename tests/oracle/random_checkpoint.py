"""Writes random Step-3 checkpoints in the published layout.

A tensor's numbers depend on its name, its shape and the seed, never on which other tensors exist:
two checkpoints that differ in one option share everything else.
"""

import json
import math
import zlib
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt
from safetensors.numpy import save_file

from oracle.checkpoint import BLOCK, RENAMED, SCALE_SUFFIX

Shapes = dict[str, tuple[int, ...]]
Tensors = dict[str, npt.NDArray[Any]]

FP8_MAX = 448.0
STORED = {"fp32": np.float32, "bf16": ml_dtypes.bfloat16, "fp8": ml_dtypes.bfloat16}
GAIN = {"moe.gate.weight": 2.0, "lm_head.weight": 3.0}  # clear winners: few choices near a tie


@dataclass(frozen=True)
class Text:
    """Sizes of the language model; fields are the keys of its configuration."""

    hidden_size: int = 48
    num_hidden_layers: int = 4
    intermediate_size: int = 96
    num_attention_heads: int = 4
    num_attention_groups: int = 1
    head_dim: int = 16
    share_q_dim: int = 32
    moe_layers_enum: str | tuple[int, ...] | None = "1,2"  # None: the key is left out
    moe_num_experts: int = 8
    moe_top_k: int = 3
    moe_intermediate_size: int = 32
    share_expert_dim: int = 40
    norm_expert_weight: bool = False
    vocab_size: int = 128
    max_seq_len: int = 512
    max_position_embedding: int = 512
    rope_theta: float = 500000.0
    rope_scaling: None = None
    rms_norm_eps: float = 1e-5
    tie_word_embeddings: bool = False

    def moe_layers(self) -> set[int]:
        """Return the numbers of the layers with experts."""
        if self.moe_layers_enum is None:
            return set(range(1, self.num_hidden_layers))
        enum = self.moe_layers_enum
        return {int(n) for n in (enum.split(",") if isinstance(enum, str) else enum)}


@dataclass(frozen=True)
class Vision:
    """Sizes of the vision tower; fields are the keys of its configuration."""

    hidden_size: int = 32
    num_hidden_layers: int = 2
    num_attention_heads: int = 4
    num_channels: int = 3
    image_size: int = 32
    patch_size: int = 4
    intermediate_size: int = 64
    output_hidden_size: int = 24
    hidden_act: str = "quick_gelu"
    layer_norm_eps: float = 1e-6


def write_checkpoint(
    folder: str | Path,
    *,
    vision: Vision | None = None,
    projector_bias: bool = False,
    image_token_id: int | None = None,
    dtype: str = "fp32",
    seed: int = 0,
    shards: int = 1,
    renamed: bool = False,
    **text: Any,
) -> Path:
    """Write a text model, or text and vision where ``vision`` is given; return the folder.

    ``text`` are fields of ``Text``. ``dtype`` is fp32, bf16 or fp8 (block-FP8 for the linears of
    the language model, bf16 for the rest). ``renamed`` spells names as transformers does.
    ``image_token_id`` is the last of the vocabulary unless given.
    """
    sizes = Text(**text)
    shapes = text_shapes(sizes)
    config: dict[str, Any] = {"model_type": "step3_text", **config_keys(sizes)}
    config["architectures"] = ["Step3TextForCausalLM"]
    if vision is not None:
        shapes |= vision_shapes(vision, sizes.hidden_size, projector_bias)
        last = sizes.vocab_size - 1
        config = whole_config(config, vision, last if image_token_id is None else image_token_id)
    config["torch_dtype"] = "float32" if dtype == "fp32" else "bfloat16"
    if dtype == "fp8":
        config["quantization_config"] = {"quant_method": "fp8", "weight_block_size": [BLOCK, BLOCK]}

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")
    tensors: Tensors = {}
    for name, shape in shapes.items():
        tensors |= stored(name, draw(name, shape, seed), dtype)
    save({rename(n) if renamed else n: t for n, t in tensors.items()}, folder, shards)
    return folder


def config_keys(sizes: Text) -> dict[str, Any]:
    """Return the fields as configuration keys, moe_layers_enum only where it is set."""
    keys = asdict(sizes) | {"bos_token_id": 0, "eos_token_id": 1}
    return {k: v for k, v in keys.items() if v is not None or k != "moe_layers_enum"}


def whole_config(text: dict[str, Any], vision: Vision, image_token_id: int) -> dict[str, Any]:
    """Return the configuration of text and vision together."""
    return {
        "model_type": "step3_vl",
        "architectures": ["Step3VLForConditionalGeneration"],
        "text_config": text,
        "vision_config": {"model_type": "step3_vision_encoder", **asdict(vision)},
        "image_token_id": image_token_id,
        "understand_projector_stride": 2,
    }


def text_shapes(t: Text) -> Shapes:
    """Return name and shape of every tensor of the language model."""
    shapes: Shapes = {
        "model.embed_tokens.weight": (t.vocab_size, t.hidden_size),
        "model.norm.weight": (t.hidden_size,),
    }
    if not t.tie_word_embeddings:
        shapes["lm_head.weight"] = (t.vocab_size, t.hidden_size)
    moe = t.moe_layers()
    for n in range(t.num_hidden_layers):
        layer = attention_shapes(t) | (moe_shapes(t) if n in moe else dense_shapes(t))
        shapes |= {f"model.layers.{n}.{name}": shape for name, shape in layer.items()}
    return shapes


def attention_shapes(t: Text) -> Shapes:
    """Return what every layer has: its two norms and the attention."""
    shared, heads = t.num_attention_groups * t.head_dim, t.num_attention_heads * t.head_dim
    return {
        "input_layernorm.weight": (t.hidden_size,),
        "post_attention_layernorm.weight": (t.hidden_size,),
        "self_attn.q_proj.weight": (t.share_q_dim, t.hidden_size),
        "self_attn.k_proj.weight": (shared, t.hidden_size),
        "self_attn.v_proj.weight": (shared, t.hidden_size),
        "self_attn.inter_norm.weight": (t.share_q_dim,),
        "self_attn.wq.weight": (heads, t.share_q_dim),
        "self_attn.o_proj.weight": (t.hidden_size, heads),
    }


def dense_shapes(t: Text) -> Shapes:
    """Return the feed-forward part of a dense layer."""
    return swiglu_shapes("mlp.", (t.intermediate_size, t.hidden_size))


def moe_shapes(t: Text) -> Shapes:
    """Return router, stacked experts and shared expert of a MoE layer."""
    routed = (t.moe_num_experts, t.moe_intermediate_size, t.hidden_size)
    return {
        "moe.gate.weight": (t.moe_num_experts, t.hidden_size),
        **swiglu_shapes("moe.", routed),
        **swiglu_shapes("share_expert.", (t.share_expert_dim, t.hidden_size)),
    }


def swiglu_shapes(prefix: str, up: tuple[int, ...]) -> Shapes:
    """Return three projections; ``up`` is (..., inner, hidden)."""
    *lead, inner, hidden = up
    down = (*lead, hidden, inner)
    shapes = {"gate_proj": up, "up_proj": up, "down_proj": down}
    return {f"{prefix}{name}.weight": shape for name, shape in shapes.items()}


def vision_shapes(v: Vision, text_hidden: int, projector_bias: bool) -> Shapes:
    """Return name and shape of every tensor of tower, downsampler and projector."""
    width, inner, out = v.hidden_size, v.intermediate_size, v.output_hidden_size
    embeddings = "vision_model.embeddings."
    shapes: Shapes = {
        f"{embeddings}class_embedding": (1, width),
        f"{embeddings}position_embedding.weight": (1 + (v.image_size // v.patch_size) ** 2, width),
    }
    patch = (width, v.num_channels, v.patch_size, v.patch_size)
    shapes |= with_bias(f"{embeddings}patch_embedding", patch)
    for n in range(v.num_hidden_layers):
        layer = f"vision_model.transformer.layers.{n}."
        shapes |= with_bias(f"{layer}self_attn.qkv_proj", (3 * width, width))
        shapes |= with_bias(f"{layer}self_attn.out_proj", (width, width))
        shapes |= with_bias(f"{layer}layer_norm1", (width,))
        shapes |= with_bias(f"{layer}layer_norm2", (width,))
        shapes |= with_bias(f"{layer}mlp.fc1", (inner, width))
        shapes |= with_bias(f"{layer}mlp.fc2", (width, inner))
    shapes |= with_bias("vit_downsampler", (out, width, 2, 2))
    shapes |= with_bias("vit_downsampler2", (2 * out, out, 3, 3))
    projector = with_bias("vit_large_projector", (text_hidden, 2 * out))
    if not projector_bias:
        del projector["vit_large_projector.bias"]
    return shapes | projector


def with_bias(name: str, shape: tuple[int, ...]) -> Shapes:
    """Return weight and bias of one map."""
    return {f"{name}.weight": shape, f"{name}.bias": shape[:1]}


def draw(name: str, shape: tuple[int, ...], seed: int) -> npt.NDArray[np.float32]:
    """Draw one tensor so that activations keep their size from layer to layer."""
    rng = np.random.default_rng([seed, zlib.crc32(name.encode())])
    if name.endswith(".bias"):
        return 0.1 * rng.standard_normal(shape, dtype=np.float32)
    if "norm" in name:
        return 0.8 + 0.4 * rng.random(shape, dtype=np.float32)
    values = rng.standard_normal(shape, dtype=np.float32)
    if "embed_tokens" in name or name.endswith(("class_embedding", "position_embedding.weight")):
        return values
    fan_in = math.prod(shape[1:]) if len(shape) == 4 else shape[-1]  # three axes: stacked experts
    gain = next((g for ending, g in GAIN.items() if name.endswith(ending)), 1.0)
    return values * np.float32(gain / math.sqrt(fan_in))


def stored(name: str, tensor: npt.NDArray[np.float32], dtype: str) -> Tensors:
    """Return the tensor as ``dtype`` stores it: under its name, and with scales for FP8."""
    if dtype not in STORED:
        raise ValueError(f"dtype is {dtype!r}; known: {', '.join(STORED)}")
    linear = name.startswith("model.layers.") and name.endswith(("_proj.weight", ".wq.weight"))
    if dtype == "fp8" and linear:
        codes, scale = quantise(tensor)
        return {name: codes, name + SCALE_SUFFIX: scale}
    return {name: tensor.astype(STORED[dtype])}


def quantise(tensor: npt.NDArray[np.float32]) -> tuple[npt.NDArray[Any], npt.NDArray[np.float32]]:
    """Store e4m3 codes and, per 128 x 128 block, the scale that gives the weights back.

    Shapes: tensor (..., m, n) -> codes as tensor, scale (..., ceil(m / 128), ceil(n / 128)).
    """
    *lead, m, n = tensor.shape
    codes = np.empty(tensor.shape, ml_dtypes.float8_e4m3fn)
    scale = np.ones((*lead, -(-m // BLOCK), -(-n // BLOCK)), np.float32)
    for i, j in np.ndindex(scale.shape[-2:]):
        place = (..., slice(i * BLOCK, (i + 1) * BLOCK), slice(j * BLOCK, (j + 1) * BLOCK))
        scale[..., i, j] = np.abs(tensor[place]).max(axis=(-2, -1)) / FP8_MAX
        codes[place] = (tensor[place] / scale[..., i, j, None, None]).astype(codes.dtype)
    return codes, scale


def rename(name: str) -> str:
    """Spell a published name as the published transformers class does."""
    for renamed, published in reversed(RENAMED.items()):
        if name.startswith(published):
            return renamed + name.removeprefix(published)
    return name


def save(tensors: Tensors, folder: Path, shards: int) -> None:
    """Write one file, or ``shards`` files of alternating tensors and their index."""
    if shards == 1:
        save_file(tensors, folder / "model.safetensors")
        return
    weight_map: dict[str, str] = {}
    for s in range(shards):
        part = dict(list(tensors.items())[s::shards])
        file = f"model-{s + 1:05d}-of-{shards:05d}.safetensors"
        save_file(part, folder / file)
        weight_map |= dict.fromkeys(part, file)
    size = sum(t.nbytes for t in tensors.values())
    index = {"metadata": {"total_size": size}, "weight_map": weight_map}
    path = folder / "model.safetensors.index.json"
    path.write_text(json.dumps(index, indent=2), encoding="utf-8")
