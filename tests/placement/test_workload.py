"""Counting FLOPs, KV bytes and weights: by hand for each kind of attention, then whole models."""

import json

import numpy as np
import pytest
from oracle.random_checkpoint import write_checkpoint

from step3_hetero.errors import ConfigError, PlacementError
from step3_hetero.model.config import FAMILIES, ModelConfig
from step3_hetero.model.layout import tensor_shapes
from step3_hetero.placement.attention_cores import (
    ChunkedCore,
    GroupedCore,
    LatentCore,
    LightningCore,
)
from step3_hetero.placement.workload import (
    STAGES,
    paper_names,
    paper_workload,
    step3_workload,
    workload,
)

STEP3 = step3_workload(FAMILIES["step3"]())


def test_grouped_core_by_hand():
    """4 heads of 8 against 10 tokens: 4·8 products and sums, twice; 2 KV heads of 8, K and V."""
    core = GroupedCore(heads=4, kv_heads=2, head_dim=8)
    assert core.flops(10) == 4 * 8 * 2 * 2 * 10 == 1280
    assert core.kv_bytes(10, 1.0) == 2 * 2 * 8 * 10 == 320
    assert core.kv_bytes(10, 2.0) == core.held_bytes(10, 2.0) == 640


def test_cache_kept_wider_does_not_follow_the_policy():
    core = GroupedCore(heads=4, kv_heads=2, head_dim=8, element_bytes=2)
    assert core.kv_bytes(10, 1.0) == core.kv_bytes(10, 4.0) == 640


def test_latent_core_by_hand():
    """2 heads, keys of 5 and values counted as 4, 3 tokens: 2·(5 + 4)·2·3; one key of 5 a token."""
    core = LatentCore(heads=2, key_dim=5, value_dim=4)
    assert core.flops(3) == 108
    assert core.kv_bytes(3, 2.0) == core.held_bytes(3, 2.0) == 5 * 3 * 2


@pytest.mark.parametrize(("context", "counted"), [(1, 1), (99, 99), (100, 100), (5000, 100)])
def test_chunked_core_attends_to_no_more_than_its_chunk(context, counted):
    full = GroupedCore(heads=4, kv_heads=2, head_dim=8)
    core = ChunkedCore(full, chunk=100)
    assert core.flops(context) == 128 * counted
    assert core.kv_bytes(context, 1.0) == core.held_bytes(context, 1.0) == 32 * counted


def test_lightning_core_by_hand():
    """3 heads with states of 4x4 in float32: 192 bytes held, read and written: 384."""
    core = LightningCore(heads=3, head_dim=4, flops_per_element=10)
    assert core.flops(7) == core.flops(7000) == 10 * 3 * 16
    assert core.held_bytes(7, 1.0) == 192
    assert core.kv_bytes(7, 1.0) == core.kv_bytes(7000, 2.0) == 384


# KV bytes and attention FLOPs of one token at 8192, linear FLOPs, FFN FLOPs: section 2 of the
# facts written out, not the code's own formula.
BY_HAND = {
    "DeepSeek-V3": (
        61 * 576 * 8192,
        61 * 128 * 1152 * 2 * 8192,
        2 * 61 * (7168 * 1536 + 1536 * 128 * 192 + 7168 * 576 + 512 * 128 * 256 + 128 * 128 * 7168),
        2 * 61 * 3 * 7168 * 18432,
    ),
    "Kimi K2": (
        61 * 576 * 8192,
        61 * 64 * 1152 * 2 * 8192,
        2 * 61 * (7168 * 1536 + 1536 * 64 * 192 + 7168 * 576 + 512 * 64 * 256 + 64 * 128 * 7168),
        2 * 61 * 3 * 7168 * 18432,
    ),
    "Qwen3-235B-A22B": (
        94 * 2 * 4 * 128 * 8192,
        94 * 64 * 128 * 4 * 8192,
        2 * 94 * (2 * 4096 * 64 * 128 + 2 * 4096 * 4 * 128),
        2 * 94 * 8 * 3 * 4096 * 1536,
    ),
    "Qwen3-32B": (
        64 * 2 * 8 * 128 * 8192,
        64 * 64 * 128 * 4 * 8192,
        2 * 64 * (2 * 5120 * 64 * 128 + 2 * 5120 * 8 * 128),
        2 * 64 * 3 * 5120 * 25600,
    ),
    "Llama 4 Maverick": (
        (12 * 2 + 36) * 2 * 8 * 128 * 8192,
        48 * 40 * 128 * 4 * 8192,
        2 * 48 * (2 * 5120 * 40 * 128 + 2 * 5120 * 8 * 128),
        2 * 48 * 3 * 5120 * 16384,
    ),
    "MiniMax M1": (
        10 * 2 * 8 * 128 * 8192 * 2 + 70 * 64 * 128 * 128 * 4 * 2,
        10 * 64 * 128 * 4 * 8192 + 10 * 70 * 64 * 128**2,
        2 * 10 * (2 * 6144 * 64 * 128 + 2 * 6144 * 8 * 128) + 2 * 70 * 5 * 6144 * 8192,
        2 * 80 * 2 * 3 * 6144 * 9216,
    ),
    "ERNIE 4.5": (
        54 * 2 * 8 * 128 * 8192,
        54 * 64 * 128 * 4 * 8192,
        2 * 54 * (2 * 8192 * 64 * 128 + 2 * 8192 * 8 * 128),
        2 * 54 * 3 * 8192 * 28672,
    ),
    "Pangu Pro MoE": (
        48 * 2 * 8 * 128 * 8192,
        48 * 40 * 128 * 4 * 8192,
        2 * 48 * (2 * 5120 * 40 * 128 + 2 * 5120 * 8 * 128),
        2 * 48 * 12 * 3 * 5120 * 1344,
    ),
    "Step-3": (
        61 * 512 * 8192,
        61 * 64 * 256 * 4 * 8192,
        2 * 61 * (7168 * 2048 + 2 * 7168 * 256 + 2048 * 16384 + 16384 * 7168),
        2 * (5 * 3 * 7168 * 18432 + 56 * 4 * 3 * 7168 * 5120),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", BY_HAND)
def test_token_of_a_paper_model_by_hand(name):
    model = paper_workload(name)
    got = (
        model.kv_bytes(8192), model.attention_flops(8192), model.linear_flops, model.ffn_flops
    )  # fmt: skip
    assert got == BY_HAND[name]


def test_the_nine_are_all_worked_by_hand():
    assert paper_names() == tuple(BY_HAND)


def test_true_value_width_lowers_mla_alone():
    counted, true = (paper_workload("DeepSeek-V3", mla_value_dim=d) for d in (576, 512))
    assert counted.attention_flops(100) / true.attention_flops(100) == 1152 / 1088
    assert true.kv_bytes(100) == counted.kv_bytes(100)
    step3 = paper_workload("Step-3", mla_value_dim=512)
    assert step3.attention_flops(100) == paper_workload("Step-3").attention_flops(100)


@pytest.mark.parametrize(
    ("name", "intensity"), [("Step-3", 128), ("DeepSeek-V3", 512), ("Qwen3-235B-A22B", 32)]
)
def test_attention_intensity_of_the_paper(name, intensity):
    model = paper_workload(name)
    assert model.attention_flops(8192) / model.kv_bytes(8192) == intensity


@pytest.mark.parametrize(
    ("name", "billions"),
    [
        ("DeepSeek-V3", 671), ("Kimi K2", 1026), ("Qwen3-235B-A22B", 235), ("Qwen3-32B", 32.8),
        ("Llama 4 Maverick", 400), ("MiniMax M1", 456), ("ERNIE 4.5", 300), ("Pangu Pro MoE", 72),
        ("Step-3", 316.3),
    ],
)  # fmt: skip
def test_weights_sum_to_the_published_size(name, billions):
    assert paper_workload(name).weight_elements() / 1e9 == pytest.approx(billions, rel=0.003)


@pytest.mark.parametrize(
    ("name", "active", "of"),
    [("DeepSeek-V3", 9, 257), ("Step-3", 4, 49), ("Qwen3-235B-A22B", 8, 128), ("Qwen3-32B", 1, 1),
     ("Llama 4 Maverick", 2, 129), ("Pangu Pro MoE", 12, 68)],
)  # fmt: skip
def test_active_expert_fraction_counts_shared_experts(name, active, of):
    assert paper_workload(name).active_expert_fraction == active / of


@pytest.mark.parametrize("said", ["deepseek", "DEEPSEEK-V3", " dsv3 ", "DeepSeek-V3"])
def test_model_goes_by_its_short_names_whatever_the_capitals(said):
    assert paper_workload(said).name == "DeepSeek-V3"


def test_no_short_name_means_two_models():
    for name in paper_names():
        assert paper_workload(name.lower()).name == name


def test_unknown_model_lists_every_name():
    with pytest.raises(PlacementError, match=r"'gpt-5'; .*DeepSeek-V3 \(dsv3, deepseek\).*step3"):
        workload("gpt-5")


def test_step3_has_the_published_parameter_counts():
    """Facts of the model: attention 169,347,072 a layer, MoE 5,395,267,584 with its router."""
    attention, moe = STEP3.part("attention-dense"), STEP3.part("ffn-moe")
    assert attention.weight_elements == 169_347_072 + 2 * 7168
    router = STEP3.part("attention-moe").weight_elements - attention.weight_elements
    assert router == 48 * 7168
    assert moe.weight_elements + router == 5_395_267_584
    assert moe.expert_elements == 110_100_480
    assert STEP3.part("ffn-dense").weight_elements == 396_361_728
    assert (attention.layers, moe.layers) == (5, 56)
    assert round(STEP3.weight_elements() / 1e9, 2) == 316.29


def test_step3_ffn_takes_about_300_gb_in_fp8():
    assert STEP3.weight_bytes("fp8", "ffn") / 1e9 == pytest.approx(304.1, abs=0.05)
    assert STEP3.weight_bytes("bf16", "ffn") == 2 * STEP3.weight_bytes("int8", "ffn")


def test_step3_differs_from_the_papers_by_its_router_alone():
    paper = paper_workload("Step-3")
    assert STEP3.kv_bytes(8192) == paper.kv_bytes(8192)
    assert STEP3.ffn_flops == paper.ffn_flops
    assert STEP3.linear_flops - paper.linear_flops == 2 * 56 * 48 * 7168
    assert STEP3.head_flops == 2 * 7168 * 128815
    assert STEP3.part("embed").linear_flops == 0


def test_stages_hold_all_weights():
    assert sum(STEP3.weight_elements(s) for s in STAGES) == STEP3.weight_elements()
    assert {part.stage for part in STEP3.parts} == set(STAGES)


def test_weights_of_a_folder_are_those_of_its_checkpoint(tmp_path):
    folder = write_checkpoint(tmp_path / "small")
    config = ModelConfig.read(folder)
    shapes = tensor_shapes(config)
    counted = workload(str(folder))
    assert counted.name == "small"
    assert counted.weight_elements() == sum(int(np.prod(shape)) for shape in shapes.values())
    moe = [int(np.prod(s)) for n, s in shapes.items() if "moe." in n and "gate.weight" not in n]
    shared = [int(np.prod(s)) for n, s in shapes.items() if "share_expert." in n]
    dense = [int(np.prod(s)) for n, s in shapes.items() if ".mlp." in n]
    assert counted.weight_elements("ffn") == sum(moe) + sum(shared) + sum(dense)


def test_folder_called_like_a_paper_model_is_counted_from_its_own_config(tmp_path):
    folder = write_checkpoint(tmp_path / "Step-3")
    assert workload(str(folder)).hidden == ModelConfig.read(folder).text.hidden_size


def test_name_of_a_model_comes_before_a_folder_of_that_name(tmp_path, monkeypatch):
    write_checkpoint(tmp_path / "Step-3")
    monkeypatch.chdir(tmp_path)
    assert workload("Step-3").hidden == 7168
    assert workload("./Step-3").hidden != 7168


def test_damaged_config_is_refused_with_its_file(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    with pytest.raises(ConfigError, match=r"config\.json"):
        workload(str(tmp_path))


def test_unknown_part_lists_the_parts():
    with pytest.raises(PlacementError, match=r"'router'; parts: attention-dense, attention-moe"):
        STEP3.part("router")
