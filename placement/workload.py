"""What one decoded token asks for: FLOPs, KV bytes and weights, by part of the model.

A part is a kind of layer half that occurs ``layers`` times alike. The paper's nine models are data
(``paper_models.yaml``); Step-3 and any model of its form is counted from its config.json.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import yaml

from step3_hetero.errors import PlacementError
from step3_hetero.placement.attention_cores import (
    AttentionCore,
    ChunkedCore,
    GroupedCore,
    LatentCore,
    LightningCore,
)

if TYPE_CHECKING:
    from step3_hetero.model.config import ModelConfig, TextConfig

MODELS_FILE = Path(__file__).with_name("paper_models.yaml")
STAGES = ("attention", "ffn", "embed", "head")

ELEMENT_BYTES: Mapping[str, float] = MappingProxyType(
    {"fp32": 4.0, "bf16": 2.0, "fp8": 1.0, "int8": 1.0}
)
"""Bytes of one stored weight; the scales, under one in a thousand of them, are left out."""

PAPER_MLA_VALUE_DIM = 576
"""What the paper counts for MLA's second product; the latent itself has 512."""


@dataclass(frozen=True, slots=True)
class Part:
    """A kind of stage, ``layers`` times alike. Figures are for one layer and one token."""

    name: str  # "attention", "attention-local", "ffn-dense", "ffn-moe", "embed", "head", ...
    stage: str  # "attention" | "ffn" | "embed" | "head": what is placed together
    layers: int
    linear_flops: float  # projections, SwiGLU products of active experts and shared one, lm_head
    core: AttentionCore | None  # arithmetic and KV bytes that grow with the context
    weight_elements: float  # all that one layer holds, every routed expert included
    expert_elements: float = 0  # of these, one routed expert; 0: none
    experts: int = 0
    top_k: int = 0


@dataclass(frozen=True, slots=True)
class Workload:
    """One model as the planner and the cost tables see it."""

    name: str
    hidden: int
    layers: int
    parts: tuple[Part, ...]
    active_expert_fraction: float  # active over all experts, shared ones in both; dense: 1

    def part(self, name: str) -> Part:
        """Return the part of this name.

        Raises:
            PlacementError: the model has none.
        """
        for part in self.parts:
            if part.name == name:
                return part
        known = ", ".join(p.name for p in self.parts)
        raise PlacementError(f"{self.name} has no part {name!r}; parts: {known}")

    def of(self, stage: str) -> tuple[Part, ...]:
        """Return the parts that are placed together as ``stage``."""
        return tuple(part for part in self.parts if part.stage == stage)

    def attention_flops(self, context: int) -> float:
        """Return the FLOPs of the attention cores of all layers, for one token."""
        return sum(p.layers * core.flops(context) for p, core in self._cores())

    def kv_bytes(self, context: int, element_bytes: float = 1.0) -> float:
        """Return the KV bytes that all layers move for one token."""
        return sum(p.layers * core.kv_bytes(context, element_bytes) for p, core in self._cores())

    def held_bytes(self, context: int, element_bytes: float = 1.0) -> float:
        """Return the KV bytes that one sequence holds in all layers."""
        return sum(p.layers * core.held_bytes(context, element_bytes) for p, core in self._cores())

    @property
    def linear_flops(self) -> float:
        """Return the FLOPs of the attention's projections in all layers, for one token."""
        return self._linear("attention")

    @property
    def ffn_flops(self) -> float:
        """Return the FLOPs of the FFNs of all layers, for one token."""
        return self._linear("ffn")

    @property
    def head_flops(self) -> float:
        """Return the FLOPs of lm_head for one token."""
        return self._linear("head")

    def weight_elements(self, stage: str | None = None) -> float:
        """Return the weights of one stage in all layers, or of the whole model."""
        parts = self.parts if stage is None else self.of(stage)
        return sum(part.layers * part.weight_elements for part in parts)

    def weight_bytes(self, precision: str, stage: str | None = None) -> float:
        """Return the bytes of `weight_elements` in a precision of `ELEMENT_BYTES`."""
        return self.weight_elements(stage) * ELEMENT_BYTES[precision]

    def _linear(self, stage: str) -> float:
        return sum(part.layers * part.linear_flops for part in self.of(stage))

    def _cores(self) -> Iterator[tuple[Part, AttentionCore]]:
        return ((part, part.core) for part in self.parts if part.core is not None)


def paper_names() -> tuple[str, ...]:
    """Return the nine models' names as the paper's tables have them."""
    return tuple(_paper_models())


def paper_workload(model: str, *, mla_value_dim: int = PAPER_MLA_VALUE_DIM) -> Workload:
    """Return one of the paper's nine, by its name or short name; capitals do not matter.

    ``mla_value_dim`` is what MLA counts for its second product.

    Raises:
        PlacementError: the paper has no such model.
    """
    name = _paper_name(model)
    if name is None:
        known = "; ".join(f"{n} ({', '.join(d['short'])})" for n, d in _paper_models().items())
        raise PlacementError(f"unknown model {model!r}; models of the paper: {known}")
    return _of_data(name, _paper_models()[name], mla_value_dim)


def workload(model: str, *, mla_value_dim: int = PAPER_MLA_VALUE_DIM) -> Workload:
    """Return a model by what a command line says: a family, one of the paper's, or a folder.

    Names come first: a folder that is called like a model is meant by ``./name``.

    Raises:
        PlacementError: it is none of these.
        ConfigError: the folder's config.json is damaged or of another kind of model.
    """
    from step3_hetero.model.config import FAMILIES

    config = config_named(model)
    if config is not None:
        return step3_workload(config)
    try:
        return paper_workload(model, mla_value_dim=mla_value_dim)
    except PlacementError as error:
        families = ", ".join(FAMILIES)
        raise PlacementError(
            f"{error}; or {families}, or a folder with the config.json of a Step-3-like model"
        ) from None


def config_named(model: str) -> ModelConfig | None:
    """Return the config of a family or a folder; None where ``model`` means neither.

    Raises:
        ConfigError: as `workload`.
    """
    from step3_hetero.model.config import FAMILIES, FILE, ModelConfig

    name = model.strip().lower()
    if name in FAMILIES:
        return FAMILIES[name]()
    if _paper_name(model) is None and (Path(model) / FILE).is_file():
        return ModelConfig.read(Path(model))
    return None


def step3_workload(model: ModelConfig) -> Workload:
    """Count a Step-3-like model exactly: norms and router included, the vision path left out.

    A MoE layer's router belongs to its attention, so attention comes in two parts where the model
    has both kinds of layer.
    """
    text = model.text
    moe = len(text.moe_layers)
    dense = text.num_hidden_layers - moe
    plain = _mfa_part(text)
    router = text.hidden_size * text.moe_num_experts
    routed = replace(
        plain,
        name="attention-moe",
        layers=moe,
        linear_flops=plain.linear_flops + 2 * router,
        weight_elements=plain.weight_elements + router,
    )
    shared = 1 if text.share_expert_dim else 0
    active = (text.moe_top_k + shared) / (text.moe_num_experts + shared) if moe else 1.0
    parts = (
        replace(plain, name="attention-dense", layers=dense),
        routed,
        _ffn(text.hidden_size, {"layers": dense, "dense": text.intermediate_size}),
        _ffn(text.hidden_size, _experts(text)),
        *_ends(text.hidden_size, text.vocab_size, final_norm=text.hidden_size),
    )
    kept = tuple(part for part in parts if part.layers)
    return Workload(model.name, text.hidden_size, text.num_hidden_layers, kept, active)


def _mfa_part(text: TextConfig) -> Part:
    """Return MFA with its three norms, without a router."""
    shape = {
        "kind": "mfa",
        "layers": text.num_hidden_layers,
        "heads": text.num_attention_heads,
        "kv_heads": text.kv_heads,
        "head_dim": text.head_dim,
        "q_rank": text.share_q_dim,
    }
    part = _attention(text.hidden_size, shape, PAPER_MLA_VALUE_DIM)
    norms = 2 * text.hidden_size + text.share_q_dim
    return replace(part, weight_elements=part.weight_elements + norms)


def _experts(text: TextConfig) -> dict[str, Any]:
    return {
        "layers": len(text.moe_layers),
        "experts": text.moe_num_experts,
        "top_k": text.moe_top_k,
        "expert": text.moe_intermediate_size,
        "shared": text.share_expert_dim,
    }


@cache
def _paper_models() -> Mapping[str, dict[str, Any]]:
    models: dict[str, dict[str, Any]] = yaml.safe_load(MODELS_FILE.read_text("utf-8"))["models"]
    return MappingProxyType(models)


def _paper_name(model: str) -> str | None:
    wanted = model.strip().lower()
    for name, data in _paper_models().items():
        if wanted in (name.lower(), *data["short"]):
            return name
    return None


def _of_data(name: str, data: Mapping[str, Any], mla_value_dim: int) -> Workload:
    hidden = data["hidden"]
    attention = [_attention(hidden, shape, mla_value_dim) for shape in data["attention"]]
    ffn = [_ffn(hidden, shape) for shape in data["ffn"]]
    moe = [shape for shape in data["ffn"] if "experts" in shape]
    shared = moe[0].get("shared_experts", 0) if moe else 0
    active = (moe[0]["top_k"] + shared) / (moe[0]["experts"] + shared) if moe else 1.0
    parts = (*attention, *ffn, *_ends(hidden, data["vocab"]))
    return Workload(name, hidden, sum(part.layers for part in attention), parts, active)


PART_NAMES = MappingProxyType({"chunked": "attention-local", "lightning": "attention-lightning"})
"""Parts of the kinds of attention that share a model with full attention."""


def _attention(hidden: int, shape: Mapping[str, Any], mla_value_dim: int) -> Part:
    """Return attention of one kind, router and norms left out."""
    elements = _projections(hidden, shape)
    return Part(
        name=PART_NAMES.get(shape["kind"], "attention"),
        stage="attention",
        layers=shape["layers"],
        linear_flops=2 * elements,
        core=_core(shape, mla_value_dim),
        weight_elements=elements,
    )


def _core(shape: Mapping[str, Any], mla_value_dim: int) -> AttentionCore:
    kind, heads = shape["kind"], shape["heads"]
    if kind == "mla":
        return LatentCore(heads, shape["latent"] + shape["rope"], mla_value_dim)
    if kind == "lightning":
        return LightningCore(heads, shape["head_dim"], shape["flops_per_element"])
    stored = shape.get("kv_element_bytes")
    grouped = GroupedCore(heads, shape["kv_heads"], shape["head_dim"], stored)
    return ChunkedCore(grouped, shape["chunk"]) if kind == "chunked" else grouped


def _projections(hidden: int, shape: Mapping[str, Any]) -> float:
    """Return the elements of the matrices before and after the core."""
    kind, heads = shape["kind"], shape["heads"]
    if kind == "mla":
        q_rank, latent, rope = shape["q_rank"], shape["latent"], shape["rope"]
        nope, value = shape["nope"], shape["value"]
        queries = hidden * q_rank + q_rank * heads * (nope + rope)
        keys_values = hidden * (latent + rope) + latent * heads * (nope + value)
        return float(queries + keys_values + heads * value * hidden)
    wide = heads * shape["head_dim"]
    if kind == "lightning":  # queries, keys, values, the output's gate, the output
        return float(5 * hidden * wide)
    keys_values = 2 * hidden * shape["kv_heads"] * shape["head_dim"]
    if kind == "mfa":
        q_rank = shape["q_rank"]
        return float(hidden * q_rank + q_rank * wide + keys_values + wide * hidden)
    return float(2 * hidden * wide + keys_values)


def _ffn(hidden: int, shape: Mapping[str, Any]) -> Part:
    """Return SwiGLU, dense or of experts: three matrices of hidden x inner width."""
    if "dense" in shape:
        elements = 3.0 * hidden * shape["dense"]
        return Part("ffn-dense", "ffn", shape["layers"], 2 * elements, None, elements)
    expert = 3.0 * hidden * shape["expert"]
    shared = 3.0 * hidden * shape.get("shared", 0)
    return Part(
        name="ffn-moe",
        stage="ffn",
        layers=shape["layers"],
        linear_flops=2 * (shape["top_k"] * expert + shared),
        core=None,
        weight_elements=shape["experts"] * expert + shared,
        expert_elements=expert,
        experts=shape["experts"],
        top_k=shape["top_k"],
    )


def _ends(hidden: int, vocab: int, *, final_norm: int = 0) -> tuple[Part, Part]:
    """Return embedding, which computes nothing, and head; their tables are counted apart."""
    table = float(hidden * vocab)
    embed = Part("embed", "embed", 1, 0.0, None, table)
    return embed, Part("head", "head", 1, 2 * table, None, table + final_norm)
