"""Cut a model into stages: attention and FFN of every layer, with embed, vision and head around."""

from __future__ import annotations

from step3_hetero.graph.graph import Edge, GraphStage, StageGraph, check_graph
from step3_hetero.graph.params import (
    attention_params,
    embed_params,
    ffn_params,
    head_params,
    vision_params,
)
from step3_hetero.model.config import ModelConfig
from step3_hetero.specs import (
    AttentionSpec,
    EmbedSpec,
    FfnSpec,
    HeadSpec,
    RouterSpec,
    TensorSpec,
    VisionSpec,
    wide,
)


def build_graph(
    model: ModelConfig,
    *,
    dtype: str,
    router_logits: str = "fp32",
    batch_invariant: bool = False,
    kv_dtype: str = "",
) -> StageGraph:
    """Build and check the stage graph of ``model`` with activations in ``dtype``.

    ``kv_dtype`` is the KV cache's, empty for ``dtype``.

    Raises:
        EdgeMismatch: the stages do not fit together (a defect of the cut itself).
    """
    logits_dtype = wide(dtype) if router_logits == "fp32" else dtype
    cut = _Cut(model, dtype, logits_dtype, batch_invariant, kv_dtype)
    layers = range(model.text.num_hidden_layers)
    stages = [cut.vision()] if model.vision else []
    stages.append(cut.embed())
    for layer in layers:
        stages += [cut.attention(layer), cut.ffn(layer)]
    stages.append(cut.head())
    return check_graph(StageGraph(model.name, tuple(stages), tuple(_edges(stages))))


class _Cut:
    """Makes the stages of one model; holds what they share."""

    def __init__(
        self, model: ModelConfig, dtype: str, logits_dtype: str, batch_invariant: bool,
        kv_dtype: str,
    ) -> None:  # fmt: skip
        self.model = model
        self.text = model.text
        self.dtype = dtype
        self.logits_dtype = logits_dtype
        self.invariant = batch_invariant
        self.kv_dtype = kv_dtype
        self.x = TensorSpec("x", ("tokens", "hidden"), dtype)
        self.y = TensorSpec("y", ("tokens", "hidden"), dtype)
        self.u = TensorSpec("u", ("tokens", "hidden"), dtype)
        self.rows = TensorSpec("rows", ("image_rows", "hidden"), dtype)

    def routing(self, layer: int) -> tuple[TensorSpec, ...]:
        """Return the tensors that send a MoE layer's tokens to their experts."""
        if not self.text.is_moe(layer):
            return ()
        return (
            TensorSpec("weights", ("tokens", "top_k"), self.dtype),
            TensorSpec("ids", ("tokens", "top_k"), "int32"),
        )

    def embed(self) -> GraphStage:
        """Return the embedding; it takes image rows where the model sees."""
        t = self.text
        spec = EmbedSpec(self.dtype, t.vocab_size, t.hidden_size, self.invariant)
        takes = (self.rows,) if self.model.vision else ()
        return GraphStage("embed", None, spec, embed_params(self.model, spec), takes, (self.x,))

    def attention(self, layer: int) -> GraphStage:
        """Return the attention half of a layer."""
        t = self.text
        spec = AttentionSpec(
            dtype=self.dtype,
            hidden=t.hidden_size,
            heads=t.num_attention_heads,
            kv_heads=t.num_attention_groups,
            head_dim=t.head_dim,
            q_rank=t.share_q_dim,
            eps=t.rms_norm_eps,
            theta=t.rope_theta,
            max_positions=t.max_positions,
            adds=layer > 0,
            router=self._router() if t.is_moe(layer) else None,
            batch_invariant=self.invariant,
            kv_dtype=self.kv_dtype,
        )
        takes = (self.x, self.y) if spec.adds else (self.x,)
        gives = (self.x, self.u, *self.routing(layer))
        params = attention_params(self.model, spec, layer)
        return GraphStage(f"attention[{layer}]", layer, spec, params, takes, gives)

    def _router(self) -> RouterSpec:
        t = self.text
        return RouterSpec(t.moe_num_experts, t.moe_top_k, t.norm_expert_weight, self.logits_dtype)

    def ffn(self, layer: int) -> GraphStage:
        """Return the FFN half of a layer, dense or MoE."""
        t = self.text
        moe = {
            "inter": t.moe_intermediate_size,
            "experts": t.moe_num_experts,
            "top_k": t.moe_top_k,
            "shared_inter": t.share_expert_dim,
        }
        sizes = moe if t.is_moe(layer) else {"inter": t.intermediate_size}
        spec = FfnSpec(self.dtype, t.hidden_size, batch_invariant=self.invariant, **sizes)
        params = ffn_params(self.model, spec, layer)
        takes = (self.u, *self.routing(layer))
        return GraphStage(f"ffn[{layer}]", layer, spec, params, takes, (self.y,))

    def head(self) -> GraphStage:
        """Return the final norm and lm_head."""
        t = self.text
        spec = HeadSpec(self.dtype, t.hidden_size, t.vocab_size, t.rms_norm_eps, self.invariant)
        logits = TensorSpec("logits", ("rows", "vocab"), wide(self.dtype))
        params = head_params(self.model, spec)
        return GraphStage("head", None, spec, params, (self.x, self.y), (logits,))

    def vision(self) -> GraphStage:
        """Return the vision tower with downsamplers and projector."""
        v = self.model.vision
        assert v is not None
        spec = VisionSpec(
            dtype=self.dtype,
            channels=v.num_channels,
            width=v.hidden_size,
            layers=v.num_hidden_layers,
            heads=v.num_attention_heads,
            inter=v.intermediate_size,
            patch=v.patch_size,
            image_size=v.image_size,
            down_width=v.output_hidden_size,
            hidden=self.text.hidden_size,
            stride=self.model.projector_stride,
            eps=v.layer_norm_eps,
            batch_invariant=self.invariant,
        )
        params = vision_params(self.model, spec)
        return GraphStage("vision", None, spec, params, (), (self.rows,))


def _edges(stages: list[GraphStage]) -> list[Edge]:
    """Join each stage to the later ones that take what it gives."""
    named = {s.name: s for s in stages}
    head = named["head"]
    attention = [s for s in stages if s.kind == "attention"]
    ffn = [s for s in stages if s.kind == "ffn"]
    edges = []
    if "vision" in named:
        edges.append(Edge("vision", "embed", "image", named["vision"].gives))
    edges.append(Edge("embed", attention[0].name, "embedding", named["embed"].gives))
    for a, f, after in zip(attention, ffn, [*attention[1:], head], strict=True):
        edges.append(Edge(a.name, f.name, "A2F", a.gives[1:]))
        edges.append(Edge(a.name, after.name, "residual", a.gives[:1]))
        edges.append(Edge(f.name, after.name, "F2A", f.gives))
    return edges
