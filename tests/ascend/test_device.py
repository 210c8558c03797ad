"""The stand-in is a device as strict as torch_npu's: what it takes, refuses and tells."""

import hashlib
import json
from pathlib import Path

import pytest
import torch

STAND_IN = Path(__file__).with_name("device")
SCHEMAS = json.loads((STAND_IN / "schemas.json").read_text())


def npu(*shape):
    return torch.ones(shape).to("npu")


def test_arrays_are_plain_tensors_of_the_device():
    x = npu(2, 3)
    assert type(x) is torch.Tensor and x.device == torch.device("npu", 0)
    assert torch.equal((x + x).cpu(), torch.full((2, 3), 2.0))


def test_views_share_memory_and_writes_go_through():
    x = torch.zeros(2, 2).to("npu")
    x.view(-1)[1:3] = 7
    x.t()[0].add_(1)
    assert x.cpu().tolist() == [[1, 7], [8, 0]]


@pytest.mark.parametrize(
    "call",
    [
        lambda: npu(2) + torch.ones(2),
        lambda: torch.nn.functional.linear(npu(2, 2), torch.ones(2, 2)),
        lambda: torch.ops.npu.npu_rms_norm(npu(2, 2), torch.ones(2), epsilon=1e-5),
        lambda: npu(3).index_select(0, torch.tensor([1])),
    ],
)
def test_arrays_of_two_devices_are_refused(call):
    with pytest.raises(RuntimeError, match=r"npu"):
        call()


def test_unknown_keyword_is_refused():
    with pytest.raises(RuntimeError, match="eps"):
        torch.ops.npu.npu_rms_norm(npu(2, 2), npu(2), eps=1e-5)


def test_operator_without_an_npu_kernel_is_refused():
    with pytest.raises(RuntimeError, match="lists no NPU kernel"):
        torch.special.bessel_j0(npu(2))


def test_arithmetic_in_fp8_is_refused():
    x = torch.ones(2).to(torch.float8_e4m3fn).to("npu")
    with pytest.raises(RuntimeError, match="no FP8 arithmetic"):
        x.abs()


def test_vendor_operator_takes_no_host_array():
    with pytest.raises(NotImplementedError, match="npu_swiglu"):
        torch.ops.npu.npu_swiglu(torch.ones(2, 4))


def test_empty_arrays_on_which_the_documents_are_silent_are_refused():
    with pytest.raises(RuntimeError, match="silent"):
        torch.ops.npu.npu_rms_norm(npu(0, 4), npu(4))


def test_convolution_is_coarse_until_hf32_is_switched_off(device):
    x, k = torch.full((1, 1, 3, 3), 1 + 2**-20), torch.ones(1, 1, 3, 3)
    torch.npu.conv.allow_hf32 = True
    coarse = torch.nn.functional.conv2d(x.to("npu"), k.to("npu")).item()
    type(device)(device.info, 0)  # opening a device switches it off
    fine = torch.nn.functional.conv2d(x.to("npu"), k.to("npu")).item()
    assert coarse == 9.0 < fine


def test_signatures_are_those_of_the_pinned_wheel():
    assert SCHEMAS["package"] == "torch-npu 2.13.0"
    assert SCHEMAS["sha256"] == "0deb809cf447d3fce636ccfdc9c9f874950f1fe76f18f4aaab31e2d345f7dac0"
    for name, signature in SCHEMAS["ops"].items():
        registered = str(getattr(torch.ops.npu, name).default._schema)
        arguments = [a.name for a in getattr(torch.ops.npu, name).default._schema.arguments]
        assert registered.startswith(f"npu::{name}(")
        for argument in arguments:
            assert f" {argument}" in signature or f"({argument}" in signature


def test_compiled_device_belongs_to_its_source():
    """A build is named by its source and torch, so that a stale one is never loaded."""
    text = (STAND_IN / "device.cpp").read_text(encoding="utf-8") + torch.__version__
    name = f"npu-{hashlib.sha256(text.encode()).hexdigest()[:16]}.so"
    assert name in {Path(p).name for p in torch.ops.loaded_libraries}
