"""What crosses between processes: arrays and facts survive, and nothing else gets in."""

import json

import ml_dtypes
import numpy as np
import pytest

from step3_hetero.afd.contract import agree, model_digest
from step3_hetero.afd.messages import batch_of, batch_parcel, result_of, result_parcel
from step3_hetero.afd.parcel import parcel, unpacked
from step3_hetero.backend import BatchMeta
from step3_hetero.errors import EdgeMismatch
from step3_hetero.runtime.microbatch import (
    BatchResult,
    Choice,
    ImagePart,
    MicroBatch,
    RowLogprobs,
)
from step3_hetero.transport.base import Frame


def carried(said, arrays):
    """Return facts and arrays as they arrive, having been bytes on the way."""
    frame = parcel(8, 1, 7, said, arrays)
    sent = Frame(frame.kind, frame.epoch, frame.seq, bytes(frame.head), [*map(bytes, frame.parts)])
    return unpacked(sent, "f:0")


@pytest.mark.parametrize(
    "x",
    [
        np.arange(6, dtype=np.float32).reshape(2, 3),
        np.arange(6).reshape(3, 2).astype(ml_dtypes.bfloat16),
        np.arange(4).astype(ml_dtypes.float8_e4m3fn),
        np.zeros((0, 7168), np.float32),
        np.array([[-1, 2]], np.int32),
        np.arange(12, dtype=np.float32).reshape(3, 4)[:, ::2],
    ],
    ids=["float32", "bfloat16", "float8", "no rows", "int32", "strided"],
)
def test_an_array_survives_the_way(x):
    _, arrays = carried({}, {"u": x})
    assert arrays["u"].dtype == x.dtype
    np.testing.assert_array_equal(arrays["u"].astype(float), x.astype(float))


def head(arrays):
    return json.dumps({"said": {}, "arrays": arrays}).encode()


@pytest.mark.parametrize(
    ("raw", "parts", "why"),
    [
        (b"{", [], "Expecting"),
        (b"[1]", [], ""),
        (head([["u", "float32", [2]]]), [b"1234"], "takes 8 bytes, 4 came"),
        (head([["u", "object", [1]]]), [b"12345678"], "dtype 'object'"),
        (head([["u", "float32", [-1]]]), [b"1234"], "shape"),
        (head([["u", "float32", [True]]]), [b"1234"], "shape"),
        (head([["u", "float32", [1, 1, 1, 1, 1, 1]]]), [b"1234"], "shape"),
        (head([]), [b"1"], "0 arrays in 1 parts"),
        (head([["u", "float32", [2**40, 2**40]]]), [b"1234"], "takes"),
    ],
)
def test_a_head_that_does_not_fit_its_parts_is_refused(raw, parts, why):
    with pytest.raises(EdgeMismatch, match=f"f:0 sent a frame whose head does not fit it.*{why}"):
        unpacked(Frame(8, 0, 0, raw, parts), "f:0")


def test_a_micro_batch_with_images_survives_the_way():
    ids = np.array([5, 6, 7], np.int32)
    meta = BatchMeta(ids, ids * 2, np.array([0, 3], np.int32), np.array([9], np.int32),
                     np.array([[4, 0]], np.int32))  # fmt: skip
    draws = np.array([0.5])
    choice = Choice(draws, np.array([0], np.int32), draws, draws, banned=3)
    pixels = (np.ones((1, 4, 4, 3), np.float32), np.zeros((2, 2, 2, 3), np.float32))
    images = (ImagePart(1 << 16, 0, 2, ids[:2], pixels), ImagePart(2, 1, 2, ids[:1]))
    batch = MicroBatch(ids, meta, ids[2:], choice, [None], images, want_logits=True)
    got = batch_of(*carried(*batch_parcel(batch)))
    assert (got.choice.banned, got.logprobs, got.want_logits) == (3, [None], True)
    np.testing.assert_array_equal(got.meta.block_tables, meta.block_tables)
    assert got.images[1].pixels is None
    assert [p.shape for p in got.images[0].pixels] == [(1, 4, 4, 3), (2, 2, 2, 3)]


def test_a_result_survives_the_way_to_the_last_bit():
    logprobs = [RowLogprobs(-0.1, ((3, -0.1), (4, -2.302585092994046))), None]
    result = BatchResult(np.array([3, 9], np.int32), logprobs, np.eye(2, dtype=np.float32))
    got = result_of(*carried(*result_parcel(result)), 2, with_logits=True)
    assert got.logprobs == logprobs
    np.testing.assert_array_equal(got.logits, result.logits)


def test_two_sides_that_differ_are_both_named():
    with pytest.raises(EdgeMismatch) as refused:
        agree({"hidden": 64, "api": 1}, {"hidden": 128, "api": 1}, "a:0", "f:0")
    assert "a:0 and f:0 do not agree: hidden: 64 and 128" in str(refused.value)


def test_the_digest_of_a_model_follows_its_config_and_its_tensors(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    first = model_digest(tmp_path)
    header = b'{"x":{}}'
    (tmp_path / "m.safetensors").write_bytes(len(header).to_bytes(8, "little") + header)
    second = model_digest(tmp_path)
    (tmp_path / "config.json").write_text('{"a": 1}')
    assert len({first, second, model_digest(tmp_path)}) == 3
