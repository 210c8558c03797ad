"""The count of bytes and FLOP, and what it says of decoding."""

import json

import pytest
import torch

from bench.gpu_roofline import DOC, HEAD_DIM, HEADS, KEYS, SEQS, _attention, count
from step3_hetero.backends.cuda.interpreter import counting


def test_every_access_of_a_kernel_is_counted(device):
    x = torch.randn(5, 96).bfloat16()
    with counting() as traffic:
        device.kernel("swiglu")(x)
    assert traffic.asked_bytes == traffic.least_bytes == 5 * (96 + 48) * 2
    assert traffic.flops == 0


def test_an_address_that_is_read_twice_counts_once_at_least(device):
    x, weight = torch.randn(64, 4096), torch.ones(4096)
    with counting() as traffic:
        device.kernel("rms_norm")(x, weight, eps=1e-5)
    assert traffic.least_bytes == (2 * 64 + 1) * 4096 * 4
    assert traffic.asked_bytes == (2 * 64 + 64) * 4096 * 4  # each program reads the weight


def test_nothing_is_counted_outside(device):
    with counting() as traffic:
        pass
    device.kernel("swiglu")(torch.randn(2, 96))
    assert traffic.asked_bytes == 0


@pytest.fixture(scope="module")
def decode():
    from step3_hetero.registry import get_backend

    opened = get_backend("cuda").open(0, {"interpret": True})
    name, flops, call = next(iter(_attention(opened)))
    return count(name, flops, call)


def test_decoding_reads_each_key_and_value_once_for_all_heads(decode):
    kv = 2 * SEQS * KEYS * HEAD_DIM * 2
    q_and_out = 2 * SEQS * HEADS * HEAD_DIM * 2
    assert kv + q_and_out < decode.least_bytes  # and the results of two splits, and tables
    assert decode.asked_bytes < 1.05 * decode.least_bytes
    assert decode.done_flops == decode.least_flops


def test_kept_sheet_is_what_is_counted(decode):
    assert str(decode) in DOC.read_text(encoding="utf-8").splitlines(), json.dumps(str(decode))
