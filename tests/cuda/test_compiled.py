"""The compile gate: what it must refuse, what its table holds. ``make cuda-gate`` runs it all."""

import json
import re
from dataclasses import replace

import pytest
import torch
from click.testing import CliRunner

from bench import gpu_compiled
from bench.gpu_compiled import ARCHS, TABLE, as_text, differences
from step3_hetero.backends.cuda import attention, compiling, moe
from step3_hetero.backends.cuda.cards import SHARED_BYTES
from step3_hetero.backends.cuda.configurations import configuration, table
from step3_hetero.backends.cuda.jobs import DECODING, HEAD_DIM, Job, _attend, jobs, stack
from step3_hetero.backends.cuda.launch import recording

ARCH = 90
"""One process compiles for one arch."""


def decode(monkeypatch, **changed):
    """Return the decode kernel at Step-3's heads, its configuration changed."""
    real = configuration("attend", arch=ARCH, numbers="bfloat16", size=HEAD_DIM)
    blocks = dict(real.blocks) | {n: v for n, v in changed.items() if n.startswith("BLOCK")}
    rest = {n: v for n, v in changed.items() if not n.startswith("BLOCK")}
    seeded = replace(real, blocks=tuple(blocks.items()), **rest)
    monkeypatch.setattr(attention, "attend_configuration", lambda cache, dtype: seeded)
    with recording(ARCH) as launches:
        _attend(ARCH, torch.bfloat16, "bfloat16", HEAD_DIM, 1, DECODING)
    return Job("decode", ARCH, next(m for m in launches if m.kernel.fn.__name__ == "attend"))


def said(job):
    return compiling.faults(compiling.compile_job(job))


def test_decode_compiles_to_tensor_cores_without_spilling(monkeypatch):
    job = decode(monkeypatch)
    found = compiling.compile_job(job)
    assert compiling.faults(found) == []
    assert found.HGMMA > 0
    assert 0 < found.registers <= 255


def test_seeded_spill_fails(monkeypatch):
    assert any("spills" in s for s in said(decode(monkeypatch, num_warps=4, BLOCK_N=128)))


def test_seeded_overflow_of_shared_memory_fails(monkeypatch):
    faults = said(decode(monkeypatch, BLOCK_N=128, num_stages=3))
    assert any("bytes of shared memory, the card has 232448" in s for s in faults)


def test_seeded_loss_of_the_tensor_core_instruction_fails(monkeypatch):
    faults = said(decode(monkeypatch, BLOCK_M=16))
    assert any("no HGMMA, which its configuration promises" in s for s in faults)


def test_every_entry_of_the_configurations_is_compiled():
    used = {}
    for arch in ARCHS:
        for job in jobs(arch):
            chosen = job.launch.configuration
            if chosen is not None:
                used[chosen] = job.name
    unused = [c for c in table() if c not in used]
    assert {(c.kernel, c.numbers, c.largest) for c in unused} <= NEVER_AT_STEP3_SIZES


NEVER_AT_STEP3_SIZES = {
    ("rms_norm", "any", 32768),
    ("layer_norm", "any", 8192),
    ("layer_norm", "any", 32768),
    ("attend_image", "bfloat16", 64),
    ("attend_image", "bfloat16", 256),
}
"""Entries for sizes that no job has: rows wider than Step-3's, heads unlike it."""


def test_every_kernel_is_compiled_for_both_archs():
    from step3_hetero.backends.cuda.kernels import attention as a
    from step3_hetero.backends.cuda.kernels import gemm, norm, rope, rows
    from step3_hetero.backends.cuda.kernels import moe as m

    helpers = {
        "weigh", "folded", "exponential", "as_rows", "add_product", "gated", "store_run",
        "turned", "store_halves", "decode_e4m3", "encode_e4m3", "nearest_integer",
    }  # fmt: skip
    kernels = {
        name
        for file in (a, gemm, norm, rope, rows, m)
        for name, value in vars(file).items()
        if hasattr(value, "arg_names")
    } - helpers
    for arch in ARCHS:
        assert {job.launch.kernel.fn.__name__ for job in jobs(arch)} == kernels


def test_promises_are_those_of_the_card():
    for c in table():
        multiplies = c.kernel in ("attend", "attend_image", "gemm") and "float32" not in c.numbers
        assert bool(c.promises) == multiplies, c
        if c.numbers == "int8" and c.kernel == "gemm":
            assert c.promises in {80: {"IMMA"}, 90: {"IMMA", "IGMMA"}}[c.arch]
        else:
            assert c.promises in {80: {"", "HMMA"}, 90: {"", "HMMA", "HGMMA", "QGMMA"}}[c.arch]


def test_integer_products_run_on_integer_tensor_cores():
    product = "experts bfloat16, weights int8, 512 tokens: gemm, gated"
    found = compiling.compile_job(next(j for j in jobs(ARCH) if j.name == product))
    assert compiling.faults(found) == []
    assert found.IGMMA > 0
    assert found.HGMMA == found.HMMA == 0


@pytest.fixture(scope="module")
def kept():
    return json.loads(TABLE.read_text(encoding="utf-8"))


def test_table_has_a_line_for_every_job(kept):
    rows = [row["kernel"] for row in kept["kernels"]]
    names = {re.match(r"(sm_\d+ .*) \[", row)[1] for row in rows}
    assert len(rows) == len(set(rows))
    assert names == {f"sm_{job.arch} {job.name}" for arch in ARCHS for job in jobs(arch)}


def test_table_keeps_within_every_card(kept):
    for row in kept["kernels"]:
        assert row["shared_bytes"] <= SHARED_BYTES[int(row["kernel"][3:5])]
        assert row["registers"] <= 255


def compiled(**changed):
    return replace(
        compiling.Compiled("a: b", 90, "BLOCK=1", "", 40, 0, 0, 100, 0, 0, 0, 0, 0, 0, 0, 0),
        **changed,
    )


def test_changed_figure_is_told_with_both_numbers():
    kept = json.loads(as_text([compiled()]))
    assert differences([compiled()], kept) == []
    assert differences([compiled(registers=48)], kept) == [
        "sm_90 a: b [BLOCK=1]: registers was 40, is 48"
    ]
    assert "no longer compiled" in differences([], kept)[0]
    assert "not in the table" in differences([compiled(), compiled(name="c: d")], kept)[0]
    assert "the table is of triton 1.0" in differences([], kept | {"triton": "1.0"})[0]


def test_any_spill_is_a_fault():
    assert compiling.faults(compiled()) == []
    for name in ("STL", "LDL", "stack_bytes"):
        assert len(compiling.faults(compiled(**{name: 1}))) == 1


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        ({"STL": 3, "LDL": 3}, "spills: 3 stores to local memory"),
        ({"promises": "IGMMA", "IMMA": 8}, "no IGMMA, which its configuration promises"),
        ({"shared_bytes": 232449}, "232449 bytes of shared memory, the card has 232448"),
    ],
)
def test_gate_ends_with_an_error_for_a_fault_even_while_the_table_is_renewed(
    fault, said, monkeypatch, tmp_path
):
    bad = compiled(**fault)
    monkeypatch.setattr(gpu_compiled, "compile_all", lambda: [bad])
    monkeypatch.setattr(gpu_compiled, "TABLE", tmp_path / "table.json")
    for options in (["--write"], []):
        done = CliRunner().invoke(gpu_compiled.main, options)
        assert done.exit_code == 1
        assert said in done.output
        assert "1 complaints" in done.output


def test_gate_passes_what_is_in_the_table_and_fails_what_changed(monkeypatch, tmp_path):
    monkeypatch.setattr(gpu_compiled, "TABLE", tmp_path / "table.json")
    monkeypatch.setattr(gpu_compiled, "compile_all", lambda: [compiled()])
    assert CliRunner().invoke(gpu_compiled.main, ["--write"]).exit_code == 0
    assert CliRunner().invoke(gpu_compiled.main).exit_code == 0
    monkeypatch.setattr(gpu_compiled, "compile_all", lambda: [compiled(instructions=200)])
    done = CliRunner().invoke(gpu_compiled.main)
    assert done.exit_code == 1
    assert "instructions was 100, is 200" in done.output


def test_fp8_products_are_jobs_of_cards_that_have_them():
    assert stack(90, torch.bfloat16, "e4m3 x e4m3").held == "e4m3 x e4m3"
    assert isinstance(stack(80, torch.bfloat16, "plain"), moe.ExpertWeights)
    for arch, there in ((80, False), (90, True)):
        assert any("e4m3 x e4m3" in job.name for job in jobs(arch)) is there
