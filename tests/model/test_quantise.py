"""Block FP8: the rounding of one block, and the copy of a whole checkpoint."""

import json

import ml_dtypes
import numpy as np
import pytest
from oracle.checkpoint import load
from oracle.random_checkpoint import quantise as oracle_quantise

from step3_hetero.errors import CheckpointError, ConfigError
from step3_hetero.model.layout import is_fp8_linear
from step3_hetero.model.quantise import dequantise, quantise_blocks, quantise_checkpoint
from step3_hetero.specs import HostTensor

INDEX = "model.safetensors.index.json"


def random(shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape, dtype=np.float32)


@pytest.mark.parametrize("shape", [(128, 128), (1, 1), (130, 300), (3, 200, 129)], ids=str)
def test_blocks_agree_with_the_oracle_edges_and_stacks_included(shape):
    numbers, scale = quantise_blocks(random(shape))
    want, want_scale = oracle_quantise(random(shape))
    np.testing.assert_array_equal(scale, want_scale)
    np.testing.assert_array_equal(numbers.astype(np.float32), want.astype(np.float32))


@pytest.mark.parametrize("shape", [(130, 300), (3, 200, 129)], ids=str)
def test_a_weight_comes_back_within_half_a_step_of_e4m3(shape):
    weight = random(shape)
    numbers, scale = quantise_blocks(weight)
    back = dequantise(HostTensor("w", numbers, scale), np.float64)
    # 4 significant bits: half a step is 2^-4 of the number, and 2^-10 scaled under the smallest
    # normal; the largest scale here bounds the latter.
    assert (np.abs(back - weight) <= np.abs(weight) / 16 + scale.max() * 2.0**-10).all()


def test_each_block_has_its_own_scale():
    weight = np.ones((256, 256), np.float32)
    weight[128:, :128] = 448.0
    weight[:128, 128:] = -896.0
    _, scale = quantise_blocks(weight)
    assert scale.tolist() == [[np.float32(1 / 448), 2.0], [1.0, np.float32(1 / 448)]]


@pytest.mark.parametrize("largest", [0.0, 1e-44, 1e-38], ids=str)
def test_a_block_of_nothing_has_scale_one_and_zeros(largest):
    numbers, scale = quantise_blocks(np.full((4, 4), largest, np.float32))
    assert scale.tolist() == [[1.0]]
    assert not numbers.astype(np.float32).any()


@pytest.mark.parametrize("largest", [1e-35, 1.0, 3e38], ids=str)
def test_the_largest_number_never_overflows(largest):
    numbers, scale = quantise_blocks(np.float32(largest) * random((128, 128)).clip(-1, 1))
    assert np.isfinite(scale).all() and scale.min() > 0
    assert np.abs(numbers.astype(np.float32)).max() == 448


def test_bf16_is_quantised_as_its_float32_values():
    weight = random((130, 130)).astype(ml_dtypes.bfloat16)
    for got, want in zip(
        quantise_blocks(weight), quantise_blocks(weight.astype(np.float32)), strict=True
    ):
        np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf], ids=str)
def test_what_is_not_finite_is_refused(value):
    weight = random((200, 200))
    weight[150, 199] = value
    with pytest.raises(CheckpointError, match=f"^{value} cannot be quantised"):
        quantise_blocks(weight)


def test_a_vector_has_no_blocks():
    with pytest.raises(ValueError, match=r"found shape \(7,\)"):
        quantise_blocks(np.ones(7, np.float32))


def test_dequantise_rounds_once_to_the_dtype_asked_for():
    numbers = np.array([[3.0]], ml_dtypes.float8_e4m3fn)
    tensor = HostTensor("w", numbers, np.array([[1 / 3]], np.float32))
    assert dequantise(tensor, ml_dtypes.bfloat16).dtype == ml_dtypes.bfloat16
    assert dequantise(tensor, np.float64)[0, 0] == 3.0 * float(np.float32(1 / 3))
    plain = HostTensor("w", np.array([1.5], ml_dtypes.bfloat16))
    assert dequantise(plain, np.float32).tolist() == [1.5]


@pytest.fixture
def copied(write, tmp_path):
    """Quantise a small bf16 model with a tower; return source and copy."""
    source = write("source", vision=True, dtype="bf16", hidden_size=144)
    (source / "tokenizer.json").write_text("{}", encoding="utf-8")
    return source, quantise_checkpoint(source, tmp_path / "copy")


def test_a_copy_opens_and_has_fp8_linears_alone(copied, open_checkpoint):
    checkpoint = open_checkpoint(copied[1])
    assert checkpoint.config.fp8_blocks
    for name in checkpoint.names():
        fp8 = checkpoint.tensor(name).dtype == ml_dtypes.float8_e4m3fn
        assert fp8 == is_fp8_linear(name), name


def test_a_copy_has_the_sources_weights(copied):
    (_, was), (_, now) = load(copied[0]), load(copied[1])
    assert set(was) == set(now)
    for name in was:
        if is_fp8_linear(name):
            error = np.abs(now[name] - was[name]).max()
            assert 0 < error <= np.abs(was[name]).max() / 16, name
        else:
            np.testing.assert_array_equal(now[name], was[name])


def test_a_stack_of_experts_is_quantised_as_a_whole_would_be(copied, open_checkpoint):
    name = "model.layers.1.moe.down_proj.weight"
    source, copy = (open_checkpoint(folder).tensor(name) for folder in copied)
    numbers, scale = quantise_blocks(source.data)
    np.testing.assert_array_equal(copy.data.view(np.uint8), numbers.view(np.uint8))
    np.testing.assert_array_equal(copy.scale_inv, scale)


def test_a_copy_keeps_the_files_and_the_config(copied):
    assert sorted(p.name for p in copied[1].iterdir()) == [
        *("config.json", "model.safetensors", "tokenizer.json")
    ]
    was, now = (json.loads((f / "config.json").read_text()) for f in copied)
    assert now.pop("quantization_config")["weight_block_size"] == [128, 128]
    assert now == was


def test_a_copy_is_cut_into_files_by_size(write, tmp_path, open_checkpoint):
    source = write("source", dtype="bf16", shards=2, renamed=True)
    copy = quantise_checkpoint(source, tmp_path / "copy", max_shard_bytes=30_000)
    files = sorted(copy.glob("*.safetensors"))
    assert len(files) > 3
    assert files[0].name == f"model-00001-of-{len(files):05d}.safetensors"
    index = json.loads((copy / INDEX).read_text())
    assert set(index["weight_map"].values()) == {f.name for f in files}
    one = open_checkpoint(quantise_checkpoint(source, tmp_path / "one"))
    several = open_checkpoint(copy)
    assert index["metadata"]["total_size"] == several.nbytes(several.names())
    assert [one.digest(n) for n in one.names()] == [several.digest(n) for n in several.names()]


def test_tensors_of_a_copy_lie_aligned(write, tmp_path, open_checkpoint):
    source = write("source", dtype="bf16", hidden_size=47, share_q_dim=31, moe_intermediate_size=3)
    checkpoint = open_checkpoint(quantise_checkpoint(source, tmp_path / "copy"))
    for name, place in checkpoint.places.items():
        assert place.entry.begin % place.view().dtype.itemsize == 0, name


def test_progress_names_every_tensor_and_ends_at_the_total(write, tmp_path, open_checkpoint):
    source = write("source", dtype="bf16")
    seen = []
    quantise_checkpoint(source, tmp_path / "copy", lambda *step: seen.append(step))
    checkpoint = open_checkpoint(source)
    total = checkpoint.nbytes(checkpoint.names())
    assert [name for name, _, _ in seen] == checkpoint.names()
    assert seen[-1][1:] == (total, total)
    assert sorted(done for _, done, _ in seen) == [done for _, done, _ in seen]


def test_an_existing_folder_is_never_touched(write, tmp_path):
    source = write("source", dtype="bf16")
    out = tmp_path / "copy"
    out.mkdir()
    seen = []
    with pytest.raises(CheckpointError, match="copy: exists already"):
        quantise_checkpoint(source, out, lambda *step: seen.append(step))
    assert not seen, "refused before any work is done"
    assert not list(out.iterdir())


def test_a_copy_that_fails_leaves_nothing_behind(write, tmp_path, edit):
    source = write("source", dtype="bf16")
    edit(source, lambda t: t["lm_head.weight"].__setitem__((3, 4), np.nan))
    with pytest.raises(CheckpointError, match=r"^lm_head\.weight\[3, 4\] is nan"):
        quantise_checkpoint(source, tmp_path / "copy")
    assert [p.name for p in tmp_path.iterdir()] == ["source"]


def test_an_interrupted_copy_leaves_nothing_behind(write, tmp_path):
    def interrupt(name, done, total):
        raise KeyboardInterrupt

    source = write("source", dtype="bf16")
    with pytest.raises(KeyboardInterrupt):
        quantise_checkpoint(source, tmp_path / "copy", interrupt)
    assert [p.name for p in tmp_path.iterdir()] == ["source"]


def test_a_folder_that_cannot_be_written_is_refused(write, tmp_path):
    with pytest.raises(CheckpointError, match=r"none/copy: cannot be written: no folder"):
        quantise_checkpoint(write("source", dtype="bf16"), tmp_path / "none" / "copy")


def test_a_model_that_is_fp8_already_is_refused(write, tmp_path):
    with pytest.raises(CheckpointError, match="source: block FP8 already"):
        quantise_checkpoint(write("source", dtype="fp8"), tmp_path / "copy")


def test_a_source_that_is_no_model_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"config\.json: cannot be read"):
        quantise_checkpoint(tmp_path, tmp_path / "copy")
