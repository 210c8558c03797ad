"""What a Step-3 model is: its sizes, read from ``config.json`` or known by the family's name.

::

    ModelConfig --+-- text    TextConfig     the language model
                  +-- vision  VisionConfig   the image tower; None in a text-only model

Published files differ in spelling; :meth:`ModelConfig.read` knows every spelling that was seen.
What the runtime does not compute (scaled RoPE, tied embeddings, other activations) is refused.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

from step3_hetero.model.json_section import Section, is_integer
from step3_hetero.specs import FP8_BLOCK

FILE = "config.json"

ARCHITECTURES: Mapping[str, str] = MappingProxyType(
    {"step3_text": "Step3TextForCausalLM", "step3_vl": "Step3VLForConditionalGeneration"}
)
"""The supported architecture by model_type."""

DTYPES = ("bfloat16", "float32")
MAX_LAYERS = 4096


@dataclass(frozen=True, slots=True)
class TextConfig:
    """Sizes of the language model; the names are those of the published files."""

    hidden_size: int
    num_hidden_layers: int
    intermediate_size: int  # of the dense FFN
    num_attention_heads: int
    num_attention_groups: int  # key and value heads
    head_dim: int
    share_q_dim: int  # rank of the query projection
    moe_layers: tuple[int, ...]  # ascending
    moe_num_experts: int
    moe_top_k: int
    moe_intermediate_size: int  # of one routed expert
    share_expert_dim: int
    norm_expert_weight: bool  # the chosen experts' weights are scaled to sum to 1
    rms_norm_eps: float
    rope_theta: float
    max_positions: int
    vocab_size: int
    bos_token_id: int | None
    eos_token_ids: tuple[int, ...]

    @property
    def kv_heads(self) -> int:
        """Return the number of key heads, which is that of value heads."""
        return self.num_attention_groups

    def is_moe(self, layer: int) -> bool:
        """Tell whether a layer's FFN is a mixture of experts."""
        return layer in self.moe_layers


@dataclass(frozen=True, slots=True)
class VisionConfig:
    """Sizes of the vision tower and of the first downsampler."""

    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_channels: int
    image_size: int
    patch_size: int
    output_hidden_size: int  # channels after the first downsampler; the second doubles them
    intermediate_size: int
    layer_norm_eps: float
    hidden_act: str


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """One model: sizes, and how its weights are stored."""

    text: TextConfig
    vision: VisionConfig | None
    image_token_id: int | None
    projector_stride: int
    projector_bias: bool | None  # None: only the checkpoint can say
    dtype: str  # of whatever is not block FP8
    fp8_blocks: bool  # the language model's linears are e4m3 with a scale per 128 x 128
    name: str

    @classmethod
    def read(cls, folder: Path) -> ModelConfig:
        """Read ``config.json`` of a model's folder.

        Raises:
            ConfigError: the file is missing or damaged, describes another model, or asks for
                something that is not available.
        """
        top = Section.read(folder / FILE)
        name = folder.resolve().name
        if _model_type(top) == "step3_text":
            text = _text(top, top)
            fp8 = _fp8_blocks(top)
            return cls(text, None, None, 2, None, _dtype(top), fp8, name)
        below = top.section("text_config")
        below.only("model_type", "step3_text", "the text model of step3_vl is step3_text")
        text = _text(below, top)
        return cls(
            text=text,
            vision=_vision(top.section("vision_config")),
            image_token_id=top.integer("image_token_id", least=0, most=text.vocab_size - 1),
            projector_stride=top.integer("understand_projector_stride", default=2),
            projector_bias=top.flag("projector_bias"),
            dtype=_dtype(top, below),
            fp8_blocks=_fp8_blocks(top) or _fp8_blocks(below),
            name=name,
        )


def step3() -> ModelConfig:
    """Return the released model, as published: bf16, no FP8."""
    text = TextConfig(
        hidden_size=7168,
        num_hidden_layers=61,
        intermediate_size=18432,
        num_attention_heads=64,
        num_attention_groups=1,
        head_dim=256,
        share_q_dim=2048,
        moe_layers=tuple(range(4, 60)),
        moe_num_experts=48,
        moe_top_k=3,
        moe_intermediate_size=5120,
        share_expert_dim=5120,
        norm_expert_weight=False,
        rms_norm_eps=1e-5,
        rope_theta=500000.0,
        max_positions=65536,
        vocab_size=128815,
        bos_token_id=0,
        eos_token_ids=(1, 128805),
    )
    vision = VisionConfig(
        hidden_size=1792,
        num_hidden_layers=63,
        num_attention_heads=16,
        num_channels=3,
        image_size=728,
        patch_size=14,
        output_hidden_size=4096,
        intermediate_size=15360,
        layer_norm_eps=1e-6,
        hidden_act="quick_gelu",
    )
    return ModelConfig(text, vision, 128001, 2, None, "bfloat16", False, "step3")


FAMILIES: Mapping[str, Callable[[], ModelConfig]] = MappingProxyType({"step3": step3})
"""Models known by name: enough for a check, a plan or a graph, without a folder."""


def _model_type(top: Section) -> str:
    """Return step3_text or step3_vl, from model_type, from architectures, or from both."""
    supported = ", ".join(f"{kind} ({name})" for kind, name in ARCHITECTURES.items())
    stated = top.get("architectures")
    if stated is not None and (not isinstance(stated, list) or len(stated) != 1):
        raise top.error("architectures", f"expected a list of one name, found {stated!r}")
    architecture = stated[0] if stated else None
    by_name = {name: kind for kind, name in ARCHITECTURES.items()}
    if architecture is not None and architecture not in ARCHITECTURES.values():
        raise top.error("architectures", f"{architecture!r} is not Step-3; supported: {supported}")
    kind = top.get("model_type") or by_name.get(architecture or "")
    if kind is None:
        raise top.error("model_type", f"missing; supported: {supported}")
    if not isinstance(kind, str) or kind not in ARCHITECTURES:
        raise top.error("model_type", f"{kind!r} is not Step-3; supported: {supported}")
    if architecture not in (None, ARCHITECTURES[kind]):
        raise top.error("architectures", f"{architecture!r} does not belong to {kind!r}")
    return str(kind)


def _text(s: Section, top: Section) -> TextConfig:
    """Read the language model; token ids may stand at the top as well."""
    _refuse_unavailable(s)
    if s is not top:
        top.only("tie_word_embeddings", False, "the head has weights of its own; expected false")
    layers = s.integer("num_hidden_layers", most=MAX_LAYERS)
    heads = s.integer("num_attention_heads")
    experts = s.integer("moe_num_experts")
    vocab = s.integer("vocab_size")
    return TextConfig(
        hidden_size=s.integer("hidden_size"),
        num_hidden_layers=layers,
        intermediate_size=s.integer("intermediate_size"),
        num_attention_heads=heads,
        num_attention_groups=_divisor(s, "num_attention_groups", "num_attention_heads", heads),
        head_dim=_multiple(s, "head_dim", 2, "RoPE rotates halves of a head"),
        share_q_dim=s.integer("share_q_dim"),
        moe_layers=_moe_layers(s, layers),
        moe_num_experts=experts,
        moe_top_k=s.integer("moe_top_k", most=experts),
        moe_intermediate_size=s.integer("moe_intermediate_size"),
        share_expert_dim=s.integer("share_expert_dim"),
        norm_expert_weight=bool(s.flag("norm_expert_weight")),
        rms_norm_eps=s.positive("rms_norm_eps"),
        rope_theta=_rope_theta(s),
        max_positions=s.integer("max_position_embedding", "max_position_embeddings", "max_seq_len"),
        vocab_size=vocab,
        bos_token_id=_bos(s if s.get("bos_token_id") is not None else top, vocab),
        eos_token_ids=_eos(s if s.get("eos_token_id") is not None else top, vocab),
    )


def _refuse_unavailable(s: Section) -> None:
    s.only("tie_word_embeddings", False, "the head has weights of its own; expected false")
    s.only("hidden_act", "silu", "the FFN is a SwiGLU; expected 'silu'")
    if s.get("rope_scaling") is not None:
        found = s.get("rope_scaling")
        raise s.error("rope_scaling", f"{found!r}: scaled RoPE is not available; expected null")


def _vision(s: Section) -> VisionConfig:
    s.only("model_type", "step3_vision_encoder", "the only tower is step3_vision_encoder")
    s.only("hidden_act", "quick_gelu", "the tower's activation is quick_gelu")
    heads = s.integer("num_attention_heads")
    patch = s.integer("patch_size")
    image = _multiple(s, "image_size", patch, "patches must fill the image")
    if image < 2 * patch:
        raise s.error("image_size", f"{image}: the downsampler needs two patches a side ({patch})")
    return VisionConfig(
        hidden_size=_multiple(s, "hidden_size", heads, "heads share the width evenly"),
        num_hidden_layers=s.integer("num_hidden_layers", most=MAX_LAYERS),
        num_attention_heads=heads,
        num_channels=s.integer("num_channels", default=3),
        image_size=image,
        patch_size=patch,
        output_hidden_size=s.integer("output_hidden_size"),
        # The code's default is 3072, the released weights have 15360.
        intermediate_size=s.integer("intermediate_size", default=15360),
        layer_norm_eps=s.positive("layer_norm_eps", default=1e-6),
        hidden_act="quick_gelu",
    )


def _divisor(s: Section, key: str, of: str, total: int) -> int:
    value = s.integer(key)
    if total % value:
        raise s.error(key, f"{value} does not divide {of} {total}")
    return value


def _multiple(s: Section, key: str, of: int, why: str) -> int:
    value = s.integer(key)
    if value % of:
        raise s.error(key, f"{value} is no multiple of {of}: {why}")
    return value


def _moe_layers(s: Section, layers: int) -> tuple[int, ...]:
    """Read moe_layers_enum, "1,2" or [1, 2]; where it is missing, every layer but 0 has experts."""
    key = "moe_layers_enum"
    stated = s.get(key)
    if stated is None:
        return tuple(range(1, layers))
    parts = stated.split(",") if isinstance(stated, str) and stated.strip() else stated or []
    try:
        numbers = [int(n) if isinstance(n, str) else n for n in parts]
    except (TypeError, ValueError):
        numbers = [None]
    if isinstance(stated, dict) or not all(is_integer(n) for n in numbers):
        raise s.error(key, f"expected layer numbers ('1,2' or [1, 2]), found {stated!r}")
    wrong = [n for n in numbers if not 0 <= n < layers]
    if wrong:
        raise s.error(key, f"layer {wrong[0]} does not exist; layers: 0 to {layers - 1}")
    if len(set(numbers)) < len(numbers):
        raise s.error(key, f"a layer is named twice in {stated!r}")
    return tuple(sorted(numbers))


def _rope_theta(s: Section) -> float:
    """Read rope_theta, which newer files keep in rope_parameters."""
    if s.get("rope_parameters") is None:
        return s.positive("rope_theta")
    rope = s.section("rope_parameters")
    rope.only("rope_type", "default", "scaled RoPE is not available; expected 'default'")
    return rope.positive("rope_theta")


def _bos(s: Section, vocab: int) -> int | None:
    if s.get("bos_token_id") is None:
        return None
    return s.integer("bos_token_id", least=0, most=vocab - 1)


def _eos(s: Section, vocab: int) -> tuple[int, ...]:
    """Read eos_token_id, one number or a list."""
    stated = s.get("eos_token_id")
    ids = [] if stated is None else stated if isinstance(stated, list) else [stated]
    for n in ids:
        if not is_integer(n) or not 0 <= n < vocab:
            raise s.error("eos_token_id", f"expected token ids from 0 to {vocab - 1}, found {n!r}")
    return tuple(ids)


def _dtype(*sections: Section) -> str:
    """Read dtype or torch_dtype, which may stand at the top, in text_config or in both."""
    found = "bfloat16"
    seen: str | None = None
    for s in sections:
        key = s.spelling("dtype", "torch_dtype")
        stated = s.get(key)
        if stated is None:
            continue
        if stated not in DTYPES:
            raise s.error(key, f"{stated!r} is not supported; allowed: {', '.join(DTYPES)}")
        if seen not in (None, stated):
            raise s.error(key, f"{stated!r} contradicts {seen!r} at the top of the file")
        found = seen = stated
    return found


def _fp8_blocks(s: Section) -> bool:
    """Read quantization_config: missing, or FP8 in blocks of 128 x 128."""
    if s.get("quantization_config") is None:
        return False
    q = s.section("quantization_config")
    block = [FP8_BLOCK, FP8_BLOCK]
    for key in ("quant_method", "weight_block_size"):
        if q.get(key) is None:
            raise q.error(key, f"missing; the one supported scheme is 'fp8' with blocks {block}")
    q.only("quant_method", "fp8", "supported: 'fp8'; or remove quantization_config")
    q.only("weight_block_size", block, f"supported: {block}")
    q.only("fmt", "e4m3", "supported: 'e4m3'")
    return True
