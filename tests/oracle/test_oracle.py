"""The language model of the oracle, against its definition spelled out in loops."""

import numpy as np
import pytest

from oracle import forward
from oracle.checkpoint import below
from oracle.random_checkpoint import write_checkpoint

TOKENS = [5, 99, 7, 7, 127, 0, 31, 64, 2]


@pytest.fixture
def model(tmp_path):
    return forward.load(write_checkpoint(tmp_path))


def normal(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape)


def test_probabilities_of_every_position_sum_to_one(model):
    p = np.exp(forward.text_forward(*model, TOKENS))

    assert p.shape == (len(TOKENS), 128)
    np.testing.assert_allclose(p.sum(axis=-1), 1, rtol=0, atol=1e-13)


def test_log_probabilities_differ_from_logits_by_one_number_a_position(model):
    shift = forward.logits(*model, TOKENS) - forward.text_forward(*model, TOKENS)

    np.testing.assert_allclose(shift, shift[:, :1].repeat(128, axis=1), rtol=0, atol=1e-12)


@pytest.mark.parametrize("changed", range(len(TOKENS)))
def test_a_token_changes_nothing_before_it_to_the_last_bit(model, changed):
    other = [*TOKENS[:changed], 77, *TOKENS[changed + 1 :]]
    before, after = (forward.text_forward(*model, ids) for ids in (TOKENS, other))

    np.testing.assert_array_equal(after[:changed], before[:changed])
    assert (after[changed:] != before[changed:]).any(axis=-1).all()


def test_a_prefix_alone_gives_the_same_as_inside_the_sequence(model):
    whole, alone = (forward.logits(*model, ids) for ids in (TOKENS, TOKENS[:4]))

    np.testing.assert_allclose(alone, whole[:4], rtol=0, atol=1e-12)


def test_scores_depend_on_the_distance_of_positions_only():
    q, k = normal(1, 1, 16, seed=1), normal(1, 1, 16, seed=2)

    def score(at_q, at_k):
        turned = [forward.rotate(x, np.array([at]), 500000.0) for x, at in ((q, at_q), (k, at_k))]
        return np.vdot(*turned)

    assert score(9, 4) == pytest.approx(score(1005, 1000), abs=1e-9)
    assert score(0, 0) == pytest.approx(np.vdot(q, k), abs=1e-12)
    assert abs(score(9, 4) - score(9, 5)) > 1e-3


def test_rotation_pairs_the_halves_and_slows_down_along_them():
    unit = np.eye(8)[None]  # one head, eight tokens, each with one element set
    turned = forward.rotate(unit, np.full(8, 3), 10000.0)[0]

    for i in range(4):
        angle = 3 * 10000.0 ** (-2 * i / 8)
        want = np.zeros(8)
        want[[i, i + 4]] = np.cos(angle), np.sin(angle)
        np.testing.assert_allclose(turned[i], want, rtol=0, atol=1e-15)
        want[[i, i + 4]] = -np.sin(angle), np.cos(angle)
        np.testing.assert_allclose(turned[i + 4], want, rtol=0, atol=1e-15)


def attention_in_loops(text, w, u):
    """One query, one head, one key at a time; the query's norm and the rotation written out."""
    heads, d = text["num_attention_heads"], text["head_dim"]
    per_group = heads // text["num_attention_groups"]
    out = np.zeros((len(u), heads * d))
    for t in range(len(u)):
        low = w["q_proj.weight"] @ u[t]
        low = low / np.sqrt(low @ low / len(low) + text["rms_norm_eps"]) * w["inter_norm.weight"]
        for h in range(heads):
            own, group = slice(h * d, h * d + d), h // per_group
            shared = slice(group * d, group * d + d)
            q = turn(w["wq.weight"][own] @ low, t, text["rope_theta"])
            keys = [
                turn(w["k_proj.weight"][shared] @ u[s], s, text["rope_theta"]) for s in range(t + 1)
            ]
            e = np.exp([q @ k / d**0.5 for k in keys])
            values = [w["v_proj.weight"][shared] @ u[s] for s in range(t + 1)]
            out[t, own] = sum(a * v for a, v in zip(e / e.sum(), values, strict=True))
    return out @ w["o_proj.weight"].T


def turn(x, position, theta):
    """Multiply the halves, read as real and imaginary parts, by a unit complex number."""
    half = len(x) // 2
    z = (x[:half] + 1j * x[half:]) * np.exp(
        1j * position * theta ** (-2 * np.arange(half) / len(x))
    )
    return np.concatenate([z.real, z.imag])


@pytest.mark.parametrize("groups", [1, 2, 4])
def test_attention_equals_a_loop_over_heads_and_keys(tmp_path, groups):
    options = {"num_attention_groups": groups, "rms_norm_eps": 0.05, "rope_theta": 100.0}
    text, weights = forward.load(write_checkpoint(tmp_path, **options))
    w = below(weights, "model.layers.0.self_attn.")
    u = normal(6, text["hidden_size"])

    got = forward.attention(text, w, u)

    np.testing.assert_allclose(got, attention_in_loops(text, w, u), rtol=0, atol=1e-12)


def silu(x):
    return x / (1 + np.exp(-x))


def experts_in_loops(text, w, u):
    """One token at a time, its experts picked by sorting (probability, number) pairs."""
    out = np.zeros_like(u)
    for t, row in enumerate(u):
        e = np.exp(w["gate.weight"] @ row)
        ranked = sorted((-p, n) for n, p in enumerate(e / e.sum()))[: text["moe_top_k"]]
        total = -sum(p for p, _ in ranked) if text["norm_expert_weight"] else 1.0
        for p, n in ranked:
            inner = silu(w["gate_proj.weight"][n] @ row) * (w["up_proj.weight"][n] @ row)
            out[t] += -p / total * (w["down_proj.weight"][n] @ inner)
    return out


@pytest.mark.parametrize("renormalise", [False, True])
def test_experts_equal_a_loop_over_tokens(tmp_path, renormalise):
    text, weights = forward.load(write_checkpoint(tmp_path, norm_expert_weight=renormalise))
    w = below(weights, "model.layers.1.moe.")
    u = normal(9, text["hidden_size"])

    got = forward.experts(text, w, u)

    np.testing.assert_allclose(got, experts_in_loops(text, w, u), rtol=0, atol=1e-12)


def test_router_weights_are_probabilities_over_all_experts():
    scores = np.log([[1.0, 4.0, 2.0, 3.0]])

    np.testing.assert_allclose(forward.route(scores, 2, renormalise=False), [[0, 0.4, 0, 0.3]])
    np.testing.assert_allclose(forward.route(scores, 2, renormalise=True), [[0, 4 / 7, 0, 3 / 7]])


def test_of_equally_probable_experts_the_lower_number_wins():
    scores = np.array([[0.0, 1, 1, 1, 1], [1, 0, 0, 0, 1]])

    chosen = forward.route(scores, 3, renormalise=False) > 0

    np.testing.assert_array_equal(chosen, [[0, 1, 1, 1, 0], [1, 1, 0, 0, 1]])


@pytest.mark.parametrize(
    ("text", "layers"),
    [
        ({"moe_layers_enum": "1,3"}, {1, 3}),
        ({"moe_layers_enum": " 1, 3,"}, {1, 3}),
        ({"moe_layers_enum": (1, 3)}, {1, 3}),
        ({"moe_layers_enum": ["1", "3"]}, {1, 3}),
        ({"moe_layers_enum": ""}, set()),
        ({"moe_layers_enum": None}, {1, 2, 3}),
        ({}, {1, 2, 3}),
    ],
    ids=str,
)
def test_moe_layers_in_every_spelling(text, layers):
    assert forward.moe_layers({"num_hidden_layers": 4, **text}) == layers


def test_image_rows_take_the_place_of_embeddings(model):
    _, weights = model
    at = [1, 4]
    rows = weights["model.embed_tokens.weight"][[TOKENS[i] for i in at]]
    hidden = [0 if i in at else token for i, token in enumerate(TOKENS)]

    got = forward.logits(*model, hidden, rows, at)

    np.testing.assert_array_equal(got, forward.logits(*model, TOKENS))


def test_a_call_leaves_the_weights_as_they_were(model):
    config, weights = model
    before = {name: w.copy() for name, w in weights.items()}

    forward.logits(config, weights, TOKENS, np.zeros((1, 48)), [0])

    for name, w in weights.items():
        np.testing.assert_array_equal(w, before[name], err_msg=name)


def test_rope_scaling_is_refused_by_value(model):
    config, weights = model
    with pytest.raises(ValueError, match="linear"):
        forward.logits(config | {"rope_scaling": {"type": "linear"}}, weights, TOKENS)
