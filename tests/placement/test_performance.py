"""Rooflines: the figures by hand, and the three properties that the planner rests on."""

from dataclasses import replace
from types import MappingProxyType

import numpy as np
import pytest

from step3_hetero.model.config import FAMILIES
from step3_hetero.placement.catalogue import Catalogue
from step3_hetero.placement.colocated import ColocatedStage
from step3_hetero.placement.columns import largest_batch
from step3_hetero.placement.efficiency import Efficiency, efficiency_of
from step3_hetero.placement.performance import (
    AttentionStage,
    FfnStage,
    Roof,
    distinct_experts,
    expert_imbalance,
    kv_shards,
    precisions,
    prefill_s,
)
from step3_hetero.placement.workload import paper_workload, step3_workload

PEAK = Efficiency(1.0, 1.0, 0.0, True)
STEP3 = step3_workload(FAMILIES["step3"]())
PAPER = paper_workload("Step-3")


def roof(card="h800", precision="fp8", efficiency=PEAK):
    return Roof.of(Catalogue.read().card(card), efficiency, precision)


def at(function, tokens):
    return float(function(np.array([float(tokens)]))[0])


def test_one_attention_layer_takes_its_bytes_or_its_flops_whichever_is_longer():
    stage = AttentionStage(PAPER, roof(), 1, 8192)
    kv, weights = 64 * 512 * 8192, 169_345_024 // 1
    flops_core = 64 * 64 * 256 * 4 * 8192
    part = PAPER.part("attention")
    core = max(kv / 3.35e12, flops_core / 1.979e15)
    linear = max(64 * part.linear_flops / 1.979e15, part.weight_elements / 3.35e12)
    got = at(lambda b: stage.layer_s(part, b), 64)
    assert got == pytest.approx(core + linear)
    assert part.weight_elements == pytest.approx(weights, rel=1e-3)


def test_weights_are_read_once_for_a_micro_batch_and_only_experts_that_were_chosen():
    stage = FfnStage(STEP3, roof(), 1, 1, 1.0)
    part = STEP3.part("ffn-moe")
    one = at(lambda b: stage.layer_s(part, b), 1)
    assert one == pytest.approx(4 * 110_100_480 / 3.35e12), "three experts and the shared one"
    many = at(lambda b: stage.layer_s(part, b), 100)
    all_of_them = 49 * 110_100_480 / 3.35e12
    assert 0.9 * all_of_them < many <= all_of_them


def test_memory_of_step3_is_what_the_facts_say():
    whole = FfnStage(STEP3, roof(), 1, 1, 1.0).weight_bytes()
    assert whole == pytest.approx(304e9, rel=0.01), "FFN weights: about 300 GB in FP8"
    attention = AttentionStage(STEP3, roof(), 1, 8192)
    assert attention.kv_bytes() == 61 * 512 * 8192
    tp8 = AttentionStage(STEP3, roof(), 8, 8192)
    assert tp8.kv_bytes() == attention.kv_bytes(), "one KV head: every rank holds all of it"


def test_kv_heads_are_split_over_ranks_as_far_as_they_go():
    cores = [paper_workload(name).of("attention")[0].core for name in ("Qwen3-32B", "Step-3")]
    assert [kv_shards(core, 4) for core in cores] == [4, 1]
    assert kv_shards(cores[0], 16) == 8


@pytest.mark.parametrize(
    ("card", "want"), [("h800", ["fp8"]), ("a800", ["int8"]), ("ascend-910b", ["int8"])]
)
def test_fp8_is_used_only_where_the_card_has_it(card, want):
    assert precisions(Catalogue.read().card(card)) == want
    assert precisions(Catalogue.read().card(card), frozenset({"fp8", "int8"})) == ["bf16"]


def test_experts_hit_and_imbalance_by_chance():
    draw = np.random.default_rng(7)
    hit, fullest = [], []
    for _ in range(400):
        chosen = np.array([draw.permutation(48)[:3] for _ in range(64)])
        hit.append(len(np.unique(chosen)))
        fullest.append(np.bincount(chosen.ravel() // 6, minlength=8).max())
    assert np.mean(hit) == pytest.approx(at(lambda b: distinct_experts(b, 48, 3), 64), rel=0.01)
    mean = 64 * 3 / 8
    # The formula is the bound for many balls: not below the mean maximum, nor far above it.
    assert np.mean(fullest) / mean <= at(lambda c: expert_imbalance(c, 8), 192) * 1.02
    assert np.mean(fullest) / mean >= at(lambda c: expert_imbalance(c, 8), 192) * 0.85


STAGES = {
    "attention": AttentionStage(STEP3, roof(efficiency=efficiency_of("nvidia")), 1, 8192).pass_s,
    "attention of 4": AttentionStage(STEP3, roof("ascend-910b", "int8"), 4, 8192).pass_s,
    "ffn": FfnStage(STEP3, roof("h20", efficiency=efficiency_of("nvidia")), 8, 1, 1.0).pass_s,
    "ffn of 48": FfnStage(STEP3, roof("a800", "int8"), 1, 48, 1.0).pass_s,
    "colocated": lambda b: ColocatedStage(
        AttentionStage(STEP3, roof(efficiency=efficiency_of("nvidia")), 1, 8192),
        Catalogue.read().card("h800"), 16, 1.0,
    ).pass_s(b, 2),
}  # fmt: skip


@pytest.mark.parametrize("seconds", STAGES.values(), ids=STAGES)
def test_seconds_never_fall_and_seconds_per_token_never_rise_with_the_batch(seconds):
    batch = np.arange(1.0, 3000.0)
    took = seconds(batch)
    assert (np.diff(took) >= -1e-15).all()
    assert (np.diff(took / batch) <= 1e-15).all()


def test_largest_batch_is_the_last_that_fits():
    def seconds(b):
        return 1.0 + 0.5 * b

    budget = np.array([1.4, 1.5, 2.0, 100.0])
    assert largest_batch(seconds, budget, np.full(4, 10.0)).tolist() == [0, 1, 2, 10]


def test_prefill_is_bound_by_arithmetic_on_a_long_prompt():
    attention = AttentionStage(STEP3, roof(), 1, 8192)
    ffn = FfnStage(STEP3, roof(), 8, 1, 1.0)
    a, f = prefill_s(attention, ffn, 8192)
    linear = 8192 * STEP3.linear_flops / 1.979e15
    core = 8192 * STEP3.attention_flops(4096) / 1.979e15
    assert a == pytest.approx(linear + core, rel=1e-6)
    assert f >= 8192 * STEP3.ffn_flops / 8 / 1.979e15


def test_a_card_without_figures_in_bf16_keeps_its_head_in_what_it_has():
    odd = Catalogue.read().card("h800")
    only = replace(odd, flops_per_s=MappingProxyType({"fp8": 1e15}))
    assert Roof.of(only, PEAK, "fp8").kept_flops_per_s == 1e15
