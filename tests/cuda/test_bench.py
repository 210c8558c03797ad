"""The whole of ``bench.gpu`` at tiny sizes, on the interpreted device, with a made-up clock.

Libraries that need a card are stand-ins that compute what theirs would: a call with the wrong
arrays shows. Nothing here is a measurement.
"""

import json
import os
import re
import shutil
import subprocess
import sys
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType

import pytest
import torch
import torch.nn.functional as F
from click.testing import CliRunner

from bench import gpu, gpu_work
from bench.gpu import Bench, in_words, report

TINY = gpu_work.Sizes(256, 4, 32, 64, 128, 4, 2, 300, 3, 4, 1 << 12, 32)

LIBRARIES = ("flashinfer", "flash_attn", "deep_gemm")


class Clock:
    """Seconds that pass by being asked for, and a timer that finds every call to take 1 ms."""

    def __init__(self, step=0.0):
        self.time = 0.0
        self.step = step
        self.calls = 0

    def now(self):
        self.time += self.step
        return self.time

    def seconds(self, work, until):
        self.calls += 1
        assert until() in (True, False)
        work()
        return 1e-3


@pytest.fixture
def only(monkeypatch):
    """Leave jobs of some names alone: each is tried in full once, and takes seconds."""
    every = gpu_work.jobs

    def leave(begin):
        chosen = lambda *a: (j for j in every(*a) if j.name.startswith(begin))  # noqa: E731  short
        monkeypatch.setattr(gpu_work, "jobs", chosen)

    return leave


@pytest.fixture(scope="module")
def lines(device):
    clock, find = Clock(), gpu_work.find_spec
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gpu_work, "find_spec", lambda n: None if n in LIBRARIES else find(n))
        found = list(Bench(device, TINY, clock.seconds, clock.now).lines())
    return {line["name"]: line for line in found}


def test_every_job_of_ours_runs_and_is_set_beside_bandwidth_and_peak(lines):
    bandwidth, peak = (lines[n] for n in ("copy bandwidth", "bfloat16 GEMM"))
    assert bandwidth["bytes_per_s"] == 2 * TINY.copied_bytes / 1e-3
    assert peak["flops_per_s"] == 2 * TINY.square**3 / 1e-3
    ours = {n: line for n, line in lines.items() if line.get("ours")}
    assert len(ours) == 9
    for line in ours.values():
        assert "failed" not in line, line
        assert line["of_bandwidth"] == line["bytes"] / 1e-3 / bandwidth["bytes_per_s"]
        assert line["of_peak"] == line["flops"] / 1e-3 / peak["flops_per_s"]
        assert line["of_bound"] == max(line["of_bandwidth"], line["of_peak"])


def test_what_is_not_installed_is_named(lines):
    said = {line["not_there"] for line in lines.values() if "not_there" in line}
    assert said == {f"{name} is not installed" for name in LIBRARIES}


def test_targets_are_those_of_decode_and_of_the_librarys_experts(lines):
    decode = lines["MFA decode, KV bfloat16"]
    kv = 2 * 3 * 384 * 32 * 2  # keys and values of three blocks for each of three sequences
    assert (decode["bytes"], decode["flops"]) == (kv, 4 * 3 * 4 * 32 * 300)
    assert decode["target"] == 0.8
    plain = lines["experts, weights plain"]
    assert plain["against"] == gpu_work.GROUPED
    assert plain["of_library"] == 1.0
    assert plain["reached"] is True
    assert plain["flops"] == 6 * 4 * 4 * 256 * 128  # four experts of four tokens
    assert "target" not in lines["decode: torch SDPA, heads as rows"]


def test_layer_counts_only_experts_that_were_chosen(lines):
    plain = lines["layer, attention and FFN, experts plain"]
    router, kv = 4 * 256, 2 * 3 * 384 * 32 * 2
    dense = (64 + 64) * 256 + 128 * 64 + 256 * 128 + 3 * 128 * 256
    chosen = (plain["bytes"] - 2 * dense - 4 * router - kv) / (2 * 3 * 256 * 128)
    assert chosen in (2, 3, 4)  # of four, three tokens choose two each
    routed = 3 * 2 * 256 * 128
    assert plain["flops"] == 2 * 3 * (dense + router + routed) + 4 * 3 * 4 * 32 * 300


def test_a_card_without_fp8_arithmetic_says_so(a800, only):
    only("experts, weights e4m3 x")
    clock = Clock()
    lines = {x["name"]: x for x in Bench(a800, TINY, clock.seconds, clock.now).lines()}
    assert "sm_80" in lines["experts, weights e4m3 x e4m3"]["not_there"]


def test_after_the_cap_nothing_starts_and_what_there_is_is_written(device, tmp_path, capsys):
    clock = Clock(step=200.0)
    path = tmp_path / "figures.json"
    assert report(Bench(device, TINY, clock.seconds, clock.now), path, {"card": "none"}) == 0
    written = json.loads(path.read_text())
    assert written["card"] == "none"
    assert [line["name"] for line in written["lines"][:2]] == ["copy bandwidth", "bfloat16 GEMM"]
    assert {line.get("not_run") for line in written["lines"][2:]} == {"480 s were over"}
    assert clock.calls == 2
    assert "not run: 480 s were over" in capsys.readouterr().out


def test_file_is_complete_after_every_line(device, tmp_path, monkeypatch):
    path = tmp_path / "figures.json"
    seen = []
    monkeypatch.setattr(gpu.click, "echo", lambda *_: seen.append(
        len(json.loads(path.read_text())["lines"]) if path.exists() else 0))  # fmt: skip
    clock = Clock(step=200.0)
    report(Bench(device, TINY, clock.seconds, clock.now), path, {})
    assert seen == list(range(len(seen)))
    assert list(tmp_path.iterdir()) == [path]


def test_kernel_of_ours_that_fails_fails_the_run_and_a_librarys_does_not(
    device, tmp_path, monkeypatch, only
):
    only(("MFA decode", "decode: torch"))

    def fail(*_):
        raise RuntimeError("no such kernel image")

    clock, path = Clock(), tmp_path / "f.json"
    monkeypatch.setattr(gpu_work, "_sdpa", fail)
    assert report(Bench(device, TINY, clock.seconds, clock.now), path, {}) == 0
    monkeypatch.setattr(gpu_work, "_decode", fail)
    assert report(Bench(device, TINY, clock.seconds, clock.now), path, {}) == 1
    failed = [line for line in json.loads(path.read_text())["lines"] if "failed" in line]
    assert {line["failed"] for line in failed} == {"RuntimeError: no such kernel image"}
    assert len(failed) == 4


def test_missed_target_is_told():
    line = {"name": "a", "ours": True, "s": 1.0, "of_bandwidth": 0.5, "of_peak": 0.25,
            "target": 0.8, "reached": False}  # fmt: skip
    assert in_words(line).endswith("50.0% of bandwidth,  25.0% of peak, target 80% MISSED")


def test_experts_by_torch_are_the_experts_that_ours_compute(device, monkeypatch):
    stack = gpu_work._stack(device, TINY, "plain")
    routed = gpu_work._routed(device, TINY)
    monkeypatch.setattr(gpu_work, "_stack", lambda *_: stack)
    monkeypatch.setattr(gpu_work, "_routed", lambda *_: routed)
    ours, theirs = (f().call().float() for f in (
        lambda: gpu_work._experts(device, TINY, "plain"),
        lambda: gpu_work._grouped(device, TINY)))  # fmt: skip
    assert (ours - theirs).norm() < 0.02 * theirs.norm()  # bfloat16 rounds to 2^-8, several times


def test_every_expert_gets_the_tokens_that_the_target_speaks_of(device):
    _, _, ids = gpu_work._routed(device, TINY)
    assert ids.flatten().bincount().tolist() == [TINY.tokens_each] * TINY.experts
    assert all(len(set(row)) == TINY.top_k for row in ids.tolist())
    assert gpu_work.STEP3.tokens_each == 128


def attended(q, keys, values):
    """Return the attention of (batch, heads, head_dim) over (batch, keys, 1, head_dim)."""
    k, v = (x.transpose(1, 2) for x in (keys, values))
    return F.scaled_dot_product_attention(q[:, None].float(), k.float(), v.float())[:, 0]


@pytest.fixture
def stand_ins(monkeypatch):
    """Put modules with the libraries' calls in their place; each notes what it was given."""
    given = {}
    made = {name: ModuleType(name) for name in LIBRARIES}

    class Wrapper:
        def __init__(self, space, layout, use_tensor_cores):
            assert (space.dtype, layout, use_tensor_cores) == (torch.uint8, "NHD", True)

        def plan(self, starts, pages, last, heads, kv_heads, head_dim, page, **dtypes):
            assert set(dtypes.values()) == {torch.bfloat16}
            assert (heads, kv_heads, head_dim) == (4, 1, 32)
            self.rows = [(pages[a:b].tolist(), (b - a - 1) * page + n) for a, b, n in
                         zip(starts[:-1].tolist(), starts[1:].tolist(), last.tolist(),
                             strict=True)]  # fmt: skip

        def run(self, q, kv):
            assert kv.shape[1:] == (2, 16, 1, 32)
            given["flashinfer"] = [n for _, n in self.rows]
            return torch.cat([
                attended(q[i:i + 1], *(x.reshape(1, -1, 1, 32)[:, :n] for x in kv[p].unbind(1)))
                for i, (p, n) in enumerate(self.rows)])  # fmt: skip

    def with_kvcache(q, k, v, cache_seqlens, block_table, causal):
        given["flash_attn"] = cache_seqlens.tolist()
        assert k.shape[1:] == (256, 1, 32)
        assert causal
        return torch.cat([attended(q[i], k[p].reshape(1, -1, 1, 32), v[p].reshape(1, -1, 1, 32))
                          for i, p in enumerate(block_table.long())])  # fmt: skip

    def product(a, b, out, expert):
        (x, x_scale), (w, w_scale) = a, b
        given.setdefault("deep_gemm", []).append(tuple(out.shape))
        assert x.dtype == w.dtype == torch.float8_e4m3fn
        assert x_scale.shape == (len(x), x.shape[1] // 128)
        assert w_scale.shape == (len(w), w.shape[1] // 128, w.shape[2] // 128)
        assert len(expert) == len(x)
        out.copy_(torch.einsum("mk,mnk->mn", x.float(), w.float()[expert.long()]))

    made["flashinfer"].BatchDecodeWithPagedKVCacheWrapper = Wrapper
    made["flash_attn"].flash_attn_with_kvcache = with_kvcache
    made["deep_gemm"].m_grouped_fp8_gemm_nt_contiguous = product
    for name, module in made.items():
        module.__spec__ = ModuleSpec(name, None)
        monkeypatch.setitem(sys.modules, name, module)
    return given


def test_libraries_are_given_arrays_that_they_can_take(device, stand_ins, only):
    only(("decode: Flash", "experts: DeepGEMM"))
    clock = Clock()
    lines = list(Bench(device, TINY, clock.seconds, clock.now).lines())
    assert not [line for line in lines if {"failed", "not_there"} & line.keys()]
    assert stand_ins["flashinfer"] == stand_ins["flash_attn"] == [300] * 3
    assert stand_ins["deep_gemm"] == [(16, 128), (16, 128), (16, 256)]


def test_library_that_does_not_import_is_told_with_its_reason(monkeypatch):
    def broken(name):
        raise OSError("libcudart.so.11: cannot open shared object file")

    monkeypatch.setattr(gpu_work, "find_spec", lambda name: object())
    monkeypatch.setattr(gpu_work.importlib, "import_module", broken)
    with pytest.raises(gpu_work.NotThere, match=r"flash_attn does not import: libcudart\.so\.11"):
        gpu_work.installed("flash_attn")


def test_conformance_beyond_the_cap_leaves_no_certificate(monkeypatch, capsys):
    def slow(command, check, timeout):
        assert {"--full", "--workers", str(gpu.WORKERS)} <= set(command)
        raise subprocess.TimeoutExpired(command, timeout)

    monkeypatch.setattr(gpu.subprocess, "run", slow)
    assert gpu.certify(480.0) == 1
    assert "did not end within 480 s: no certificate" in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a card here")
@pytest.mark.parametrize("options", [[], ["--test"]])
def test_without_a_card_it_says_so_and_writes_nothing(options, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    done = CliRunner().invoke(gpu.main, options)
    assert done.exit_code == 0
    assert done.output.startswith("skipped: torch")
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")
@pytest.mark.parametrize(
    ("target", "driver", "build"),
    [("test-gpu", True, "2.13.0"), ("bench-gpu", True, "2.13.0"), ("test-gpu", False, "2.13.0+cpu"),
     ("demo", True, "2.13.0+cpu")],
)  # fmt: skip
def test_make_installs_the_torch_that_the_machine_can_use(target, driver, build, tmp_path):
    """The build without CUDA would say "skipped" on a machine full of cards."""
    if driver:
        (tmp_path / "nvidia-smi").write_text("#!/bin/sh\n")
        (tmp_path / "nvidia-smi").chmod(0o755)
    elif shutil.which("nvidia-smi"):
        pytest.skip("this machine has a driver")
    done = subprocess.run(
        ["make", "-n", target, f"VENV={tmp_path / 'venv'}", "TORCH=2.13.0"],
        cwd=Path(gpu.__file__).parents[1], check=True, capture_output=True, text=True,
        env=os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}"},
    )  # fmt: skip
    assert re.findall(r'install "torch==(\S+)"', done.stdout)[0] == build
