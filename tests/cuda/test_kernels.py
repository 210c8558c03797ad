"""What conformance has no case for: other formats of the cache, FP8 products, the other card."""

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from step3_hetero.backend import BatchMeta
from step3_hetero.backends.cuda import attention, jobs, moe
from step3_hetero.backends.cuda.kernels import rows as row_kernels
from step3_hetero.backends.cuda.launch import launch, recording
from step3_hetero.backends.reference.quant import quantise_runs as definition
from step3_hetero.backends.torch_common.arrays import to_torch
from step3_hetero.backends.torch_common.weights import STRIP_ROWS, dense
from step3_hetero.conformance.case import Case
from step3_hetero.conformance.exam import examine
from step3_hetero.conformance.forms import OpTrial
from step3_hetero.conformance.tolerance import ROUNDOFF
from step3_hetero.registry import get_backend
from step3_hetero.specs import CacheSpec, HostTensor, OpSpec

FP8 = "float8_e4m3fn"
FORMATS = (FP8, "int8")
STEP = {"float8_e4m3fn": 2.0**-4, "int8": 0.5 / 127}
"""Half a step of a code: relative for e4m3 (three bits behind the first), of the largest in a row
for int8."""


def meta_of(queries, contexts, rng, spare=2):
    """Return a batch over shuffled blocks."""
    starts = np.cumsum([0, *queries])
    blocks = [-(-c // 128) for c in contexts]
    order = rng.permutation(sum(blocks) + spare)
    tables = np.zeros((len(contexts), max(blocks)), int)
    positions, slots, used = [], [], 0
    for s, (q, c) in enumerate(zip(queries, contexts, strict=True)):
        tables[s, : blocks[s]] = order[used : used + blocks[s]]
        used += blocks[s]
        new = np.arange(c - q, c)
        positions.append(new)
        slots.append(tables[s, new // 128] * 128 + new % 128)
    arrays = (np.concatenate(positions), np.concatenate(slots), starts, contexts, tables)
    return BatchMeta(*(np.asarray(x, np.int32) for x in arrays)), sum(blocks) + spare


def whole(meta, blocks):
    """Return the batch that writes every slot."""
    slots = np.arange(blocks * 128, dtype=np.int32)
    ends = np.array([0, len(slots)], np.int32)
    return BatchMeta(slots * 0, slots, ends, ends[1:], np.zeros((1, 1), np.int32))


def exact_attention(q, k, v, meta, scale):
    """Return attention in float64 over keys and values (blocks, 128, kv_heads, head_dim)."""
    out = np.zeros(q.shape)
    group = q.shape[1] // k.shape[2]
    for s in range(meta.seqs):
        table = meta.block_tables[s]
        keys, values = (np.repeat(x[table].reshape(-1, *x.shape[2:]), group, 1) for x in (k, v))
        for row in range(meta.query_starts[s], meta.query_starts[s + 1]):
            n = meta.positions[row] + 1
            scores = np.einsum("hd,nhd->hn", q[row], keys[:n]) * scale
            p = np.exp(scores - scores.max(-1, keepdims=True))
            out[row] = np.einsum("hn,nhd->hd", p / p.sum(-1, keepdims=True), values[:n])
    return out


@pytest.mark.parametrize("arch", [80, 90])
@pytest.mark.parametrize("held", FORMATS)
@pytest.mark.parametrize(("heads", "kv_heads", "head_dim"), [(64, 1, 256), (6, 2, 40)])
def test_attention_over_a_quantised_cache(held, arch, heads, kv_heads, head_dim, rng):
    device = get_backend("cuda").open(0, {"interpret": True, "arch": arch})
    meta, blocks = meta_of((1, 3), (600, 131), rng)
    cache = device.open_cache(CacheSpec(kv_heads, head_dim, blocks, held))
    size = (blocks * 128, kv_heads, head_dim)
    history = [torch.from_numpy(rng.standard_normal(size, np.float32)).bfloat16() for _ in "kv"]
    cache.write(*history, device.batch(whole(meta, blocks)))
    q = torch.from_numpy(rng.standard_normal((4, heads, head_dim), np.float32)).bfloat16()
    got = attention.attention(q, cache, device.batch(meta), scale=head_dim**-0.5)
    stored = [x.astype(np.float64) for x in cache.read(range(blocks))]
    want = exact_attention(q.double().numpy(), *stored, meta, head_dim**-0.5)
    error = np.linalg.norm(got.double().numpy() - want, axis=-1) / np.linalg.norm(want, axis=-1)
    assert error.max() < ROUNDOFF["bfloat16"]  # probabilities and result: half of it each


@pytest.mark.parametrize("held", FORMATS)
def test_cache_holds_each_row_within_half_a_code(held, device, rng):
    cache = device.open_cache(CacheSpec(2, 40, 2, held))
    meta = whole(None, 2)
    sizes = 10.0 ** rng.integers(-3, 4, (256, 2, 1))
    k, v = ((rng.standard_normal((256, 2, 40)) * sizes).astype(np.float32) for _ in "kv")
    k[3, 1] = 0
    cache.write(torch.from_numpy(k), torch.from_numpy(v), device.batch(meta))
    for stored, given in zip(cache.read(range(2)), (k, v), strict=True):
        given = given.reshape(stored.shape)
        top = np.abs(given).max(-1, keepdims=True)
        step = STEP[held] * (top if held == "int8" else np.abs(given) + top * 2.0**-14)
        assert (np.abs(stored - given) <= step * (1 + 1e-6)).all()


def test_quantised_cache_copies_scales_with_their_rows(device, rng):
    cache = device.open_cache(CacheSpec(1, 16, 3, "int8"))
    k = torch.from_numpy(rng.standard_normal((384, 1, 16), np.float32))
    cache.write(k, 3 * k, device.batch(whole(None, 3)))
    cache.copy_blocks([(0, 2)])
    for stored in cache.read(range(3)):
        np.testing.assert_array_equal(stored[0], stored[2])


def test_turned_and_written_is_turned_then_written(device, rng):
    meta, blocks = meta_of((1, 5), (300, 40), rng)
    k, v = (torch.from_numpy(rng.standard_normal((6, 1, 64), np.float32)).bfloat16() for _ in "kv")
    batch = device.batch(meta)
    one, two = (device.open_cache(CacheSpec(1, 64, blocks, "bfloat16")) for _ in range(2))
    one.write_turned(k, v, batch, theta=5e5)
    two.write(device.kernel("rope")(k, batch.positions, theta=5e5), v, batch)
    for a, b in zip(one.read(range(blocks)), two.read(range(blocks)), strict=True):
        np.testing.assert_array_equal(a, b)


def test_split_and_whole_attention_agree(device, rng, monkeypatch):
    meta, blocks = meta_of((1, 1), (1500, 3), rng)
    cache = device.open_cache(CacheSpec(1, 32, blocks, "float32"))
    size = (blocks * 128, 1, 32)
    history = [torch.from_numpy(rng.standard_normal(size, np.float32)) for _ in "kv"]
    cache.write(*history, device.batch(whole(meta, blocks)))
    q = torch.from_numpy(rng.standard_normal((2, 8, 32), np.float32))
    found = []
    for splits in (1, 2, 7):
        monkeypatch.setattr(attention, "splits_of", lambda *_, n=splits: n)
        found.append(attention.attention(q, cache, device.batch(meta), scale=0.2))
    for other in found[1:]:
        torch.testing.assert_close(other, found[0], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("stored", "held"), [("", ""), (FP8, ""), ("", "int8"), (FP8, "int8")])
def test_experts_of_the_a800(stored, held, a800):
    dims = {"tokens": 9, "experts": 3, "top_k": 2, "hidden": 130, "inter": 140}
    case = Case("experts", "bfloat16", dims, stored=stored, held=held)
    found = examine(get_backend("cuda"), a800, OpTrial(case))
    assert found.status == "passed", found.findings


def test_int8_sums_beyond_what_float32_holds_are_exact(device, rng):
    """2048 products of 127 and 127 are 33 million: above 2^24, where float32 skips numbers."""
    codes = np.full((2, 2048), 127, np.float32)
    codes[1, 0] = 126
    weights = device.prepare(
        "linear", {"w": HostTensor("w", codes)}, OpSpec("linear", "float32", weight_format="int8")
    )
    x = torch.from_numpy(np.full((1, 2048), 127, np.float32))
    got = device.kernel("linear")(x, weights).double().numpy()[0]
    exact = 2048 * 127**2 - np.array([0, 127])
    assert (got == exact.astype(np.float32)).all()


def test_rows_and_weights_are_rounded_to_integers_as_the_definition_does(device, rng):
    from step3_hetero.backends.cuda.rows import quantise_rows

    rows = rng.standard_normal((9, 1500)).astype(np.float32) * 10.0 ** rng.integers(-30, 30, (9, 1))
    rows = rows.astype(np.float32)
    rows[3] = 0
    rows[4] = 1e-40  # its scale would be no normal float32
    codes, scales = quantise_rows(torch.from_numpy(rows))
    wanted, wanted_scales = definition(rows, "int8")
    np.testing.assert_array_equal(codes.numpy(), wanted)
    np.testing.assert_array_equal(scales.numpy(), wanted_scales)


def test_fp8_activations_err_by_their_own_rounding_alone(rng):
    device = get_backend("cuda").open(0, {"interpret": True, "fp8_activations": True})
    sizes = {"gate": (4, 256, 128), "up": (4, 256, 128), "down": (4, 128, 256)}
    codes = {n: rng.standard_normal(s).astype("float8_e4m3fn") for n, s in sizes.items()}
    scales = {n: 0.02 + rng.random((s[0], s[1] // 128, s[2] // 128), np.float32) * 0.1
              for n, s in sizes.items()}  # fmt: skip
    tensors = {n: HostTensor(n, codes[n], scales[n].astype(np.float32)) for n in sizes}
    spec = OpSpec("experts", "bfloat16", weight_format="auto")
    weights = device.prepare("experts", tensors, spec)
    assert weights.method == "block FP8 as stored, activations in FP8"
    u = to_torch(rng.standard_normal((40, 128)).astype("bfloat16"))
    ids = torch.from_numpy(np.stack([rng.permutation(4)[:2] for _ in range(40)]).astype(np.int32))
    share = torch.full((40, 2), 0.5, dtype=torch.bfloat16)
    got = device.kernel("experts")(u, share, ids, weights).double().numpy()
    dense = {
        n: codes[n].astype(np.float64) * np.repeat(np.repeat(scales[n], 128, 1), 128, 2)
        for n in sizes
    }
    want = np.zeros((40, 128))
    for t in range(40):
        for e in ids[t]:
            gate, up = (dense[n][e] @ u[t].double().numpy() for n in ("gate", "up"))
            want[t] += 0.5 * dense["down"][e] @ (gate / (1 + np.exp(-gate)) * up)
    error = np.linalg.norm(got - want) / np.linalg.norm(want)
    assert 0.5 * 2.0**-6 < error < 2.0**-4  # e4m3 rounds to 2^-4 at most, and did


def test_swiglu_and_quantisation_in_one_pass_are_both_in_turn(device, rng):
    both = to_torch(rng.standard_normal((5, 2 * 200)).astype("bfloat16"))
    codes = torch.empty((5, 200), dtype=torch.uint8)
    scales = torch.empty((5, 2))
    launch(row_kernels.swiglu_quantise, (1, 2), both, codes, scales, 5, 200, E4M3=True, ROWS=8)
    inner = device.kernel("swiglu")(both)
    q, scale = device.kernel("quantise")(inner, dtype="float8_e4m3fn")
    assert torch.equal(codes, q.view(torch.uint8))
    assert torch.equal(scales, scale)


@pytest.mark.parametrize(("tokens", "experts", "top_k"), [(1, 5, 3), (700, 6, 2), (40, 48, 3)])
def test_every_slot_is_listed_once_in_a_tile_of_its_expert(tokens, experts, top_k, rng):
    ids = np.stack([rng.permutation(experts)[:top_k] for _ in range(tokens)]).astype(np.int32)
    ids[rng.random(ids.shape) < 0.2] = -1
    chosen = moe.gemm_configuration(90, torch.bfloat16, "plain", 16)
    rows, tile_expert = moe.by_expert(torch.from_numpy(ids), experts, chosen)
    block = chosen.block("BLOCK_M")
    tiles = rows.view(-1, block).numpy()
    listed = tiles[tiles >= 0]
    assert sorted(listed) == np.flatnonzero(ids.ravel() >= 0).tolist()
    for tile, expert in zip(tiles, tile_expert.tolist(), strict=True):
        assert (ids.ravel()[tile[tile >= 0]] == expert).all()
        assert (expert >= 0) == (tile >= 0).any()


def test_nothing_is_launched_for_nothing(device):
    empty = torch.empty((0, 64))
    assert device.kernel("rms_norm")(empty, torch.ones(64), eps=1e-5).shape == (0, 64)


def test_kernels_of_a_card_are_started_without_asking_it_anything():
    """Tensors without memory refuse every look at their values: a host sync would raise."""
    for arch in (80, 90):
        assert len(jobs.jobs(arch)) > 70
    with recording(90), pytest.raises(RuntimeError, match="meta"):
        torch.empty(1, device="meta").item()


class LargestMade(TorchDispatchMode):
    """Notes the bytes of the largest array made in float64."""

    nbytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        if isinstance(made, torch.Tensor) and made.dtype == torch.float64:
            self.nbytes = max(self.nbytes, made.nbytes)
        return made


@pytest.mark.parametrize("stored", ["float32", FP8])
def test_a_large_matrix_is_rounded_to_int8_in_strips(stored, device, rng):
    """In one piece the head's 128,815 rows would take 7.4 GB of float64, several times over."""
    data = rng.standard_normal((2 * STRIP_ROWS + 300, 8)).astype(stored)
    scale = None if stored == "float32" else rng.random((19, 1)).astype(np.float32)
    tensor = HostTensor("w", data, scale)
    with LargestMade() as seen:
        weights = device.prepare(
            "linear", {"w": tensor}, OpSpec("linear", "bfloat16", weight_format="int8")
        )
    assert 0 < seen.nbytes <= STRIP_ROWS * 8 * 8
    codes, scales = definition(dense(tensor, torch.float32).numpy(), "int8")
    np.testing.assert_array_equal(weights.parts[0].codes.numpy(), codes)
    np.testing.assert_array_equal(weights.parts[0].scales.numpy(), scales)


def test_slots_beyond_two_to_the_31_elements_are_reached(device, rng, monkeypatch):
    """A card of 80 GB holds such a cache; here its pages are taken where they are written."""

    def lazy(shape, dtype, device):
        return torch.from_numpy(np.zeros(shape, np.int8))

    monkeypatch.setattr(attention.torch, "zeros", lazy)
    far = 2**31 // (128 * 256) + 3
    positions, ends = np.arange(130, dtype=np.int32), np.array([0, 130], np.int32)
    q, k, v = (torch.from_numpy(rng.standard_normal((130, 1, 256)).astype(np.float32))
               for _ in "qkv")  # fmt: skip
    found = []
    for first, blocks in ((far, far + 1), (0, 2)):
        cache = device.open_cache(CacheSpec(1, 256, blocks, "int8"))
        assert (cache.k.numel() > 2**31) == (first == far)
        table = np.array([[first, 1]], np.int32)
        slots = (table[0, positions // 128] * 128 + positions % 128).astype(np.int32)
        batch = device.batch(BatchMeta(positions, slots, ends, ends[1:], table))
        cache.write(k, v, batch)
        found.append(device.kernel("attention")(q, cache, batch, scale=0.0625))
    assert torch.equal(*found)
    assert found[0].abs().max() > 0.01
