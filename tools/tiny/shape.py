"""The tiny model's sizes, under the key names that the released checkpoints use.

The dataclasses are the one source: the network reads them, and the JSON files are written from
them.
"""

from dataclasses import asdict, dataclass
from typing import Any

from tiny.text import BOS, EOS_IDS, IMAGE, VOCABULARY


@dataclass(frozen=True)
class TextShape:
    """``text_config`` of config.json."""

    hidden_size: int = 96
    intermediate_size: int = 256
    num_attention_heads: int = 4
    num_attention_groups: int = 1
    num_hidden_layers: int = 4
    head_dim: int = 32
    share_q_dim: int = 64
    vocab_size: int = len(VOCABULARY)
    moe_num_experts: int = 8
    moe_top_k: int = 3
    moe_intermediate_size: int = 64
    share_expert_dim: int = 64
    moe_layers_enum: str = "1,2"
    norm_expert_weight: bool = False
    max_seq_len: int = 4096
    max_position_embedding: int = 4096
    rms_norm_eps: float = 1e-5
    rope_theta: float = 500000.0
    rope_scaling: None = None
    tie_word_embeddings: bool = False

    @property
    def moe_layers(self) -> frozenset[int]:
        """The numbers of the layers whose FFN is a mixture of experts."""
        return frozenset(int(n) for n in self.moe_layers_enum.split(","))


@dataclass(frozen=True)
class VisionShape:
    """``vision_config`` of config.json."""

    hidden_size: int = 64
    intermediate_size: int = 256
    num_hidden_layers: int = 2
    num_attention_heads: int = 4
    num_channels: int = 3
    image_size: int = 32
    patch_size: int = 4
    output_hidden_size: int = 96
    hidden_act: str = "quick_gelu"
    layer_norm_eps: float = 1e-6

    @property
    def grid(self) -> int:
        """Patches on one side of the whole view."""
        return self.image_size // self.patch_size

    @property
    def image_tokens(self) -> int:
        """Rows that one whole view gives: a 2x2 conv, then a padded 3x3, both of stride 2."""
        halved = (self.grid - 2) // 2 + 1
        return ((halved - 1) // 2 + 1) ** 2


@dataclass(frozen=True)
class ImageRules:
    """preprocessor_config.json: how a picture becomes pixels.

    ``max_side`` equals ``image_size``: a larger picture is scaled down first, so that a square
    picture of any size is one whole view, which is all the model has learnt. Only a picture more
    than 1.5 times as long as wide is cut into crops.
    """

    image_mean: tuple[float, ...] = (0.48145466, 0.4578275, 0.40821073)
    image_std: tuple[float, ...] = (0.26862954, 0.26130258, 0.27577711)
    image_size: int = 32
    crop_size: int = 24
    max_side: int = 32
    min_side: int = 8
    max_ratio: float = 4.0
    window_ratio: float = 1.5
    crop_round_up: float = 0.2


TEXT, VISION, RULES = TextShape(), VisionShape(), ImageRules()


def config_json() -> dict[str, Any]:
    """Return config.json in the released layout."""
    ids = {"bos_token_id": VOCABULARY.index(BOS), "eos_token_id": EOS_IDS}
    return {
        "architectures": ["Step3VLForConditionalGeneration"],
        "model_type": "step3_vl",
        "image_token_id": VOCABULARY.index(IMAGE),
        "understand_projector_stride": 2,
        "projector_bias": False,
        "torch_dtype": "bfloat16",
        "text_config": {
            "architectures": ["Step3TextForCausalLM"],
            "model_type": "step3_text",
            **asdict(TEXT),
            **ids,
            "torch_dtype": "bfloat16",
        },
        "vision_config": {"model_type": "step3_vision_encoder", **asdict(VISION)},
    }


def preprocessor_json() -> dict[str, Any]:
    """Return preprocessor_config.json."""
    return {"processor_class": "Step3VLProcessor", **asdict(RULES)}
