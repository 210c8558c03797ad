"""Step-3's language model over a whole sequence at once, in float64.

Source: arXiv 2507.19427 and the published modelling code.
"""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from oracle.checkpoint import Array, Config, Weights, below, load
from oracle.vision import vision_forward

__all__ = ["load", "logits", "text_forward", "vision_forward"]


def text_forward(
    config: Config,
    weights: Weights,
    token_ids: Sequence[int],
    image_rows: Array | None = None,
    image_positions: Sequence[int] | None = None,
) -> Array:
    """Return the log-probabilities of the token that follows each position.

    Shapes: token_ids (tokens,), image_rows (n, hidden), image_positions (n,) -> (tokens, vocab).

    ``image_rows`` take the place of the embeddings at ``image_positions``, row by row.
    """
    x = logits(config, weights, token_ids, image_rows, image_positions)
    shifted = x - x.max(axis=-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))


def logits(
    config: Config,
    weights: Weights,
    token_ids: Sequence[int],
    image_rows: Array | None = None,
    image_positions: Sequence[int] | None = None,
) -> Array:
    """Return lm_head's output at each position. Arguments and shape as for ``text_forward``."""
    text = config.get("text_config", config)
    if text.get("rope_scaling") is not None:
        raise ValueError(f"rope_scaling is {text['rope_scaling']!r}; only null is defined")
    embedding = weights["model.embed_tokens.weight"]
    x = embedding[np.asarray(token_ids, dtype=np.int64)]  # (tokens, hidden), a copy
    if image_rows is not None:
        x[np.asarray(image_positions, dtype=np.int64)] = image_rows
    moe = moe_layers(text)
    for n in range(text["num_hidden_layers"]):
        x = block(text, below(weights, f"model.layers.{n}."), x, is_moe=n in moe)
    x = rms_norm(x, weights["model.norm.weight"], text["rms_norm_eps"])
    head = embedding if text.get("tie_word_embeddings") else weights["lm_head.weight"]
    return x @ head.T


def moe_layers(text: Config) -> set[int]:
    """Return the numbers of the layers with experts; where nothing is said, all but layer 0."""
    enum = text.get("moe_layers_enum")
    if enum is None:
        return set(range(1, text["num_hidden_layers"]))
    if isinstance(enum, str):
        return {int(n) for n in enum.split(",") if n.strip()}
    return {int(n) for n in enum}


def block(text: Config, layer: Weights, x: Array, *, is_moe: bool) -> Array:
    """One pre-norm layer: attention, then the feed-forward part, each added to its own input.

    Shapes: x (tokens, hidden) -> (tokens, hidden).
    """
    eps = text["rms_norm_eps"]
    u = rms_norm(x, layer["input_layernorm.weight"], eps)
    x = x + attention(text, below(layer, "self_attn."), u)
    u = rms_norm(x, layer["post_attention_layernorm.weight"], eps)
    if is_moe:
        return x + experts(text, below(layer, "moe."), u) + swiglu(below(layer, "share_expert."), u)
    return x + swiglu(below(layer, "mlp."), u)


def rms_norm(x: Array, weight: Array, eps: float) -> Array:
    """Scale each row to unit root mean square, then by ``weight``."""
    return x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + eps) * weight


def attention(text: Config, w: Weights, u: Array) -> Array:
    """Multi-matrix factorization attention: one low-rank query for all heads, few keys and values.

    Shapes: u (tokens, hidden) -> (tokens, hidden). Query head h reads key and value head
    h // (heads / groups).
    """
    tokens, heads, groups = len(u), text["num_attention_heads"], text["num_attention_groups"]
    low = rms_norm(u @ w["q_proj.weight"].T, w["inter_norm.weight"], text["rms_norm_eps"])
    q = split_heads(low @ w["wq.weight"].T, heads)
    k = split_heads(u @ w["k_proj.weight"].T, groups)
    v = split_heads(u @ w["v_proj.weight"].T, groups)
    positions = np.arange(tokens)
    q = rotate(q, positions, text["rope_theta"])
    k = rotate(k, positions, text["rope_theta"])
    k, v = (np.repeat(one, heads // groups, axis=0) for one in (k, v))

    scores = q @ k.swapaxes(1, 2) * text["head_dim"] ** -0.5  # (heads, queries, keys)
    scores = np.where(np.tri(tokens, dtype=bool), scores, -np.inf)
    out = softmax(scores) @ v  # (heads, tokens, head_dim)
    return out.swapaxes(0, 1).reshape(tokens, -1) @ w["o_proj.weight"].T


def split_heads(x: Array, heads: int) -> Array:
    """Shapes: x (tokens, heads * head_dim) -> (heads, tokens, head_dim)."""
    return x.reshape(len(x), heads, -1).swapaxes(0, 1)


def rotate(x: Array, positions: npt.NDArray[np.int64], theta: float) -> Array:
    """Rotary embedding over the whole head; element i is paired with element i + head_dim / 2.

    Shapes: x (heads, tokens, head_dim), positions (tokens,) -> as x.
    """
    half = x.shape[-1] // 2
    frequency = theta ** (-np.arange(half) / half)
    angle = positions[:, None] * frequency  # (tokens, half)
    first, second = x[..., :half], x[..., half:]
    cos, sin = np.cos(angle), np.sin(angle)
    return np.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)


def softmax(x: Array) -> Array:
    """Over the last axis."""
    e = np.exp(x - x.max(axis=-1, keepdims=True))
    return e / e.sum(axis=-1, keepdims=True)


def swiglu(w: Weights, u: Array) -> Array:
    """Shapes: u (tokens, hidden) -> (tokens, hidden)."""
    gate = u @ w["gate_proj.weight"].T
    up = u @ w["up_proj.weight"].T
    return gate * np.exp(-np.logaddexp(0, -gate)) * up @ w["down_proj.weight"].T


def experts(text: Config, w: Weights, u: Array) -> Array:
    """The routed experts, without the shared one.

    Shapes: u (tokens, hidden) -> (tokens, hidden).

    Every expert that any token chose runs over all tokens, with weight 0 where it was not chosen:
    a token's result then does not depend on the choices of the others, to the last bit.
    """
    share = route(
        u @ w["gate.weight"].T, text["moe_top_k"], renormalise=text.get("norm_expert_weight", False)
    )
    out = np.zeros_like(u)
    for e in np.flatnonzero(share.any(axis=0)):
        one = {f"{p}_proj.weight": w[f"{p}_proj.weight"][e] for p in ("gate", "up", "down")}
        out += share[:, e : e + 1] * swiglu(one, u)
    return out


def route(router_logits: Array, top_k: int, *, renormalise: bool) -> Array:
    """Return each expert's weight for each token, 0 where it is not chosen.

    Shapes: router_logits (tokens, experts) -> (tokens, experts).

    Softmax over all experts, then the ``top_k`` largest; of equal ones the lower number.
    """
    p = softmax(router_logits)
    chosen = np.argsort(-p, axis=-1, kind="stable")[:, :top_k]
    share = np.zeros_like(p)
    np.put_along_axis(share, chosen, np.take_along_axis(p, chosen, axis=-1), axis=-1)
    return share / share.sum(axis=-1, keepdims=True) if renormalise else share
