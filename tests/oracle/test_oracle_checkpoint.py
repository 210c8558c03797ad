"""Reading and writing checkpoints: every layout of the same numbers reads back the same."""

import json

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from oracle.checkpoint import dequantise, load
from oracle.forward import text_forward
from oracle.random_checkpoint import Vision, write_checkpoint


def assert_same(got, want):
    assert got.keys() == want.keys()
    for name, w in want.items():
        np.testing.assert_array_equal(got[name], w, err_msg=name)


@pytest.mark.parametrize("shards", [2, 3])
def test_shards_read_like_one_file(tmp_path, shards):
    _, one = load(write_checkpoint(tmp_path / "one"))
    _, many = load(write_checkpoint(tmp_path / "many", shards=shards))

    assert len(list((tmp_path / "many").glob("*.safetensors"))) == shards
    assert_same(many, one)


def test_both_spellings_of_names_read_the_same(tmp_path):
    _, published = load(write_checkpoint(tmp_path / "a", vision=Vision()))
    _, renamed = load(write_checkpoint(tmp_path / "b", vision=Vision(), renamed=True, shards=2))
    index = json.loads((tmp_path / "b" / "model.safetensors.index.json").read_text("utf-8"))

    assert "model.language_model.layers.0.self_attn.wq.weight" in index["weight_map"]
    assert "model.vision_model.embeddings.class_embedding" in index["weight_map"]
    assert "model.vit_large_projector.weight" in index["weight_map"]
    assert_same(renamed, published)


def test_names_and_shapes_are_the_published_ones(tmp_path):
    _, weights = load(write_checkpoint(tmp_path, vision=Vision(), num_attention_groups=2))
    shapes = {name: w.shape for name, w in weights.items()}

    assert len(shapes) == 3 + 4 * 8 + 2 * 3 + 2 * 7 + 4 + 2 * 12 + 5
    assert shapes["model.layers.0.self_attn.k_proj.weight"] == (32, 48)
    assert shapes["model.layers.0.self_attn.wq.weight"] == (64, 32)
    assert shapes["model.layers.0.mlp.down_proj.weight"] == (48, 96)
    assert shapes["model.layers.1.moe.gate.weight"] == (8, 48)
    assert shapes["model.layers.1.moe.gate_proj.weight"] == (8, 32, 48)
    assert shapes["model.layers.1.moe.down_proj.weight"] == (8, 48, 32)
    assert shapes["model.layers.1.share_expert.up_proj.weight"] == (40, 48)
    assert shapes["vision_model.embeddings.position_embedding.weight"] == (65, 32)
    assert shapes["vision_model.transformer.layers.1.self_attn.qkv_proj.bias"] == (96,)
    assert shapes["vit_downsampler2.weight"] == (48, 24, 3, 3)
    assert shapes["vit_large_projector.weight"] == (48, 48)
    assert "vit_large_projector.bias" not in shapes


def test_bf16_is_the_rounded_fp32_checkpoint(tmp_path):
    _, fp32 = load(write_checkpoint(tmp_path / "a"))
    _, bf16 = load(write_checkpoint(tmp_path / "b", dtype="bf16"))

    want = {n: w.astype(ml_dtypes.bfloat16).astype(np.float64) for n, w in fp32.items()}
    assert_same(bf16, want)


def test_fp8_errs_by_less_than_one_rounding_of_e4m3(tmp_path):
    options = {"hidden_size": 136, "share_q_dim": 132, "num_hidden_layers": 2}  # partial blocks
    _, fp32 = load(write_checkpoint(tmp_path / "a", **options))
    _, fp8 = load(write_checkpoint(tmp_path / "b", dtype="fp8", **options))

    assert fp8.keys() == fp32.keys()
    for name, w in fp32.items():
        linear = ".layers." in name and name.endswith(("_proj.weight", ".wq.weight"))
        step = 2.0**-4 if linear else 2.0**-8
        floor = np.abs(w).max() / 448 * 2.0**-10 if linear else 0  # half the smallest subnormal
        assert (np.abs(fp8[name] - w) <= step * np.abs(w) + floor).all(), name
        assert (fp8[name] != w).any(), name


def test_scales_cover_blocks_of_128_from_the_first_weight_on():
    scale = np.arange(1.0, 13).reshape(2, 2, 3)  # two experts, 2 x 3 blocks
    got = dequantise(np.ones((2, 130, 257)), scale)

    assert got.shape == (2, 130, 257)
    for e, i, j in [(0, 0, 0), (0, 127, 127), (0, 128, 127), (1, 127, 128), (1, 129, 256)]:
        assert got[e, i, j] == scale[e, i // 128, j // 128], (e, i, j)


def test_scale_of_the_wrong_shape_is_refused():
    with pytest.raises(ValueError, match=r"\(1, 1\).*\(130, 4\).*\(2, 1\)"):
        dequantise(np.ones((130, 4)), np.ones((1, 1)))


def test_dtype_that_is_no_weight_is_refused_by_name(tmp_path):
    (tmp_path / "config.json").write_text("{}", encoding="utf-8")
    save_file({"ids": np.zeros(2, np.int32)}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="ids is stored as I32"):
        load(tmp_path)


def test_unknown_dtype_to_write_is_refused(tmp_path):
    with pytest.raises(ValueError, match="'int4'"):
        write_checkpoint(tmp_path, dtype="int4")


def test_enum_is_written_as_given_and_left_out_when_none(tmp_path):
    written = {}
    for given in ("1,2", (1, 2), None):
        config, weights = load(write_checkpoint(tmp_path / str(given), moe_layers_enum=given))
        written[given] = config.get("moe_layers_enum", "left out")
        assert ("model.layers.3.moe.gate.weight" in weights) == (given is None)

    assert written == {"1,2": "1,2", (1, 2): [1, 2], None: "left out"}


def test_tensors_depend_on_seed_and_name(tmp_path):
    _, a = load(write_checkpoint(tmp_path / "a"))
    _, b = load(write_checkpoint(tmp_path / "b", seed=1))
    _, c = load(write_checkpoint(tmp_path / "c", moe_layers_enum="1"))
    wq = "model.layers.{}.self_attn.wq.weight"

    assert (a[wq.format(0)] != b[wq.format(0)]).all()
    assert (a[wq.format(0)] != a[wq.format(1)]).all()
    np.testing.assert_array_equal(a[wq.format(3)], c[wq.format(3)])


def test_activations_stay_healthy_through_many_layers(tmp_path):
    folder = write_checkpoint(tmp_path, num_hidden_layers=16, moe_layers_enum="2,3,5,8,13")
    config, weights = load(folder)
    best = text_forward(config, weights, list(range(32))).max(axis=-1)

    assert 0.05 < np.exp(best).mean() < 0.95  # neither flat nor one-hot
