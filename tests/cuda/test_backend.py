"""What the cuda backend says of itself and of what it cannot do, without a card."""

import subprocess
import sys
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import torch
import yaml

from step3_hetero.backends.cuda import jobs
from step3_hetero.backends.cuda.cards import CARDS
from step3_hetero.errors import ConfigError, PlacementError, UnsupportedOp
from step3_hetero.registry import get_backend
from step3_hetero.specs import HostTensor, OpSpec

ROOT = Path(__file__).resolve().parents[2]

without_card = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a card here")


@pytest.fixture(scope="module")
def backend():
    return get_backend("cuda")


@without_card
def test_without_cuda_there_is_no_device_and_the_reason_says_what_is_missing(backend):
    assert list(backend.devices()) == []
    assert "interpret: true" in backend.why_unavailable()
    with pytest.raises(PlacementError, match=r"backend cuda: .*(without CUDA|no NVIDIA card)"):
        backend.open(0)


def test_interpreted_device_says_so(cuda):
    info = cuda[1].info
    assert info.tier == "interpreted"
    assert "interpreter" in info.description


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"interpet": True}, "no option 'interpet'; options: interpret"),
        ({"interpret": 1}, "option interpret: 1 refused; allowed: true, false"),
        ({"interpret": True, "arch": 70}, "option arch: 70 refused; allowed: 80, 90"),
        ({"arch": 80}, "option arch: only with interpret: true"),
        ({"interpret": True, "arch": 80, "fp8_activations": True}, "fp8_activations: refused"),
    ],
)
def test_bad_option_is_refused_with_what_is_allowed(backend, options, said):
    with pytest.raises(ConfigError, match=said):
        backend.open(0, options)


def test_interpreter_has_one_device(backend):
    with pytest.raises(PlacementError, match="asked for 1"):
        backend.open(1, {"interpret": True})


def test_cards_are_those_of_the_catalogue():
    catalogue = yaml.safe_load((ROOT / "placement" / "devices.yaml").read_text())["cards"]
    for name, card in CARDS.items():
        known = catalogue[name]
        assert card.title == known["title"]
        assert card.memory_bytes == known["memory_gb"] * 10**9
        assert card.bandwidth_bytes_per_s == known["memory_bandwidth_gb_per_s"] * 1e9
        assert card.bf16_flops_per_s == known["tflops"]["bf16"] * 1e12
        fp8 = known["tflops"]["fp8"]
        assert card.fp8_flops_per_s == (None if fp8 is None else fp8 * 1e12)


def test_a_card_without_fp8_arithmetic_stores_it_and_computes_without(backend):
    a800, h800 = (backend.reference_info(name).dtypes for name in ("a800", "h800"))
    assert "float8_e4m3fn" in a800.stored
    assert "float8_e4m3fn" not in a800.computed
    assert "float8_e4m3fn" in h800.computed
    with pytest.raises(PlacementError, match="no card 'b100'; it knows h800"):
        backend.reference_info("b100")


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        (OpSpec("convolve", "float32"), "no kernel for 'convolve'"),
        (OpSpec("add", "float64"), "no arithmetic in float64; computes in float32, bfloat16"),
        (OpSpec("embed", "bfloat16", weight_format="int8"), "cannot be held as int8; allowed"),
        (OpSpec("linear", "bfloat16", weight_format="float16"), "cannot be held as float16"),
        (OpSpec("linear", "bfloat16", {"in": 133_145}, weight_format="int8"), "133145 columns;"),
        (OpSpec("experts", "bfloat16", {"inter": 133_145}, weight_format="int8"), "to 133144"),
        (OpSpec("attention", "bfloat16", {}, kv_format="float32"), "float32 for bfloat16; allowed"),
        (OpSpec("attention", "bfloat16", {"heads": 0}), "0 query heads on 1 KV heads"),
        (OpSpec("route", "float32", {"experts": 4}, {"top_k": 0}), "top_k 0 .* allowed: 1 to 4"),
        (OpSpec("attention", "bfloat16", {"head_dim": 256}, kv_format="float16"), "no KV cache"),
        (OpSpec("attention", "bfloat16", {"head_dim": 100}), "head_dim 100; allowed: multiples"),
        (OpSpec("attention", "bfloat16", {"head_dim": 264}), "head_dim 264; allowed: multiples"),
        (OpSpec("attention", "bfloat16", {"heads": 65, "kv_heads": 1}), "65 query heads on one"),
        (OpSpec("attention", "bfloat16", {"heads": 5, "kv_heads": 2}), "5 query heads do not"),
        (OpSpec("rope", "bfloat16", {"head_dim": 15}), "head_dim 15 is odd"),
        (OpSpec("rms_norm", "bfloat16", {"hidden": 40000}), "rows of 40000; .* up to 32768"),
        (OpSpec("layer_norm", "bfloat16", {"width": 40000}), "rows of 40000; .* up to 32768"),
        (OpSpec("route", "float32", {"experts": 2000}), "2000 experts; allowed: up to 1024"),
        (OpSpec("route", "float32", {"experts": 4}, {"top_k": 5}), "top_k 5 of 4 experts"),
    ],
)
def test_refusal_names_what_was_asked_and_what_there_is(backend, spec, said):
    import re

    reason = backend.supports(backend.reference_info("h800"), spec)
    assert reason and re.search(said, reason)


def test_step3_itself_is_claimed(backend):
    info = backend.reference_info("a800")
    heads = {"heads": 64, "kv_heads": 1, "head_dim": 256}
    for spec in (
        OpSpec("attention", "bfloat16", heads, {"scale": 0.0625}, kv_format="bfloat16"),
        OpSpec("rope", "bfloat16", heads, {"theta": 5e5}),
        OpSpec("route", "float32", {"experts": 48}, {"top_k": 3, "renormalise": False}),
        OpSpec("experts", "bfloat16", {"experts": 48, "hidden": 7168}, weight_format="auto"),
        OpSpec("experts", "bfloat16", {"experts": 48, "hidden": 7168}, weight_format="int8"),
        OpSpec("linear", "bfloat16", {"in": 18432, "out": 7168}, weight_format="int8"),
        OpSpec("attention", "float32", heads, {"scale": 0.0625}, kv_format="float32"),
        OpSpec("rms_norm", "bfloat16", {"hidden": 7168}, {"eps": 1e-5}),
        OpSpec("self_attention", "bfloat16", {"heads": 16, "head_dim": 112}),
    ):
        assert backend.supports(info, spec) is None


def test_an_older_card_is_refused_with_what_it_lacks(monkeypatch):
    from step3_hetero.backends.cuda import device

    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda place: (7, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda place: "Tesla V100")
    said = r"cuda:0 is an Tesla V100, compute capability 7\.0: no bfloat16 .* need 8\.0 .* or newer"
    with pytest.raises(PlacementError, match=said):
        device.open_device(0, {"interpret": False})


def test_longest_int8_sum_fits_an_int32():
    from step3_hetero.backends.cuda.claims import LONGEST_SUM

    assert LONGEST_SUM * 127**2 < 2**31 <= (LONGEST_SUM + 1) * 127**2


def test_what_cannot_be_prepared_is_refused(device):
    with pytest.raises(UnsupportedOp, match="asked for 'rope'"):
        device.prepare("rope", {}, OpSpec("rope", "float32"))


def test_memory_for_the_host_is_writable_and_of_the_size_asked(device):
    buffer = device.host_buffer(1000)
    buffer[:] = 7
    assert (buffer.dtype, buffer.shape, int(buffer.sum())) == (np.uint8, (1000,), 7000)


def test_examples_hold():
    import doctest

    from step3_hetero.backends.cuda import attention, launch

    for module in (attention, launch):
        result = doctest.testmod(module)
        assert result.attempted and not result.failed


def test_importing_the_backend_loads_no_vendor_library():
    code = "import sys, step3_hetero.backends.cuda; print(*{'torch', 'triton'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""


def test_only_block_fp8_is_multiplied_as_stored():
    from step3_hetero.backends.cuda.linear import stays_fp8

    def stays(dtype, weight_format="auto"):
        scale = np.ones((1, 1), np.float32)
        tensor = HostTensor("w", np.ones((2, 4), np.float32).astype(dtype), scale)
        return stays_fp8([tensor], OpSpec("linear", "bfloat16", weight_format=weight_format))

    assert stays(ml_dtypes.float8_e4m3fn)
    assert not stays(ml_dtypes.float8_e4m3fn, "bfloat16")
    assert not stays(np.int8)


def test_micro_batches_in_turn_are_placed_once_each(device):
    metas = [jobs.decoding(1, 2, 128) for _ in range(4)]
    first = [device.batch(meta) for meta in metas]
    again = [device.batch(meta) for _layer in range(3) for meta in metas]
    assert all(a is b for a, b in zip(again, first * 3, strict=True))
    assert len({id(b) for b in first}) == 4
