"""Batches out of range and full memory: refused with what was asked, never computed."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from step3_hetero.backend import BatchMeta
from step3_hetero.backends.cuda import attention, moe, stages
from step3_hetero.backends.cuda.graphs import DecodeBatch
from step3_hetero.backends.cuda.memory import memory_for, stage_name
from step3_hetero.conformance.stages import StageCase
from step3_hetero.errors import PlacementError, UnsupportedOp
from step3_hetero.registry import get_backend
from step3_hetero.specs import CacheSpec, HostTensor, OpSpec

FITS = {"positions": [4], "slots": [4], "query_starts": [0, 1], "context_lens": [5],
        "block_tables": [[0]]}  # fmt: skip


def meta(**changed):
    return BatchMeta(**{n: np.array(x, np.int32) for n, x in (FITS | changed).items()})


@pytest.fixture
def checking():
    return get_backend("cuda").open(0, {"interpret": True, "check_indices": True})


def attend(device, batch, blocks=3):
    cache = device.open_cache(CacheSpec(1, 16, blocks, "float32"))
    q = torch.zeros(batch.tokens, 2, 16)
    return attention.attention(q, cache, device.batch(batch), scale=1.0)


@pytest.mark.parametrize("kind", ["device", "checking"])
def test_sequence_longer_than_its_table_is_refused(kind, request):
    said = "sequence 1 has 129 tokens; its row of the block table has 1 blocks of 128"
    two = meta(positions=[4, 128], slots=[4, 128], query_starts=[0, 1, 2], context_lens=[5, 129],
               block_tables=[[0], [1]])  # fmt: skip
    with pytest.raises(UnsupportedOp, match=said):
        attend(request.getfixturevalue(kind), two)


def test_padded_step_longer_than_its_table_is_refused(device):
    long = meta(positions=[128], slots=[128], context_lens=[129])
    with pytest.raises(UnsupportedOp, match="sequence 0 has 129 tokens"):
        DecodeBatch(1, 1, device.place).fill(long)


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"slots": [384]}, "slot 384 is not in this cache: -1 to 383 are allowed"),
        ({"slots": [-2]}, "slot -2 is not in this cache"),
        ({"block_tables": [[3]]}, "block 3 is not in this cache: 0 to 2 are allowed"),
        ({"block_tables": [[0, -1]]}, "block -1 is not in this cache"),
        (
            {"query_starts": [0, 2]},
            r"query_starts \[0, 2\] do not rise from 0 to at most the 1 tok",
        ),
        ({"query_starts": [1, 1]}, r"query_starts \[1, 1\] do not rise"),
        ({"positions": [5]}, "position 5 of token 0 is not in its sequence: 0 to 4 are allowed"),
        ({"positions": [-1]}, "position -1 of token 0"),
    ],
)
def test_index_out_of_range_is_refused_where_it_is_looked_for(changed, said, checking):
    attend(checking, meta())
    with pytest.raises(UnsupportedOp, match=said):
        attend(checking, meta(**changed))
    cache = checking.open_cache(CacheSpec(1, 16, 3, "float32"))
    k = torch.zeros(1, 1, 16)
    with pytest.raises(UnsupportedOp, match=said):
        cache.write(k, k, checking.batch(meta(**changed)))


@pytest.fixture
def full(monkeypatch):
    """Let a function fail as torch does on a full card."""
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda place: (5, 80_000_000_000))

    def fill(module, name):
        def fail(*_, **__):
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 3.42 GiB.")

        monkeypatch.setattr(module, name, fail)

    return fill


FREE = r": 5 of 80,000,000,000 bytes free; .* \(torch: .* Tried to allocate 3\.42 GiB"
WEIGHT = HostTensor("model.layers.7.moe.w", np.ones((4, 4), np.float32))


def test_full_memory_is_told_with_what_was_asked(full):
    said = r"cpu: out of memory for weights a\.b: 5 of 80,000,000,000 bytes free"
    with pytest.raises(PlacementError, match=said), memory_for("weights a.b", torch.device("cpu")):
        raise torch.OutOfMemoryError
    assert full


def test_weights_that_do_not_fit_are_named(device, full):
    full(torch, "cat")
    with pytest.raises(PlacementError, match=r"for weights model\.layers\.7\.moe\.w" + FREE):
        device.prepare("linear", {"a": WEIGHT}, OpSpec("linear", "float32"))


def test_cache_that_does_not_fit_is_told_with_its_bytes_and_its_stage(device, full):
    device.prepare("linear", {"a": WEIGHT}, OpSpec("linear", "float32"))
    full(torch, "zeros")
    said = r"for a KV cache of 16,384 bytes \(.*\) after the weights model\.layers\.7\.moe\.w"
    with pytest.raises(PlacementError, match=said + FREE):
        device.open_cache(CacheSpec(1, 16, 1, "float32"))


@pytest.mark.parametrize(
    ("kind", "where", "said"),
    [
        ("ffn", (moe, "swiglu"), r"a run of the ffn stage of .* over u \(3, \d+\), "),
        ("attention", (stages, "add_rms_norm"), r"a run of the attention stage of .* over x \(3, "),
        ("vision", (F, "conv2d"), r"a run of the vision stage over pixels \(2, 24, 24, 3\)"),
    ],
)
def test_stage_that_finds_no_memory_is_named_with_its_sizes(kind, where, said, device, full):
    text = {"layer": 1, "queries": (1, 1, 1), "contexts": (130, 7, 256)}
    pixels = {"images": 2, "side": 24}
    case = StageCase(kind, "float32", "odd", **(pixels if kind == "vision" else text))
    placed = case.place(device, case.inputs(), "float32")
    stage = placed.stages[0]
    full(*where)
    if kind != "vision":
        stage.plan(case.inputs().meta)
    with pytest.raises(PlacementError, match=said):
        stage.run(placed.arrays)


def test_stage_is_named_after_what_its_weights_share(device):
    tensors = {n: HostTensor(f"model.layers.11.{n}", np.ones((4, 4), np.float32))
               for n in ("moe.gate.weight", "share.down.weight")}  # fmt: skip
    weights = device.prepare("linear", tensors, OpSpec("linear", "float32"))
    assert stage_name("ffn", {"w": weights, "norm": 1}) == "ffn stage of model.layers.11"
    assert stage_name("embed", {}) == "embed stage"
