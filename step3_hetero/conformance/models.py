"""Models whose stages are tried: odd small sizes, and Step-3's own with fewer experts."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import cache
from types import MappingProxyType

from step3_hetero.conformance.case import seeded
from step3_hetero.conformance.draws import dtype_of, weight
from step3_hetero.graph import StageGraph, build_graph
from step3_hetero.model.config import ModelConfig, TextConfig, VisionConfig, step3
from step3_hetero.specs import Cut, HostTensor

STACK_BYTES = 3 << 29
"""Experts of a real-size stack, all three matrices in bfloat16, take at most this: 1.5 GiB."""


def odd() -> ModelConfig:
    """Sizes that are multiples of nothing: a dense layer, then a MoE layer; and a vision tower."""
    text = TextConfig(
        hidden_size=40,
        num_hidden_layers=2,
        intermediate_size=56,
        num_attention_heads=3,
        num_attention_groups=1,
        head_dim=24,
        share_q_dim=20,
        moe_layers=(1,),
        moe_num_experts=5,
        moe_top_k=2,
        moe_intermediate_size=32,
        share_expert_dim=48,
        norm_expert_weight=False,
        rms_norm_eps=1e-3,
        rope_theta=1e4,
        max_positions=512,
        vocab_size=67,
        bos_token_id=None,
        eos_token_ids=(),
    )
    vision = VisionConfig(
        hidden_size=24,
        num_hidden_layers=2,
        num_attention_heads=3,
        num_channels=3,
        image_size=24,
        patch_size=4,
        intermediate_size=36,
        output_hidden_size=20,
        layer_norm_eps=1e-3,
        hidden_act="quick_gelu",
    )
    return ModelConfig(
        text=text,
        vision=vision,
        image_token_id=66,
        projector_stride=2,
        projector_bias=None,
        dtype="float32",
        fp8_blocks=False,
        name="odd",
    )


def real(experts: int) -> ModelConfig:
    """Step-3's own sizes with a dense and a MoE layer, the latter with fewer experts."""
    whole = step3()
    text = replace(
        whole.text, num_hidden_layers=2, moe_layers=(1,), moe_num_experts=experts, vocab_size=4096
    )
    return replace(whole, text=text, vision=None, image_token_id=None, name=f"step3-{experts}")


def kept_experts() -> int:
    """Return how many of Step-3's experts fit in STACK_BYTES.

    >>> kept_experts()
    7
    """
    text = step3().text
    return STACK_BYTES // (3 * text.hidden_size * text.moe_intermediate_size * 2)


MODELS: Mapping[str, Callable[[], ModelConfig]] = MappingProxyType(
    {"odd": odd, f"step3-{kept_experts()}-experts": lambda: real(kept_experts())}
)
"""Models by the name that a case carries."""


@cache
def graph_of(
    model: str, dtype: str, *, batch_invariant: bool = False, kv_dtype: str = ""
) -> StageGraph:
    """Return the stage graph of a model in ``dtype``."""
    return build_graph(
        MODELS[model](), dtype=dtype, batch_invariant=batch_invariant, kv_dtype=kv_dtype
    )


class Drawn:
    """A source of weights drawn by name, in the dtype in which a checkpoint would store them.

    ``stored`` as e4m3 holds for what a block-FP8 checkpoint compresses.
    """

    def __init__(self, model: str, dtype: str, stored: str = "") -> None:
        self.dtype = dtype
        self._drawn: dict[str, HostTensor] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.stored: dict[str, str] = {}
        for stage in graph_of(model, dtype).stages:
            for param in stage.params:
                for key, name in param.tensors.items():
                    self.shapes[name] = param.shapes[key]
                    self.stored[name] = stored if param.compressible else ""

    def tensor(self, name: str, cuts: Sequence[Cut] = ()) -> HostTensor:
        """Return one weight, drawn when it is first asked for."""
        if name not in self._drawn:
            self._drawn[name] = self._draw(name)
        return self._drawn[name].cut(cuts)

    def _draw(self, name: str) -> HostTensor:
        """Draw one weight; a norm's scale lies between one half and three halves."""
        rng, shape = seeded(name), self.shapes[name]
        if len(shape) == 1 and "norm" in name and not name.endswith("bias"):
            return HostTensor(name, (0.5 + rng.random(shape)).astype(dtype_of(self.dtype)))
        return weight(rng, shape, self.dtype, self.stored[name], name)
