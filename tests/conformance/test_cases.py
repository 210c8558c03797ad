"""The cases themselves: each its own id, the same inputs everywhere, every op in every dtype."""

import numpy as np
import pytest

from step3_hetero.conformance.case import DTYPES, Case, op
from step3_hetero.conformance.cases import OPS_CASES, STAGE_CASES, trials
from step3_hetero.conformance.draws import DRAWS, TILE, lay_out, tiled
from step3_hetero.conformance.forms import FORMS
from step3_hetero.conformance.models import STACK_BYTES, kept_experts
from step3_hetero.conformance.stages import PADDING, padded
from step3_hetero.conformance.whole_model import Answers, partings
from step3_hetero.graph import build_graph
from step3_hetero.model.config import step3
from step3_hetero.ops import OPS

WIDE_ONLY = {"route", "sample", "dequantise"}
"""Ops whose operands are never in bfloat16: W, or a wire format."""


def test_every_op_has_cases_in_every_dtype_it_can_have():
    found = {(c.op, c.dtype) for c in OPS_CASES}
    for name in OPS:
        for dtype in DTYPES[:1] if name in WIDE_ONLY else DTYPES:
            assert (name, dtype) in found


def test_every_kind_of_stage_has_cases_in_both_dtypes():
    found = {(c.kind, c.dtype) for c in STAGE_CASES}
    kinds = ("embed", "vision", "attention", "ffn", "head", "layer")
    assert found >= {(kind, dtype) for kind in kinds for dtype in DTYPES}


def test_id_says_all_that_the_case_varies():
    (case,) = op("linear", {"tokens": 3, "in": 4, "out": (5, 6)}, draw="spread",
                 stored="float8_e4m3fn", dtypes=("bfloat16",), out_dtype="float32")  # fmt: skip
    assert case.id == (
        "linear[tokens=3,in=4,out=5+6,out_dtype=float32,stored=float8_e4m3fn,bfloat16,spread]"
    )


def test_a_case_draws_the_same_numbers_again_and_another_case_others():
    one, again, other = (
        FORMS["add"].draw(case, case.rng()).arrays["x"]
        for case in (
            Case("add", "float32", {"tokens": 4, "hidden": 8}),
            Case("add", "float32", {"tokens": 4, "hidden": 8}),
            Case("add", "float32", {"tokens": 4, "hidden": 8}, draw="spread"),
        )
    )
    np.testing.assert_array_equal(one, again)
    assert (one != other).all()
    assert one[0, :3].tolist() == pytest.approx(NUMBERS, abs=0)


NUMBERS = [1.5166586637496948, 0.05335112661123276, -0.5351616144180298]
"""The first numbers of add[tokens=4,hidden=8,float32], on any machine."""


def test_large_weights_repeat_a_tile_in_another_order():
    rng = np.random.default_rng(0)
    drawn = tiled(rng, (2 * TILE + 5,))
    first, second = np.sort(drawn[:TILE]), np.sort(drawn[TILE : 2 * TILE])
    np.testing.assert_array_equal(first, second)
    assert (drawn[:TILE] != drawn[TILE : 2 * TILE]).any()


def test_real_expert_stack_is_cut_to_what_its_name_says():
    text = step3().text
    matrix = text.hidden_size * text.moe_intermediate_size * 2
    assert 3 * matrix * kept_experts() <= STACK_BYTES < 3 * matrix * (kept_experts() + 1)
    assert any(f"experts={kept_experts()}" in name for name in trials())


def test_suite_holds_the_ugly_shapes():
    ids = "\n".join(trials())
    for said in ("tokens=0", "tokens=1,", "contexts=65536", "padding=4", "one-expert", "ties",
                 "underflow", "huge", "minute", "infinities", "zero-rows", "overflowing",
                 "halfway", "stored=float8_e4m3fn", "heads=64,kv_heads=1,head_dim=256",
                 "in=7168", "experts=48", "inter=18432", "dtype=int8"):  # fmt: skip
        assert said in ids, said


def test_sequences_lie_in_shuffled_blocks_that_no_two_share():
    meta = lay_out(np.random.default_rng(1), (3, 1), (300, 200), 12)
    used = [*meta.block_tables[0, :3], *meta.block_tables[1, :2]]
    assert len(set(used)) == 5
    assert sorted(used) != used
    last = meta.block_tables[0, 299 // 128] * 128 + 299 % 128
    assert meta.slots.tolist()[2] == last


def test_padding_adds_rows_that_write_nothing():
    case = next(c for c in STAGE_CASES if c.kind == "attention" and len(c.queries) == 3)
    inputs = case.inputs()
    longer = padded(inputs, np.random.default_rng(0))
    assert longer.meta.tokens == inputs.meta.tokens + PADDING
    assert (longer.meta.slots[-PADDING:] == -1).all()
    assert longer.meta.query_starts[-1] == inputs.meta.tokens


def asked():
    """Return every OpSpec that a device is asked for: by the cases, and by the stages of Step-3."""
    stages = build_graph(step3(), dtype="bfloat16").stages
    yield from (spec for trial in trials().values() for spec in trial.specs())
    yield from (spec for stage in stages for spec in stage.spec.ops("auto"))


def test_every_op_is_asked_for_with_the_dims_and_parameters_that_its_entry_names():
    for spec in asked():
        op_ = OPS[spec.op]
        assert set(op_.dims) <= set(spec.dims), spec
        assert set(op_.parameters) <= set(spec.parameters), spec
        assert (spec.weight_format is not None) == op_.prepared, spec


def test_focused_queries_give_most_of_their_weight_to_one_far_key():
    (case,) = (c for c in OPS_CASES if c.draw == "focused" and c.dtype == "float32"
               and 65536 in c.sizes("contexts"))  # fmt: skip
    inputs = FORMS["attention"].draw(case, case.rng())
    keys = inputs.history[0][inputs.meta.block_tables[0]].reshape(-1, case.size("head_dim"))
    scores = inputs.arrays["q"][0] @ keys.T * case.parameters["scale"]
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    assert np.median(weights[:, 0] / weights.sum(-1)) > 0.9


def test_extremes_reach_both_ends_of_a_wire_format():
    from step3_hetero.conformance.trial import reference

    x = DRAWS["extremes"](np.random.default_rng(0), (40, 256)).astype(np.float32)
    q, _ = reference().kernel("quantise")(x, dtype="int8")
    assert set(np.unique(q[(x != 0).all(-1)])) >= {-127, 127}
    assert np.abs(q.astype(int)).max() == 127


def answers_of(logits):
    shifted = np.asarray(logits, float) - np.log(np.exp(logits).sum(-1, keepdims=True))
    return Answers([tuple(np.argmax(shifted, -1))], [shifted])


def test_another_greedy_token_is_legal_only_within_the_rounding_of_the_reference():
    want = answers_of([[2.0, 1.0], [1.000, 1.001]])
    coarse = answers_of([[2.0, 1.001], [1.0005, 1.0]])
    fine = answers_of([[2.0, 1.0000001], [1.000, 1.001]])
    got = answers_of([[2.0, 1.0], [1.002, 1.001]])
    assert partings(got, want, coarse) == []
    (finding,) = partings(got, want, fine)
    assert "question 0: first other token at place 1, margin 0.001" in finding.message
