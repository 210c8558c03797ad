"""Writes the random text checkpoints that are measured, once, into a cache folder.

The numbers are drawn so that activations keep their size from layer to layer. Names, layout and
``config.json`` are the published ones, in the spelling that vLLM reads as well.
"""

from __future__ import annotations

import json
import math
import zlib
from dataclasses import asdict, dataclass, field
from pathlib import Path
from tempfile import gettempdir
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt
from safetensors.numpy import save_file

CACHE = Path(gettempdir()) / "step3-hetero-bench"
"""Where checkpoints and logs go unless a bench is told otherwise."""

STORED: dict[str, type] = {"float32": np.float32, "bfloat16": ml_dtypes.bfloat16}

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Sizes:
    """A text model: layer 0 is dense, the others have experts. 461 MB in bfloat16 as it stands."""

    hidden_size: int = 1024
    num_hidden_layers: int = 8
    intermediate_size: int = 2816
    num_attention_heads: int = 16
    num_attention_groups: int = field(default=1, init=False)
    head_dim: int = 64
    share_q_dim: int = 512
    moe_num_experts: int = 16
    moe_top_k: int = 3
    moe_intermediate_size: int = 512
    share_expert_dim: int = 512
    norm_expert_weight: bool = False
    vocab_size: int = 8192
    max_position_embedding: int = 2048
    rope_theta: float = 500000.0
    rms_norm_eps: float = 1e-5
    dtype: str = "bfloat16"

    def config(self) -> dict[str, Any]:
        """Return what ``config.json`` says."""
        return {
            "architectures": ["Step3TextForCausalLM"],
            "model_type": "step3_text",
            "moe_layers_enum": ",".join(map(str, range(1, self.num_hidden_layers))),
            "max_seq_len": self.max_position_embedding,
            "torch_dtype": self.dtype,
            "hidden_act": "silu",
            "tie_word_embeddings": False,
            "bos_token_id": 0,
            "eos_token_id": self.vocab_size - 1,
            **asdict(self),
        }

    def shapes(self) -> dict[str, Shape]:
        """Return name and shape of every tensor."""
        shapes: dict[str, Shape] = {
            "model.embed_tokens.weight": (self.vocab_size, self.hidden_size),
            "model.norm.weight": (self.hidden_size,),
            "lm_head.weight": (self.vocab_size, self.hidden_size),
        }
        for n in range(self.num_hidden_layers):
            layer = self._attention() | (self._experts() if n else self._dense())
            shapes |= {f"model.layers.{n}.{name}.weight": shape for name, shape in layer.items()}
        return shapes

    def _attention(self) -> dict[str, Shape]:
        hidden, heads = self.hidden_size, self.num_attention_heads * self.head_dim
        return {
            "input_layernorm": (hidden,),
            "post_attention_layernorm": (hidden,),
            "self_attn.q_proj": (self.share_q_dim, hidden),
            "self_attn.k_proj": (self.head_dim, hidden),
            "self_attn.v_proj": (self.head_dim, hidden),
            "self_attn.inter_norm": (self.share_q_dim,),
            "self_attn.wq": (heads, self.share_q_dim),
            "self_attn.o_proj": (hidden, heads),
        }

    def _dense(self) -> dict[str, Shape]:
        return _swiglu("mlp", self.hidden_size, self.intermediate_size)

    def _experts(self) -> dict[str, Shape]:
        stack = (self.moe_num_experts,)
        return {
            "moe.gate": (self.moe_num_experts, self.hidden_size),
            **_swiglu("moe", self.hidden_size, self.moe_intermediate_size, stack),
            **_swiglu("share_expert", self.hidden_size, self.share_expert_dim),
        }

    def step_bytes(self, batch: int) -> float:
        """Return the bytes of weights, as stored, that one decode step has to read.

        Of ``batch`` tokens that choose k of E experts evenly, an expert is missed by all with
        probability (1 - k/E) ** batch. The embedding is a look-up of ``batch`` rows: not counted.
        """
        chosen = 1 - (1 - self.moe_top_k / self.moe_num_experts) ** batch
        elements = 0.0
        for name, shape in self.shapes().items():
            if name != "model.embed_tokens.weight":
                elements += math.prod(shape) * (chosen if len(shape) == 3 else 1)
        return elements * np.dtype(STORED[self.dtype]).itemsize


def _swiglu(prefix: str, hidden: int, inner: int, stack: Shape = ()) -> dict[str, Shape]:
    up, down = (*stack, inner, hidden), (*stack, hidden, inner)
    return {f"{prefix}.gate_proj": up, f"{prefix}.up_proj": up, f"{prefix}.down_proj": down}


def checkpoint(sizes: Sizes, cache: Path = CACHE) -> Path:
    """Return the folder of the checkpoint of these sizes, written on first use."""
    config = json.dumps(sizes.config(), indent=2)
    folder = cache / f"step3-{sizes.dtype}-{zlib.crc32(config.encode()):08x}"
    if not (folder / "config.json").exists():  # written last: a broken attempt starts again
        folder.mkdir(parents=True, exist_ok=True)
        stored = STORED[sizes.dtype]
        tensors: dict[str, npt.NDArray[Any]] = {
            name: draw(name, shape).astype(stored) for name, shape in sizes.shapes().items()
        }
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        (folder / "config.json").write_text(config, encoding="utf-8")
    return folder


def draw(name: str, shape: Shape) -> npt.NDArray[np.float32]:
    """Draw one tensor; a name gives the same numbers on every machine."""
    rng = np.random.default_rng(zlib.crc32(name.encode()))
    if "norm" in name:
        return 0.8 + 0.4 * rng.random(shape, dtype=np.float32)
    values = rng.standard_normal(shape, dtype=np.float32)
    return values if "embed" in name else values / np.float32(math.sqrt(shape[-1]))
