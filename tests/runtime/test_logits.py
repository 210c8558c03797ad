"""The engine against a separately written float64 forward, and against itself."""

import numpy as np
import pytest
from oracle.forward import load as load_oracle
from oracle.forward import text_forward
from oracle.random_checkpoint import write_checkpoint

PLACEMENTS = [
    ("cpu", "cpu"),
    ("reference", "reference"),
    ("cpu", "reference"),
    ("reference", "cpu"),
]
BOUND = 2e-5


@pytest.mark.parametrize("attention,ffn", PLACEMENTS)
@pytest.mark.parametrize("tokens", [1, 2, 127, 128, 129, 500])
def test_log_probabilities_agree_with_the_oracle(
    attention, ffn, tokens, engine_of, oracle, prompt, log_softmax
):
    ids = prompt(tokens, seed=tokens)
    got = log_softmax(engine_of(attention, ffn).logits(ids))
    assert np.abs(got - oracle(ids)).max() < BOUND


def test_reference_in_float64_agrees_to_fourteen_digits(engine_of, oracle, prompt, log_softmax):
    ids = prompt(40)
    engine = engine_of("reference", "reference", dtype="fp64")
    assert np.abs(log_softmax(engine.logits(ids)) - oracle(ids)).max() < 1e-12


@pytest.mark.parametrize("attention,ffn", PLACEMENTS[:3])
@pytest.mark.parametrize("chunk", [1, 37])
def test_prefill_in_chunks_agrees_with_one_piece(
    attention, ffn, chunk, engine_of, oracle, prompt, log_softmax
):
    ids = prompt(140)
    got = log_softmax(engine_of(attention, ffn, prefill_chunk=chunk).logits(ids))
    assert np.abs(got - oracle(ids)).max() < BOUND


@pytest.mark.parametrize("attention,ffn", PLACEMENTS[:3])
def test_batch_invariant_prefill_is_the_same_bits_however_it_is_cut(
    attention, ffn, engine_of, prompt
):
    ids = prompt(140)
    whole, *others = (
        engine_of(attention, ffn, batch_invariant=True, prefill_chunk=chunk).logits(ids)
        for chunk in (512, 37, 1)
    )
    for other in others:
        np.testing.assert_array_equal(whole, other)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_batch_invariance_holds_in_each_dtype_of_cpu(dtype, engine_of, prompt):
    ids = prompt(30)
    one, other = (
        engine_of(batch_invariant=True, dtype=dtype, prefill_chunk=chunk).logits(ids)
        for chunk in (512, 7)
    )
    np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("renormalise,theta,groups", [(False, 1e4, 1), (True, 5e5, 5)])
def test_other_shapes_agree_with_the_oracle(
    renormalise, theta, groups, tmp_path, engine_of, prompt, log_softmax
):
    model = write_checkpoint(
        tmp_path / "m",
        norm_expert_weight=renormalise,
        rope_theta=theta,
        num_attention_heads=10,
        num_attention_groups=groups,
        moe_layers_enum=(0, 1, 2, 3),
        vocab_size=130,
    )
    ids = prompt(60)
    want = text_forward(*load_oracle(model), np.array(ids))
    for attention, ffn in PLACEMENTS[:3]:
        got = log_softmax(engine_of(attention, ffn, model=model).logits(ids))
        assert np.abs(got - want).max() < BOUND


@pytest.mark.parametrize("dtype,bound", [("fp8", BOUND), ("bf16", BOUND)])
def test_stored_dtypes_are_read_exactly(dtype, bound, tmp_path, engine_of, prompt, log_softmax):
    model = write_checkpoint(tmp_path / "m", dtype=dtype, hidden_size=160, vocab_size=130, seed=3)
    ids = prompt(50)
    want = text_forward(*load_oracle(model), np.array(ids))
    for attention, ffn in PLACEMENTS[:3]:
        got = log_softmax(engine_of(attention, ffn, model=model).logits(ids))
        assert np.abs(got - want).max() < bound


def test_bfloat16_errs_like_bfloat16_and_no_more(engine_of, oracle, prompt, log_softmax):
    ids = prompt(120)
    want = oracle(ids)
    rms = {
        backend: float(
            np.sqrt(
                np.mean(
                    (log_softmax(engine_of(backend, backend, dtype="bf16").logits(ids)) - want) ** 2
                )
            )
        )
        for backend in ("reference", "cpu")
    }
    assert 1e-4 < rms["cpu"] < 2 * rms["reference"] < 1


def test_router_logits_can_follow_the_published_code(engine_of, prompt):
    ids = prompt(64)
    ours = engine_of(dtype="bf16").logits(ids)
    published = engine_of(dtype="bf16", router_logits="model").logits(ids)
    assert not np.array_equal(ours, published)
