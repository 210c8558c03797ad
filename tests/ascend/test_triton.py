"""Option ``triton``: what is launched, what is refused, and that nothing else answers for it.

What the kernels compute is tier 3's business (tests/ascend/t3); here a launcher does what their
docstrings say.
"""

import ctypes
import json
import os
import re
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from step3_hetero.backends.ascend import attention, decode, limits
from step3_hetero.backends.ascend.device import AscendDevice
from step3_hetero.backends.ascend.limits import LimitExceeded
from step3_hetero.conformance.case import Case
from step3_hetero.conformance.exam import examine
from step3_hetero.conformance.forms import OpTrial
from step3_hetero.conformance.suite import select
from step3_hetero.errors import ConfigError, PlacementError
from step3_hetero.specs import CacheSpec

T3 = Path(__file__).with_name("t3")
PLANS = json.loads((T3 / "plans.json").read_text(encoding="utf-8"))
CHIPS = ["Ascend910B1", "Ascend910B2", "Ascend910B3", "Ascend910B4"]


def case(contexts, heads=64, queries=None):
    """Return a case of MFA whose sequences decode, unless they have several queries."""
    queries = queries or (1,) * len(contexts)
    dims = {"heads": heads, "kv_heads": 1, "head_dim": 256, "queries": queries,
            "contexts": contexts, "blocks": 16, "padding": 1}  # fmt: skip
    return OpTrial(Case("attention", "bfloat16", dims, {"scale": 0.0625}))


def on_host(x):
    """Return an array of the stand-in as the host's: no operator of the device is called."""
    if not isinstance(x, torch.Tensor):
        return x
    assert x.is_contiguous() and x.device.type == "npu"
    memory = (ctypes.c_byte * x.nbytes).from_address(x.data_ptr())
    return torch.frombuffer(memory, dtype=x.dtype).view(x.shape)


class Documented:
    """A launcher that does what the kernels' docstrings say, in float32, and notes the grids."""

    def __init__(self, merge=True):
        self.grids = []
        self.merge = merge

    def __call__(self, name, grid, args, constants):
        """Do the work of a whole grid."""
        self.grids.append((name, *grid))
        if name == "attend" or self.merge:
            getattr(self, name)(grid, *map(on_host, args), **constants)

    def attend(self, grid, q, k, v, out, lse, tables, contexts, stride, share, scale, **sizes):
        """Fill every split's results and sums."""
        assert sizes == decode.constants(q.shape[1], 256, split=grid[1] > 1)
        assert stride == tables.shape[1] and contexts.dtype == tables.dtype == torch.int32
        for s in range(grid[0]):
            keys, values = (x[tables[s].long()].reshape(-1, 256).float() for x in (k, v))
            for part in range(grid[1]):
                seen = slice(part * share, min((part + 1) * share, int(contexts[s])))
                scores = q[s].float() @ keys[seen].T * scale
                found = torch.softmax(scores, -1) @ values[seen]
                if sizes["SPLIT"]:
                    out[part, s] = found
                    lse[part, s] = torch.logsumexp(scores, -1)
                else:
                    out[s] = found.bfloat16()

    def combine(self, grid, partial, lse, out, splits, **sizes):
        """Merge the splits."""
        assert partial.shape[0] == splits and grid[0] * sizes["ROWS"] == lse[0].numel()
        shares = torch.softmax(lse, 0)[..., None]
        out.copy_((partial * shares).sum(0).bfloat16())


def opened(backend, launch, split=0):
    """Return a device that decodes by the launcher."""
    return AscendDevice(backend.devices()[0], 0, kv_split=split, triton=launch)


@pytest.mark.parametrize("heads", [64, 32, 16])
@pytest.mark.parametrize("split", [0, 128, 256])
def test_decoding_sequences_go_through_the_kernels(backend, heads, split):
    launch = Documented()
    result = examine(backend, opened(backend, launch, split), case((5, 129, 700, 300), heads))
    assert result.status == "passed", result.findings
    cut = {0: {(4, 1)}, 128: {(1, 1), (1, 2), (1, 6), (1, 3)}, 256: {(2, 1), (1, 3), (1, 2)}}
    assert cut[split] <= {tuple(grid) for name, *grid in launch.grids if name == "attend"}
    merged = {rest[0] for name, *rest in launch.grids if name == "combine"}
    assert merged == ({heads // 16} if split else set())


def test_parts_that_are_not_merged_are_found(backend):
    device = opened(backend, Documented(merge=False), 128)
    assert examine(backend, device, case((5, 129))).status == "failed"


def test_prompts_go_through_the_vendors_operator(backend, monkeypatch):
    fused, launch, calls = attention._fused, Documented(), []
    monkeypatch.setattr(attention, "_fused", lambda *a: calls.append(len(a[0])) or fused(*a))
    trial = case((128, 261), queries=(1, 5))
    assert examine(backend, opened(backend, launch), trial).status == "passed"
    assert set(calls) == {5} and {g for g in launch.grids} == {("attend", 1, 1)}


def test_without_the_option_nothing_is_launched(backend, device):
    assert device.triton is None
    assert examine(backend, device, case((5, 129))).status == "passed"


def test_real_attention_stage_decodes_through_the_kernel(backend):
    wanted = "attention_stage[step3-7-experts,layer=1,queries=1+1+3,contexts=1+300+129,bfloat16]"
    [trial] = select([wanted], full=True)
    launch = Documented()
    assert examine(backend, opened(backend, launch), trial).status == "passed"
    assert ("attend", 2, 1) in launch.grids


@pytest.mark.parametrize(
    ("kv_heads", "head_dim", "dtype"),
    [(2, 256, "bfloat16"), (1, 128, "bfloat16"), (1, 256, "float32")],
)
def test_cache_that_the_kernel_cannot_read_is_refused_when_opened(
    backend, kv_heads, head_dim, dtype
):
    spec = CacheSpec(blocks=2, kv_heads=kv_heads, head_dim=head_dim, dtype=dtype)
    with pytest.raises(LimitExceeded, match="leave option triton off"):
        opened(backend, Documented()).open_cache(spec)


def test_launch_of_too_many_programs_is_refused():
    def started(seqs, **parts):
        cache = torch.empty(4, 128, 1, 256, dtype=torch.bfloat16, device="meta")
        q = torch.empty(seqs, 64, 256, dtype=torch.bfloat16, device="meta")
        counts = torch.empty(seqs, 2, dtype=torch.int32, device="meta")
        grids = []
        decode.attend(lambda name, grid, *_: grids.append((name, *grid)), q, cache, cache, counts,
                      counts[:, 0], scale=1.0, **parts)  # fmt: skip
        return grids

    assert started(65535) == [("attend", 65535, 1)]
    assert started(16383, parts=2, split=128) == [("attend", 16383, 2), ("combine", 65532)]
    for seqs, parts in ((65536, {}), (16384, {"parts": 2, "split": 128})):
        with pytest.raises(LimitExceeded, match="Triton programs: 65,536 refused"):
            started(seqs, **parts)


def test_heads_that_were_never_compiled_are_refused_and_not_attended_otherwise(backend):
    result = examine(backend, opened(backend, Documented()), case((5,), heads=8))
    assert result.status == "failed"
    assert "Triton decode heads: 8 refused; allowed: 16, 32, 64" in result.findings[0].message


def test_stand_in_refuses_the_option(backend):
    with pytest.raises(PlacementError, match="the host stand-in runs no Triton kernel"):
        backend.open(0, {"triton": True})


def test_missing_compiler_is_told(monkeypatch):
    monkeypatch.setattr(decode.driver, "stand_in", lambda: False)
    monkeypatch.setattr(decode, "find_spec", lambda name: None)
    with pytest.raises(PlacementError, match=r"install triton-ascend==3\.2\.0"):
        decode.launcher()


def test_on_a_card_the_kernels_own_launch_is_taken(monkeypatch):
    monkeypatch.setattr(decode.driver, "stand_in", lambda: False)
    monkeypatch.setattr(decode, "find_spec", lambda name: name)
    assert decode.launcher() is decode._on_card


def test_option_is_true_or_false(backend):
    with pytest.raises(ConfigError, match="option triton: 'yes' refused; true or false"):
        backend.open(0, {"triton": "yes"})


def test_kernels_in_use_have_a_plan_for_every_chip():
    wanted = [
        "attend" + "".join(f" {n}={v}" for n, v in decode.constants(h, 256, split=s).items())
        for h in (64, 32, 16)
        for s in (False, True)
    ]
    wanted.append(f"combine ROWS={decode.MERGED_ROWS} HEAD_DIM=256")
    for name in wanted:
        plans = PLANS[name]
        assert [chip for chips in plans for chip in chips.split()] == CHIPS
        for plan in plans.values():
            assert all(n <= limits.ON_CHIP_BYTES[memory] for memory, n in plan["bytes"].items())


@pytest.mark.parametrize("tile", [16, 32, 64, 128, 256, 512])
def test_page_shows_the_committed_plans(tile):
    page = (T3.parents[2] / "docs" / "ascend.md").read_text(encoding="utf-8")
    [row] = [line for line in page.splitlines() if re.match(rf"\s*\| \**{tile}\b[^|]* \|", line)]
    sizes = decode.constants(64, 256, tile, split=False)
    [plan] = PLANS["attend" + "".join(f" {n}={v}" for n, v in sizes.items())].values()
    if "bytes" in plan:
        assert row.endswith("".join(f" {n:,} |" for n in plan["bytes"].values()))
    else:
        assert [f"{int(n):,}" for n in re.findall(r"\d+", plan["refused"])] == re.findall(
            r"[\d,]{4,}", row
        )


@pytest.mark.parametrize("tile", [256, 512])
def test_tile_over_the_limit_is_refused_before_the_compiler(tile):
    with pytest.raises(LimitExceeded, match=r"L1: [\d,]+ refused; .*use smaller tiles"):
        limits.decode_tile(64, 256, tile)


def test_tier_3_says_what_it_lacks_when_it_does_not_run():
    done = subprocess.run(
        [sys.executable, str(T3 / "run.py")], env={**os.environ, "PATH": ""},
        text=True, capture_output=True, timeout=60, check=False,
    )  # fmt: skip
    assert (done.returncode, done.stdout) == (0, "tier 3: not run: no C compiler (gcc)\n")


def test_a_launch_goes_to_the_device_of_its_arrays(monkeypatch):
    """Triton launches on the current device of the thread, which may be another."""
    from step3_hetero.backends.ascend.kernels import attention as kernels

    said = []

    @contextmanager
    def device(place):
        said.append(f"current {place}")
        yield
        said.append("as before")

    class Kernel:
        def __getitem__(self, grid):
            return lambda *args, **constants: said.append((grid, len(args), constants))

    monkeypatch.setattr(kernels, "attend", Kernel())
    monkeypatch.setattr(decode.driver, "module", lambda: SimpleNamespace(device=device))
    decode._on_card("attend", [2, 1], (torch.ones(1).to("npu"), 5), {"TILE": 128})
    assert said == ["current npu:0", ((2, 1), 2, {"TILE": 128}), "as before"]
