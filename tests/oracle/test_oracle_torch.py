"""The oracle's two networks against PyTorch's own operators, in float64."""

import numpy as np
import pytest

from oracle import forward, resample
from oracle.random_checkpoint import Vision, write_checkpoint

torch = pytest.importorskip("torch", reason="torch is not installed")
F = torch.nn.functional


def tensors(weights):
    return {name: torch.from_numpy(w) for name, w in weights.items()}


def eager_text(text, w, ids, moe_layers):
    """The language model in torch operators; a batch of one, heads on axis 1."""
    hidden, eps = text["hidden_size"], text["rms_norm_eps"]
    x = F.embedding(torch.tensor([ids]), w["model.embed_tokens.weight"])
    for n in range(text["num_hidden_layers"]):
        layer = {k.split(f"layers.{n}.")[1]: v for k, v in w.items() if f".layers.{n}." in k}
        u = F.rms_norm(x, (hidden,), layer["input_layernorm.weight"], eps)
        x = x + eager_attention(text, layer, u)
        u = F.rms_norm(x, (hidden,), layer["post_attention_layernorm.weight"], eps)
        x = x + (eager_moe(text, layer, u) if n in moe_layers else eager_swiglu(layer, "mlp.", u))
    x = F.rms_norm(x, (hidden,), w["model.norm.weight"], eps)
    return F.log_softmax(F.linear(x, w["lm_head.weight"]), dim=-1)[0]


def eager_attention(text, w, u):
    low = F.linear(u, w["self_attn.q_proj.weight"])
    low = F.rms_norm(low, low.shape[-1:], w["self_attn.inter_norm.weight"], text["rms_norm_eps"])
    projections = ((low, "wq"), (u, "k_proj"), (u, "v_proj"))
    q, k, v = (
        F.linear(x, w[f"self_attn.{name}.weight"])
        .unflatten(-1, (-1, text["head_dim"]))
        .transpose(1, 2)
        for x, name in projections
    )
    half = text["head_dim"] // 2
    angle = torch.outer(
        torch.arange(u.shape[1], dtype=torch.float64),
        text["rope_theta"] ** -(torch.arange(half, dtype=torch.float64) / half),
    )
    angle = torch.cat([angle, angle], dim=-1)

    def rotate_half(x):
        return torch.cat([-x[..., half:], x[..., :half]], dim=-1)

    q, k = (x * angle.cos() + rotate_half(x) * angle.sin() for x in (q, k))
    out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    return F.linear(out.transpose(1, 2).flatten(2), w["self_attn.o_proj.weight"])


def eager_swiglu(w, prefix, u):
    gate, up = (F.linear(u, w[f"{prefix}{name}_proj.weight"]) for name in ("gate", "up"))
    return F.linear(F.silu(gate) * up, w[f"{prefix}down_proj.weight"])


def eager_moe(text, w, u):
    p, chosen = F.linear(u, w["moe.gate.weight"]).softmax(-1).topk(text["moe_top_k"], dim=-1)
    up = torch.einsum("btkih,bth->btki", w["moe.up_proj.weight"][chosen], u)
    gate = torch.einsum("btkih,bth->btki", w["moe.gate_proj.weight"][chosen], u)
    inner = F.silu(gate) * up
    routed = torch.einsum("btk,btkhi,btki->bth", p, w["moe.down_proj.weight"][chosen], inner)
    return routed + eager_swiglu(w, "share_expert.", u)


@pytest.mark.parametrize("groups", [1, 2])
def test_language_model_agrees_with_torch(tmp_path, groups):
    options = {"num_attention_groups": groups, "rms_norm_eps": 0.05, "rope_theta": 100.0}
    text, weights = forward.load(write_checkpoint(tmp_path, **options))
    ids = list(range(3, 60, 4))

    got = forward.text_forward(text, weights, ids)
    want = eager_text(text, tensors(weights), ids, moe_layers={1, 2})

    np.testing.assert_allclose(got, want.numpy(), rtol=0, atol=1e-11)


def eager_vision(vision, w, pixels):
    """The vision path in torch operators; a batch of one."""
    e = {k.removeprefix("vision_model.embeddings."): v for k, v in w.items()}
    x = F.conv2d(
        pixels[None],
        e["patch_embedding.weight"],
        e["patch_embedding.bias"],
        stride=vision["patch_size"],
    )
    grid = x.shape[-1]
    table, native = e["position_embedding.weight"], vision["image_size"] // vision["patch_size"]
    places = table[1:].T.reshape(1, -1, native, native)
    if grid != native:
        places = F.interpolate(places, (grid, grid), mode="bicubic", antialias=True)
    class_row = e["class_embedding"] + table[:1]
    patches = (x + places).flatten(2).transpose(1, 2)
    x = torch.cat([class_row.expand(1, 4, -1), patches], dim=1)
    for n in range(vision["num_hidden_layers"]):
        x = eager_vision_layer(vision, w, f"vision_model.transformer.layers.{n}.", x)
    x = x[:, 4:].transpose(1, 2).unflatten(-1, (grid, grid))
    x = F.conv2d(x, w["vit_downsampler.weight"], w["vit_downsampler.bias"], stride=2)
    x = F.conv2d(x, w["vit_downsampler2.weight"], w["vit_downsampler2.bias"], stride=2, padding=1)
    x = x.flatten(2).transpose(1, 2)
    return F.linear(x, w["vit_large_projector.weight"], w.get("vit_large_projector.bias"))[0]


def eager_vision_layer(vision, w, prefix, x):
    width, heads = vision["hidden_size"], vision["num_attention_heads"]

    def linear(x, name):
        return F.linear(x, w[f"{prefix}{name}.weight"], w[f"{prefix}{name}.bias"])

    def norm(x, name):
        affine = w[f"{prefix}{name}.weight"], w[f"{prefix}{name}.bias"]
        return F.layer_norm(x, (width,), *affine, vision["layer_norm_eps"])

    q, k, v = (
        part.unflatten(-1, (heads, -1)).transpose(1, 2)
        for part in linear(x, "self_attn.qkv_proj").chunk(3, dim=-1)
    )
    out = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
    x = x + norm(linear(out, "self_attn.out_proj"), "layer_norm1")
    inner = linear(x, "mlp.fc1")
    return x + norm(linear(inner * torch.sigmoid(1.702 * inner), "mlp.fc2"), "layer_norm2")


@pytest.mark.parametrize("projector_bias", [False, True])
@pytest.mark.parametrize("side", [32, 24, 40], ids=["view", "crop", "larger"])
def test_vision_tower_agrees_with_torch(tmp_path, side, projector_bias):
    vision = Vision(layer_norm_eps=0.05)
    folder = write_checkpoint(tmp_path, vision=vision, projector_bias=projector_bias)
    config, weights = forward.load(folder)
    pixels = np.random.default_rng(side).standard_normal((3, side, side))

    got = forward.vision_forward(config, weights, pixels)
    want = eager_vision(config["vision_config"], tensors(weights), torch.from_numpy(pixels))

    assert got.shape == ({32: 4, 24: 4, 40: 9}[side], 48)
    np.testing.assert_allclose(got, want.numpy(), rtol=0, atol=1e-11)


@pytest.mark.parametrize("size", [(9, 14), (5, 5), (31, 8), (20, 40), (20, 31), (13, 7)], ids=str)
@pytest.mark.parametrize("mode", ["bilinear", "bicubic"])
def test_resize_agrees_with_torch(mode, size):
    planes = np.random.default_rng(1).standard_normal((2, 20, 31))
    kernel = {"bilinear": resample.triangle, "bicubic": resample.cubic}[mode]

    got = resample.resize(planes, *size, kernel)
    want = F.interpolate(torch.from_numpy(planes)[None], size, mode=mode, antialias=True)[0]

    np.testing.assert_allclose(got, want.numpy(), rtol=0, atol=1e-12)
