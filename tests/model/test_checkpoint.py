"""Checkpoints: read without copies, and refused with one clear line when anything is wrong."""

import hashlib
import json
from dataclasses import replace

import ml_dtypes
import numpy as np
import pytest
from oracle.checkpoint import load
from safetensors.numpy import save_file

from step3_hetero.errors import CheckpointError
from step3_hetero.model.checkpoint import Checkpoint, check_finite
from step3_hetero.model.config import ModelConfig
from step3_hetero.model.layout import is_fp8_linear, parameter_count, tensor_shapes
from step3_hetero.model.quantise import dequantise
from step3_hetero.model.safetensors_file import Shard
from step3_hetero.specs import HostTensor

INDEX, NORM = "model.safetensors.index.json", "model.norm.weight"
ROUTED = "model.layers.1.moe.gate_proj.weight"


@pytest.fixture
def refusal(open_checkpoint):
    """Return the message with which opening a folder is refused."""

    def refusal(folder):
        with pytest.raises(CheckpointError) as caught:
            open_checkpoint(folder)
        return str(caught.value)

    return refusal


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp8"])
@pytest.mark.parametrize("options", [{}, {"shards": 3}, {"renamed": True}], ids=str)
def test_every_tensor_is_what_an_independent_reader_finds(write, open_checkpoint, dtype, options):
    folder = write(vision=True, dtype=dtype, **options)
    checkpoint = open_checkpoint(folder)
    _, want = load(folder)
    assert set(checkpoint.names()) == set(want)
    for name in checkpoint.names():
        np.testing.assert_array_equal(dequantise(checkpoint.tensor(name), np.float64), want[name])


def test_names_stand_in_the_layouts_order(write, open_checkpoint):
    checkpoint = open_checkpoint(write(vision=True, shards=2))
    assert checkpoint.names() == list(tensor_shapes(checkpoint.config))


def test_a_tensor_is_a_read_only_view_of_the_file(write, open_checkpoint):
    tensor = open_checkpoint(write(dtype="bf16")).tensor(NORM)
    assert tensor.dtype == ml_dtypes.bfloat16
    assert not tensor.data.flags.owndata
    with pytest.raises(ValueError, match="read-only"):
        tensor.data[0] = 0


def test_only_the_files_that_are_read_are_mapped(write, open_checkpoint):
    checkpoint = open_checkpoint(write(shards=3))
    assert not any(place.shard._map for place in checkpoint.places.values())
    checkpoint.tensor(NORM)
    mapped = {p.shard.path for p in checkpoint.places.values() if p.shard._map}
    assert mapped == {checkpoint.places[NORM].shard.path}


def test_a_tensor_on_an_odd_address_is_copied_to_an_even_one(tmp_path):
    numbers, scale = np.ones(3, ml_dtypes.float8_e4m3fn), np.array([2.0, 3.0], np.float32)
    header = {
        "a": {"dtype": "F8_E4M3", "shape": [3], "data_offsets": [0, 3]},
        "b": {"dtype": "F32", "shape": [2], "data_offsets": [3, 11]},
    }
    text = json.dumps(header).encode()
    raw = len(text).to_bytes(8, "little") + text + numbers.tobytes() + scale.tobytes()
    (tmp_path / "model.safetensors").write_bytes(raw)
    view = Shard(tmp_path / "model.safetensors").view("b")
    assert view.flags.aligned and view.tolist() == [2.0, 3.0]


def test_fp8_tensors_carry_their_scales(write, open_checkpoint):
    checkpoint = open_checkpoint(write(dtype="fp8", hidden_size=144))
    tensor = checkpoint.tensor(ROUTED)
    assert (tensor.shape, tensor.scale_inv.shape) == ((8, 32, 144), (8, 1, 2))
    assert checkpoint.tensor(NORM).scale_inv is None
    assert checkpoint.nbytes([ROUTED, NORM]) == 8 * 32 * 144 + 8 * 2 * 4 + 144 * 2


def test_either_spelling_finds_a_tensor(write, open_checkpoint):
    checkpoint = open_checkpoint(write(renamed=True))
    renamed = "model.language_model.norm.weight"
    assert NORM in checkpoint and renamed in checkpoint and "norm" not in checkpoint
    assert checkpoint.tensor(renamed).name == NORM


def test_an_unknown_name_is_refused(write, open_checkpoint):
    with pytest.raises(CheckpointError, match=r"no tensor 'model\.nrom\.weight' in model"):
        open_checkpoint(write()).tensor("model.nrom.weight")


def test_the_digest_is_that_of_the_stored_bytes(write, open_checkpoint, stored):
    folder = write(dtype="fp8")
    tensors = stored(folder / "model.safetensors")
    checkpoint = open_checkpoint(folder)
    both = tensors[ROUTED].tobytes() + tensors[ROUTED + "_scale_inv"].tobytes()
    assert checkpoint.digest(ROUTED) == hashlib.sha256(both).hexdigest()
    assert checkpoint.digest(NORM) == hashlib.sha256(tensors[NORM].tobytes()).hexdigest()


def test_the_summary_adds_up(write, open_checkpoint):
    checkpoint = open_checkpoint(write(vision=True, dtype="fp8"))
    summary = checkpoint.summary()
    groups = {g.name: g for g in summary.groups}
    assert list(groups) == [
        *("embed", "attention", "dense ffn", "experts", "shared expert"),
        *("router", "norms", "vision", "head"),
    ]
    assert groups["experts"].params == 2 * 3 * 8 * 32 * 48
    assert groups["experts"].nbytes == groups["experts"].params + 2 * 3 * 8 * 4
    assert groups["experts"].dtypes == ("float8_e4m3fn",)
    assert (groups["router"].tensors, groups["norms"].tensors) == (2, 4 * 3 + 1)
    assert groups["vision"].dtypes == ("bfloat16",)
    assert summary.total.params == parameter_count(checkpoint.config)
    assert summary.total.nbytes == checkpoint.nbytes(checkpoint.names())
    assert json.loads(json.dumps(summary.to_json()))["total"]["tensors"] == len(checkpoint.names())


@pytest.mark.parametrize("bias", [False, True])
def test_the_file_decides_on_the_projectors_bias(write, open_checkpoint, bias):
    checkpoint = open_checkpoint(write(vision=True, projector_bias=bias))
    assert checkpoint.config.projector_bias is bias
    assert ("vit_large_projector.bias" in checkpoint) is bias


@pytest.mark.parametrize(
    ("stated", "said"),
    [(True, "1 tensors missing: "), (False, "1 tensors that the model does not")],
)
def test_a_stated_projector_bias_is_held_to(write, stated, said):
    folder = write(vision=True, projector_bias=not stated)
    config = replace(ModelConfig.read(folder), projector_bias=stated)
    with pytest.raises(CheckpointError, match=said + r".*vit_large_projector\.bias"):
        Checkpoint.open(folder, config)


def test_files_may_be_links_as_in_a_download_cache(write, open_checkpoint, tmp_path):
    folder = write(shards=2)
    blobs = tmp_path / "blobs"
    blobs.mkdir()
    for n, path in enumerate(sorted(folder.glob("*.safetensors"))):
        path.rename(blobs / str(n))
        path.symlink_to(blobs / str(n))
    assert open_checkpoint(folder).tensor(NORM).shape == (48,)


def test_a_folder_without_weights_is_refused(write, refusal):
    folder = write()
    (folder / "model.safetensors").unlink()
    assert refusal(folder) == f"{folder}: no weights; expected {INDEX} or model.safetensors"


def test_a_folder_with_two_sets_of_weights_is_refused(write, refusal):
    folder = write(shards=2)
    (folder / "model.safetensors").write_bytes(b"")
    assert "does not name model.safetensors; remove one of them" in refusal(folder)


def test_a_missing_file_is_refused_by_name(write, refusal):
    folder = write(shards=3)
    (folder / "model-00002-of-00003.safetensors").unlink()
    assert "1 of 3 files" in refusal(folder)
    assert "missing: model-00002-of-00003.safetensors" in refusal(folder)


@pytest.mark.parametrize(
    "file",
    [
        "../other.safetensors",
        "/etc/other.safetensors",
        "sub/other.safetensors",
        "..\\other.safetensors",
        "C:other.safetensors",
        "..",
        "",
        "weights.bin",
        "a\0.safetensors",
        5,
        None,
    ],
    ids=repr,
)
def test_an_index_may_only_name_files_of_its_folder(write, refusal, edit_json, file):
    folder = write(shards=2)
    edit_json(folder / INDEX, lambda index: index["weight_map"].update({NORM: file}))
    message = refusal(folder)
    assert f"{INDEX}: {NORM} is said to lie in {file!r}; expected the bare name" in message


def test_an_index_that_names_a_tensor_its_file_lacks_is_refused(write, refusal, edit_json):
    folder = write(shards=2)
    edit_json(
        folder / INDEX,
        lambda index: index["weight_map"].update({"more": "model-00001-of-00002.safetensors"}),
    )
    assert "names 1 tensors that are not there: more in model-00001-of-00002" in refusal(folder)


def test_an_index_that_names_the_wrong_file_is_refused(write, refusal, edit_json):
    folder = write(shards=2)

    def swap(index):
        other = {1: 2, 2: 1}[int(index["weight_map"][NORM][6:11])]
        index["weight_map"][NORM] = f"model-0000{other}-of-00002.safetensors"

    edit_json(folder / INDEX, swap)
    assert f"names 1 tensors that are not there: {NORM} in model-0000" in refusal(folder)


def test_a_tensor_that_the_index_does_not_name_is_refused(write, refusal, edit_json):
    folder = write(shards=2)
    edit_json(folder / INDEX, lambda index: index["weight_map"].pop(NORM))
    assert f"1 tensors are not named in {INDEX}: {NORM} in model-0000" in refusal(folder)


@pytest.mark.parametrize(
    ("written", "said"),
    [
        ('{"weight_map":\n {,', f"{INDEX}:2: not JSON"),
        ("[]", "weight_map must name each tensor's file, found None"),
        ('{"weight_map": 3}', "found 3"),
        ('{"weight_map": {"a": "b.safetensors", "a": "c.safetensors"}}', "'a' stands there twice"),
        ("[" * 100_000, "cannot be read"),
    ],
    ids=["syntax", "list", "number", "twice", "deep"],
)
def test_a_damaged_index_is_refused(write, refusal, written, said):
    folder = write(shards=2)
    (folder / INDEX).write_text(written, encoding="utf-8")
    assert said in refusal(folder)


@pytest.mark.parametrize("kept", [0, 4, 100, -1])
def test_a_file_cut_short_is_refused(write, refusal, kept):
    path = write() / "model.safetensors"
    path.write_bytes(path.read_bytes()[:kept])
    assert f"{path}: damaged or cut short ({path.stat().st_size} bytes)" in refusal(path.parent)


def test_a_damaged_header_is_refused(write, refusal):
    path = write() / "model.safetensors"
    raw = bytearray(path.read_bytes())
    raw[20:30] = b"\xff" * 10
    path.write_bytes(raw)
    assert "damaged or cut short" in refusal(path.parent)


def test_a_tensor_in_two_files_is_refused(write, refusal, edit):
    folder = write(shards=2)
    files = [f"model-0000{n}-of-00002.safetensors" for n in (1, 2)]
    for file in files:
        edit(folder, lambda tensors: tensors.update({NORM: np.ones(48, np.float32)}), file)
    assert f"1 tensors stored twice: {NORM} in {files[0]}, {files[1]}" in refusal(folder)


def test_a_tensor_under_both_spellings_is_refused(write, refusal, edit):
    folder = write()
    renamed = "model.language_model.norm.weight"
    edit(folder, lambda tensors: tensors.update({renamed: tensors[NORM]}))
    assert f"1 tensors stored twice: {NORM}" in refusal(folder)


def test_missing_and_surplus_tensors_are_counted_and_the_first_ten_named(write, refusal, edit):
    folder = write()

    def change(tensors):
        for name in [n for n in tensors if ".self_attn.k_proj." in n or "layernorm" in n]:
            tensors[name + ".old"] = tensors.pop(name)

    edit(folder, change)
    message = refusal(folder)
    assert "12 tensors missing: model.layers.0.input_layernorm.weight, " in message
    assert message.count(".old") == 10
    assert "12 tensors that the model does not have: " in message
    assert message.count(" and 2 more") == 2


def test_wrong_shapes_are_listed_with_the_expected_ones(write, refusal, edit):
    folder = write()
    edit(folder, lambda tensors: tensors.update({NORM: np.ones(47, np.float32)}))
    assert refusal(folder).endswith(f"1 tensors of another shape: {NORM} (47,), expected (48,)")


@pytest.mark.parametrize(
    ("dtype", "said"),
    [
        ("float16", "F16, expected BF16 (no backend computes in float16"),
        ("float32", "F32, expected BF16"),
        ("float64", "F64, expected BF16 (readable: F32, BF16, F8_E4M3)"),
        ("int8", "I8, expected BF16 (readable"),
        ("float8_e4m3fn", "F8_E4M3, expected BF16 (config.json has no quantization_config)"),
    ],
)
def test_wrong_dtypes_are_listed_with_the_reason(write, refusal, stored, dtype, said):
    folder = write(dtype="bf16")
    path = folder / "model.safetensors"
    tensors = stored(path)
    tensors[NORM] = tensors[NORM].astype(dtype)
    save_file(tensors, path)
    assert f"1 tensors of another dtype: {NORM} {said}" in refusal(folder)


def test_a_block_fp8_model_may_keep_a_linear_in_bf16(write, open_checkpoint, edit):
    folder = write(dtype="fp8")

    def change(tensors):
        del tensors[ROUTED + "_scale_inv"]
        tensors[ROUTED] = tensors[ROUTED].astype(ml_dtypes.bfloat16)

    edit(folder, change)
    assert open_checkpoint(folder).tensor(ROUTED).dtype == ml_dtypes.bfloat16


def test_fp8_is_refused_where_the_scheme_has_none(write, refusal, edit):
    folder = write(dtype="fp8")
    router = "model.layers.1.moe.gate.weight"
    assert not is_fp8_linear(router)
    edit(folder, lambda t: t.update({router: t[router].astype(ml_dtypes.float8_e4m3fn)}))
    assert f"{router} F8_E4M3, expected BF16" in refusal(folder)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda t: t.pop(ROUTED + "_scale_inv"), f"{ROUTED}_scale_inv is missing"),
        (
            lambda t: t.update({ROUTED + "_scale_inv": np.ones((8, 2, 1), np.float32)}),
            f"{ROUTED}_scale_inv F32 (8, 2, 1), expected F32 (8, 1, 1)",
        ),
        (
            lambda t: t.update({ROUTED + "_scale_inv": np.ones((8, 1, 1), ml_dtypes.bfloat16)}),
            f"{ROUTED}_scale_inv BF16 (8, 1, 1), expected F32 (8, 1, 1)",
        ),
        (
            lambda t: t.update({NORM + "_scale_inv": np.ones(1, np.float32)}),
            f"{NORM}_scale_inv belongs to a tensor that is BF16",
        ),
        (
            lambda t: t.update({"extra_scale_inv": np.ones(1, np.float32)}),
            "extra_scale_inv belongs to no tensor",
        ),
    ],
    ids=["missing", "shape", "dtype", "not-fp8", "no-tensor"],
)
def test_scales_that_do_not_fit_are_refused(write, refusal, edit, change, said):
    folder = write(dtype="fp8")
    edit(folder, change)
    assert refusal(folder) == f"{folder}: 1 scales that do not fit: {said}"


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float8_e4m3fn"])
@pytest.mark.parametrize("value", [np.nan, -np.nan, np.inf, -np.inf], ids=str)
def test_a_number_that_is_not_finite_is_named_with_its_place(dtype, value):
    data = np.ones((3, 5), np.float32)
    data[2, 1] = value
    with pytest.raises(CheckpointError, match=r"^w\[2, 1\] is "):
        check_finite(HostTensor("w", data.astype(dtype)))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float8_e4m3fn"])
def test_every_finite_number_passes(dtype):
    info = ml_dtypes.finfo(dtype)
    extremes = [info.max, info.min, info.smallest_subnormal, 0.0, -0.0]
    check_finite(HostTensor("w", np.array(extremes, dtype)))
    check_finite(HostTensor("w", np.ones((0, 4), dtype)))


def test_the_last_number_of_a_large_tensor_is_checked_too():
    data = np.ones((1 << 22) + 3, ml_dtypes.bfloat16)
    data[-1] = np.nan
    with pytest.raises(CheckpointError, match=rf"^w\[{(1 << 22) + 2}\] is nan"):
        check_finite(HostTensor("w", data))


@pytest.mark.parametrize("value", [0.0, -1.0, np.nan, np.inf], ids=str)
def test_a_scale_must_be_finite_and_above_zero(value):
    scale = np.ones((2, 3), np.float32)
    scale[1, 2] = value
    tensor = HostTensor("w", np.ones((256, 384), ml_dtypes.float8_e4m3fn), scale)
    with pytest.raises(CheckpointError, match=r"^w_scale_inv\[1, 2\] is "):
        check_finite(tensor)


def test_a_damaged_weight_is_refused_when_read_not_when_opened(write, open_checkpoint, edit):
    folder = write()
    edit(folder, lambda t: t[NORM].__setitem__(7, np.nan))
    checkpoint = open_checkpoint(folder)
    with pytest.raises(CheckpointError, match=r"model\.norm\.weight\[7\] is nan"):
        checkpoint.tensor(NORM)
    assert np.isnan(checkpoint.tensor(NORM, check=False).data[7])
