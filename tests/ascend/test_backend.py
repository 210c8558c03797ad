"""The backend before a device is opened: what is listed, described, refused, and why."""

import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch

from step3_hetero.backend import BatchMeta
from step3_hetero.backends.ascend import cards, driver
from step3_hetero.conformance.case import Case
from step3_hetero.conformance.forms import OpTrial
from step3_hetero.conformance.trial import expected_of
from step3_hetero.errors import ConfigError, PlacementError, UnsupportedOp
from step3_hetero.placement.catalogue import Catalogue
from step3_hetero.specs import CacheSpec, OpSpec


def test_without_torch_npu_it_is_listed_with_the_reason(backend, monkeypatch):
    monkeypatch.delenv(driver.VARIABLE)
    assert backend.devices() == []
    assert "torch_npu is not installed" in backend.why_unavailable()
    with pytest.raises(PlacementError, match="torch_npu is not installed"):
        backend.open(0)


def test_stand_in_is_refused_beside_an_installed_torch_npu(backend, monkeypatch):
    real = driver.find_spec
    monkeypatch.setattr(driver, "find_spec", lambda n: real("json" if n == "torch_npu" else n))
    assert "unset the variable" in backend.why_unavailable()


def test_stand_in_that_does_not_load_is_told_with_its_cause(backend, monkeypatch, tmp_path):
    (tmp_path / "__init__.py").write_text("raise OSError('no such driver')\n")
    monkeypatch.setenv(driver.VARIABLE, str(tmp_path))
    assert backend.why_unavailable().endswith("does not load: OSError: no such driver")


def test_tier_follows_the_stand_in(backend, monkeypatch):
    assert backend.reference_info(None).tier == "host stand-in"
    monkeypatch.delenv(driver.VARIABLE)
    assert backend.reference_info(None).tier == "device"


def test_importing_it_needs_no_torch():
    code = "import step3_hetero.backends.ascend, sys; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize("name", cards.CARDS)
def test_cards_are_those_of_the_catalogue(name, backend):
    listed, info = Catalogue.read().card(name), backend.reference_info(name)
    assert listed.memory_bytes == info.memory_bytes
    assert listed.memory_bandwidth_bytes_per_s == info.bandwidth_bytes_per_s
    assert tuple(listed.driver_names) == cards.CARDS[name].chips
    assert listed.title == cards.CARDS[name].title
    flops = {{"bf16": "bfloat16"}.get(dtype, dtype): x for dtype, x in listed.flops_per_s.items()}
    assert flops == pytest.approx(dict(info.flops_per_s))


def test_card_of_another_vendor_is_refused(backend):
    with pytest.raises(PlacementError, match=r"no card 'h800'; cards: ascend-910b, "):
        backend.reference_info("h800")


@pytest.mark.parametrize(
    ("options", "said"),
    [({"kv_split": 100}, "multiple of 128"), ({"kv_split": True}, "multiple of 128"),
     ({"kv_split": -128}, "multiple of 128"), ({"nz": 1}, "true or false"),
     ({"threads": 2}, "has no option 'threads'")],
)  # fmt: skip
def test_bad_option_is_refused(options, said, backend):
    with pytest.raises(ConfigError, match=said):
        backend.open(0, options)


def test_device_that_is_not_there_is_refused(backend):
    with pytest.raises(PlacementError, match="has 1 devices here; asked for 1"):
        backend.open(1)


@pytest.mark.parametrize(
    ("spec", "limit"),
    [
        (OpSpec("attention", "bfloat16", {"heads": 128, "kv_heads": 1, "head_dim": 256}), "head r"),
        (OpSpec("attention", "bfloat16", {"heads": 64, "kv_heads": 1, "head_dim": 513}), "head d"),
        (OpSpec("attention", "bfloat16", {"heads": 64}, {}, None, "float8_e4m3fn"), "KV dt"),
        (OpSpec("attention", "bfloat16", {"heads": 64}, {}, None, "float32"), "KV dt"),
        (
            OpSpec("attention", "bfloat16", {"heads": 64, "head_dim": 513}, {}, None, "int8"),
            "head d",
        ),
        (OpSpec("rope", "float32", {"heads": 64, "head_dim": 896}), "rotary"),
        (OpSpec("route", "float32", {"experts": 48}, {"top_k": 49}), "top-k"),
        (OpSpec("experts", "bfloat16", {"experts": 1}), "groups"),
        (OpSpec("experts", "bfloat16", {"experts": 2, "inter": 32768}), "inner axis"),
        (OpSpec("linear", "bfloat16", {"in": 65536, "out": 8}, {}, "int8"), "inner axis"),
        (OpSpec("linear", "float32", {}, {}, "int8"), "weights"),
        (OpSpec("linear", "float64"), "dtype"),
        (OpSpec("quantise", "float32", {}, {"dtype": "float8_e4m3fn"}), "wire dtype"),
        (OpSpec("fft", "float32"), "op"),
    ],
    ids=str,
)
def test_supports_refuses_by_the_limits_name(spec, limit, backend):
    assert backend.supports(backend.reference_info(None), spec).startswith(limit)


def test_supports_takes_the_released_models_sizes(backend):
    info = backend.reference_info(None)
    heads = {"heads": 64, "kv_heads": 1, "head_dim": 256}
    experts = {"experts": 48, "top_k": 3, "hidden": 7168, "inter": 5120}
    for spec in (OpSpec("attention", "bfloat16", heads, kv_format="bfloat16"),
                 OpSpec("attention", "bfloat16", heads, kv_format="int8"),
                 OpSpec("rope", "bfloat16", heads, {"theta": 5e5}),
                 OpSpec("experts", "bfloat16", experts, weight_format="int8"),
                 OpSpec("linear", "bfloat16", {"in": 16384, "out": 7168}, weight_format="int8"),
                 OpSpec("route", "float32", {"experts": 48}, {"top_k": 3})):  # fmt: skip
        assert backend.supports(info, spec) is None


def meta(positions, context):
    n = len(positions)
    return BatchMeta(np.array(positions, np.int32), np.arange(n, dtype=np.int32),
                     np.array([0, n], np.int32), np.array([context], np.int32),
                     np.zeros((1, 1), np.int32))  # fmt: skip


def test_queries_that_are_not_the_last_of_their_context_are_refused(device):
    cache = device.open_cache(CacheSpec(1, 16, 1, "bfloat16"))
    q = device.empty((2, 4, 16), "bfloat16")
    with pytest.raises(UnsupportedOp, match="the last 2 of its 9 tokens"):
        device.kernel("attention")(q, cache, device.batch(meta([3, 4], 9)), scale=1.0)


def test_position_beyond_the_table_is_refused(device):
    with pytest.raises(UnsupportedOp, match="positions: 65,536 refused"):
        device.batch(meta([65536], 65537)).angles(16, 1e4, torch.bfloat16)


def test_pinned_copies_arrive(device):
    host = np.arange(6, dtype=np.float32)
    buffer = device.host_buffer(host.nbytes).view(np.float32)
    buffer[:] = host
    x = device.empty((6,), "float32")
    device.copy_in(buffer, x).wait(1.0)
    back = np.zeros(6, np.float32)
    device.copy_out(x, back).wait()
    assert np.array_equal(back, host)
    assert device.owns(x) and not device.owns(back)
    memory = device.memory()
    assert 0 < memory.free_bytes < memory.total_bytes == 64 * 10**9


def test_contexts_in_parts_give_what_whole_ones_give(backend):
    from step3_hetero.conformance.exam import examine
    from step3_hetero.conformance.suite import select

    split = backend.open(0, {"kv_split": 128})
    chosen = select(["attention bfloat16 contexts", "!kv="])
    assert len(chosen) > 8
    for trial in chosen:
        result = examine(backend, split, trial)
        assert result.status == "passed", result


def test_128_query_heads_over_one_are_what_two_ranks_of_64_attend(backend, device):
    """What the limit's sentence advises: each rank has half the query heads and all of the KV."""
    dims = {"heads": 128, "kv_heads": 1, "head_dim": 32, "queries": (1, 1, 3),
            "contexts": (130, 5, 17), "blocks": 4, "padding": 0}  # fmt: skip
    trial = OpTrial(Case("attention", "bfloat16", dims, {"scale": 0.2}))
    whole = OpSpec("attention", "bfloat16", {"heads": 128, "kv_heads": 1, "head_dim": 32})
    assert "split the query heads over 2 tensor-parallel ranks" in backend.supports(
        device.info, whole
    )
    inputs, expected = expected_of(trial)
    parts = []
    for rank in range(2):
        own = np.ascontiguousarray(inputs.arrays["q"][:, 64 * rank : 64 * (rank + 1)])
        placed = trial.place(
            device, replace(inputs, arrays={**inputs.arrays, "q": own}), "bfloat16"
        )
        parts.append(device.to_host(trial.call(device, placed, "bfloat16")["out"]))
    judged = expected.judged("out", np.concatenate(parts, 1))
    assert (judged.row_error <= judged.row_bound).all()
    assert (judged.element_error <= judged.element_bound).all()
