"""Bisect names what is wrong, and nothing when nothing is."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from conformance.bisect_defects import (
    DEFECTS,
    Planted,
    Unscaled,
    View,
    planted,
    subject_of,
    wrong_weights,
)
from oracle.random_checkpoint import write_checkpoint
from safetensors.numpy import load_file, save_file

from step3_hetero.composed import compose
from step3_hetero.conformance.bisect import bisect
from step3_hetero.errors import RequestError
from step3_hetero.registry import get_backend

ROOT = Path(__file__).resolve().parents[2]
TINY = ROOT / "models" / "tiny-step3-digits"
QUESTION = "what is the sum ?"
ROLE = {"attention": "a", "ffn": "f"}


def find(defect, backend, **options):
    device = planted(defect.kind, defect.layer(), defect.plant, backend)
    subject = subject_of(TINY, device, role=ROLE[defect.kind], **options)
    return bisect(subject, ROLE[defect.kind], QUESTION, max_tokens=2, ignore_eos=True)


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize("defect", DEFECTS, ids=lambda d: d.name.replace(" ", "-"))
def test_defect_is_named_by_layer_stage_and_op(defect, backend):
    found = find(defect, backend).divergence
    assert (found.layer, found.stage) == (defect.layer(), f"{defect.kind}[{defect.layer()}]")
    assert found.call == defect.call or found.call.startswith(f"{defect.call} (call ")
    assert found.op == defect.call.split()[0]


def test_stage_whose_ops_are_all_right_is_named_as_such():
    def plant(device, spec, weights, cache, limits):
        return Unscaled(device, spec, weights, cache)

    subject = subject_of(TINY, planted("attention", 2, plant, "cpu"))
    found = bisect(subject, "a", QUESTION, max_tokens=1)
    assert (found.divergence.stage, found.divergence.op) == ("attention[2]", None)
    assert "the fused stage; its ops alone are within bounds" in found.sentence()


class Forgetful(View):
    """A device whose caches leave the last row of every write as it was."""

    def open_cache(self, spec):
        return forgetful(self.whole.open_cache(spec), self.whole)


def forgetful(cache, device):
    write = cache.write

    def all_but_the_last(k, v, batch):
        slots = batch.meta.slots.copy()
        slots[-1] = -1
        write(k, v, device.batch(replace(batch.meta, slots=slots)))

    cache.write = all_but_the_last
    return cache


def test_cache_write_that_leaves_a_stale_row_is_named():
    def plant(device, spec, weights, cache, limits):
        return compose(Forgetful(device, {}), spec, weights, forgetful(cache, device), limits)

    subject = subject_of(TINY, planted("attention", 1, plant))
    found = bisect(subject, "a", QUESTION, max_tokens=2).divergence
    assert (found.stage, found.call) == ("attention[1]", "kv_cache")


def test_weight_prepared_wrongly_is_named():
    def larger(data):
        return (1.01 * data.astype(np.float32)).astype(data.dtype)

    subject = subject_of(TINY, planted("attention", 1, wrong_weights("o_proj", larger), "cpu"))
    found = bisect(subject, "a", QUESTION, max_tokens=1).divergence
    assert (found.stage, found.call) == ("attention[1]", "linear o_proj")


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("role", ["a", "f"])
def test_cpu_does_not_diverge_from_the_reference(role, dtype):
    report = bisect(subject_of(TINY, dtype=dtype), role, QUESTION, max_tokens=70, ignore_eos=True)
    assert report.sentence().startswith("no divergence beyond rounding: ")
    assert len(report.token_ids) == 70
    checked = [s for s in report.stages if s.worst is not None]
    assert {s.stage.split("[")[0] for s in checked} >= ({"attention"} if role == "a" else {"ffn"})
    assert all(0 <= s.worst <= 1 for s in checked)
    assert max(s.free for s in checked if s.free is not None) > 0


def test_another_backend_can_be_trusted():
    peer = get_backend("cpu").open(0)
    assert bisect(subject_of(TINY), "f", QUESTION, max_tokens=2, trusted=peer).divergence is None
    defect = DEFECTS[5]
    device = planted(defect.kind, 2, defect.plant, "cpu")
    subject = subject_of(TINY, device, role="f")
    found = bisect(subject, "f", QUESTION, max_tokens=2, trusted=peer).divergence
    assert (found.stage, found.op) == ("ffn[2]", "swiglu")


def rope_wrong_after(last):
    """Return a plant whose rotation is off by one beyond position ``last``."""

    def plant(device, spec, weights, cache, limits):
        def rope(x, positions, *, theta):
            return device.kernels["rope"](x, positions + (positions > last), theta=theta)

        return compose(View(device, {"rope": rope}), spec, weights, cache, limits)

    return plant


def test_divergence_that_only_shows_late_is_found_at_its_token():
    subject = subject_of(TINY, planted("attention", 3, rope_wrong_after(150)))
    report = bisect(subject, "a", QUESTION, max_tokens=200, ignore_eos=True)
    found = report.divergence
    assert (found.stage, found.op, found.position) == ("attention[3]", "rope", 151)
    assert len(report.token_ids) < 200  # stops there


def test_of_two_defects_the_one_that_shows_first_is_named_then_that_of_the_earlier_layer():
    reference = get_backend("reference").open(0)
    for last, stage in ((40, "attention[3]"), (-1, "attention[1]")):
        plants = {1: rope_wrong_after(last), 3: DEFECTS[2].plant}
        if last < 0:
            plants[1] = DEFECTS[3].plant
        subject = subject_of(TINY, Planted(reference, "attention", plants))
        found = bisect(subject, "a", QUESTION, max_tokens=40, ignore_eos=True).divergence
        assert found.stage == stage


def test_prompt_in_chunks_and_over_several_blocks_is_followed():
    subject = subject_of(TINY, prefill_chunk=100)
    ids = np.random.default_rng(0).integers(8, 60, 300).tolist()
    report = bisect(subject, "a", ids, max_tokens=3, ignore_eos=True)
    assert (report.divergence, report.steps, report.prompt_tokens) == (None, 5, 300)


def test_batch_invariant_stages_are_followed():
    subject = subject_of(TINY, batch_invariant=True)
    assert bisect(subject, "a", QUESTION, max_tokens=2).divergence is None
    defect = DEFECTS[2]
    device = planted("attention", 1, defect.plant, "cpu")
    subject = subject_of(TINY, device, batch_invariant=True)
    found = bisect(subject, "a", QUESTION, max_tokens=2).divergence
    assert (found.stage, found.op) == ("attention[1]", "attention")


def test_flip_between_experts_alike_is_no_defect(tmp_path):
    """Two experts whose router rows are equal tie at every token: whoever wins is right."""
    model = write_checkpoint(tmp_path / "tied", moe_num_experts=8, moe_top_k=1)
    _tie_experts(model)

    def plant(device, spec, weights, cache, limits):
        def route(logits, *, top_k, renormalise):
            share, ids = device.kernels["route"](logits, top_k=top_k, renormalise=renormalise)
            return share, ids ^ 1  # the twin

        return compose(View(device, {"route": route}), spec, weights, cache, limits)

    subject = subject_of(model, planted("attention", 1, plant, "reference"))
    report = bisect(subject, "a", [3, 4, 5], max_tokens=4, ignore_eos=True)
    assert report.divergence is None
    assert {f.layer for f in report.flips} == {1}
    assert report.flips[0].sentence() == (
        "routing flip within rounding at layer 1, token 0 (margin 0): no defect"
    )


def _tie_experts(model):
    tensors = load_file(model / "model.safetensors")
    for name, rows in tensors.items():
        if name.endswith("moe.gate.weight"):
            rows[1::2] = rows[::2]
    save_file(tensors, model / "model.safetensors")


def test_role_that_does_not_exist_is_refused_with_those_that_do():
    with pytest.raises(RequestError, match=r"no role 'x' to suspect; roles: a, f"):
        bisect(subject_of(TINY), "x", QUESTION)
