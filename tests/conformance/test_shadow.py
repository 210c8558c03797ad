"""The shadow check: what it sees, when, and what it keeps."""

import json
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from conformance.bisect_defects import DEFECTS, planted, subject_of
from oracle.random_checkpoint import write_checkpoint

from step3_hetero import api
from step3_hetero.backend import BatchMeta
from step3_hetero.conformance.bisect_replay import (
    Replay,
    read_replay,
    spec_json,
    weight_digests,
    write_replay,
)
from step3_hetero.conformance.bisect_rerun import rerun
from step3_hetero.conformance.bisect_stage import compact
from step3_hetero.conformance.shadow import ShadowCheck
from step3_hetero.errors import BackendNotFound, ConfigError, ConformanceError
from step3_hetero.runtime.request import SamplingParams

LAYERS = 61
NARROW = {
    "num_hidden_layers": LAYERS,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_attention_heads": 2,
    "head_dim": 16,
    "share_q_dim": 16,
    "moe_layers_enum": ",".join(map(str, range(4, 60))),
    "moe_num_experts": 4,
    "moe_top_k": 2,
    "moe_intermediate_size": 16,
    "share_expert_dim": 16,
    "vocab_size": 64,
    "max_seq_len": 8192,
    "max_position_embedding": 8192,
}
"""Step-3's layers, dense and MoE as there, with next to nothing in them."""


@pytest.fixture(scope="module")
def deep(tmp_path_factory):
    return write_checkpoint(tmp_path_factory.mktemp("deep") / "model", **NARROW)


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    return write_checkpoint(tmp_path_factory.mktemp("small") / "model")


@pytest.fixture
def engine_of(tmp_path):
    opened = []

    def make(model, sample=1.0, *, shadow="reference", backend="cpu", dtype="fp32"):
        roles = {"a": {"stages": ["embed", "attention", "ffn", "head"], "backend": backend}}
        runtime = {"dtype": dtype, "shadow_backend": shadow, "shadow_sample": sample}
        config = {"version": 1, "model": str(model), "roles": roles, "runtime": runtime}
        opened.append(api.load(config, shadow_folder=tmp_path / "kept"))
        return opened[-1]

    yield make
    for engine in opened:
        engine.close()


class Doubled:
    """A stage whose output row is a little too long: a scale that is off by a thousandth."""

    def __init__(self, inner):
        self.inner, self.spec, self.plan = inner, inner.spec, inner.plan

    def run(self, inputs, out=None):
        return {"y": self.inner.run(inputs)["y"] * 1.001}


def spoil(engine, stage):
    """Plant a defect in one stage of a running engine."""
    stages = engine.executor._program._stages
    stages[stage] = replace(stages[stage], stage=Doubled(stages[stage].stage))


def steps_until_report(engine, most):
    """Decode until an excess is reported; return the steps after the prompt's."""
    engine.submit([3, 5, 7], SamplingParams(max_tokens=most + 1, ignore_eos=True))
    for step in range(most + 1):
        engine.step()
        if api.shadow_report(engine)["excesses"]:
            return step
    return None


@pytest.mark.parametrize(("sample", "most"), [(1.0, 64), (0.01, 100)])
def test_defect_in_one_ffn_of_61_layers_is_reported(engine_of, deep, sample, most):
    engine = engine_of(deep, sample)
    spoil(engine, "ffn[37]")
    assert steps_until_report(engine, most) is not None
    report = api.shadow_report(engine)
    bad = {name for name, tally in report["stages"].items() if tally["excesses"]}
    assert bad == {"ffn[37]"}
    assert "y: " in report["stages"]["ffn[37]"]["said"][0]


def test_nothing_is_reported_without_a_defect(engine_of, deep):
    engine = engine_of(deep, 0.05)
    assert steps_until_report(engine, 64) is None
    report = api.shadow_report(engine)
    assert report["checks"] >= 3 * 124
    assert report["worst"] <= 1
    assert engine.executor.observers[0].sentence().endswith(", none beyond rounding")


def test_every_stage_is_checked_once_in_n_runs_and_no_step_bears_them_all(engine_of, small):
    engine = engine_of(small, 0.2)
    checks, each = engine.executor.observers[0], []
    engine.submit([3, 5, 7], SamplingParams(max_tokens=40, ignore_eos=True))
    for _ in range(15):
        before = api.shadow_report(engine)["checks"]
        engine.step()
        each.append(api.shadow_report(engine)["checks"] - before)
    assert {t.checks for t in checks.tallies.values()} == {3}
    assert each == [2] * 15  # ten stages over five steps


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_batches_and_long_contexts_are_checked_against_their_own_keys(engine_of, small, dtype):
    engine = engine_of(small, 0.2, dtype=dtype)
    prompts = [np.random.default_rng(s).integers(3, 128, n).tolist()
               for s, n in enumerate([200, 3, 130, 40])]  # fmt: skip
    params = SamplingParams(max_tokens=20, ignore_eos=True)
    for prompt in prompts:
        engine.submit(prompt, params)
    while engine.lanes.lanes[0].scheduler.running or engine.lanes.waiting:
        engine.step()
    report = api.shadow_report(engine)
    assert (report["excesses"], report["worst"] <= 1) == (0, True)
    assert report["checks"] >= 40


def test_blocks_of_a_batch_are_numbered_anew_with_its_slots():
    """Two sequences in blocks 9, 4 and 7 of the live cache; the last row is padding."""
    meta = BatchMeta(
        *(np.array(x, np.int32) for x in ([130, 5, 0], [4 * 128 + 2, 7 * 128 + 5, -1], [0, 1, 2])),
        np.array([131, 6], np.int32),
        np.array([[9, 4], [7, 0]], np.int32),
    )
    blocks, moved = compact(meta)
    assert blocks == [4, 7, 9]
    assert moved.slots.tolist() == [2, 128 + 5, -1]
    assert moved.block_tables.tolist() == [[2, 0], [1, 0]]
    assert moved.context_lens is meta.context_lens


def test_another_backend_can_be_the_shadow(engine_of, small):
    engine = engine_of(small, shadow="cpu", backend="reference")
    assert steps_until_report(engine, 3) is None
    assert api.shadow_report(engine)["backend"].startswith("cpu")
    spoil(engine, "ffn[1]")
    assert steps_until_report(engine, 3) == 0


def test_weights_kept_stay_within_their_budget(small, tmp_path):
    subject = subject_of(small)
    formats = {name: f for name, (_, _, f) in subject.devices.items()}
    graph = subject.placement.graph
    check = ShadowCheck(graph, subject.source, formats, 1.0, tmp_path, held_bytes=60_000)
    for node in graph.stages:
        check._weights(node)
    assert 0 < check.held_bytes <= 60_000
    assert graph.stages[-1].name in check._held
    assert graph.stages[0].name not in check._held


@pytest.fixture
def kept(engine_of, small):
    """Return the file that an excess in ffn[1] leaves, and the engine."""
    engine = engine_of(small)
    spoil(engine, "ffn[1]")
    assert steps_until_report(engine, 4) == 0
    (file,) = api.shadow_report(engine)["files"]
    return file


def test_excess_is_kept_once_for_each_stage_and_says_where(engine_of, small, tmp_path):
    engine = engine_of(small)
    spoil(engine, "ffn[1]")
    steps_until_report(engine, 4)
    for _ in range(3):
        engine.step()
    report = api.shadow_report(engine)
    assert report["stages"]["ffn[1]"]["excesses"] == 4
    assert [p.name for p in (tmp_path / "kept").iterdir()] == ["ffn-1-run-0.safetensors"]
    said = engine.executor.observers[0].sentence()
    assert "4 beyond rounding, in ffn[1]" in said
    assert str(tmp_path / "kept") in said
    json.dumps(report, allow_nan=False)


def test_a_folder_that_cannot_be_written_does_not_stop_requests(engine_of, small, tmp_path):
    (tmp_path / "kept").write_text("a file in the way")
    engine = engine_of(small)
    spoil(engine, "ffn[1]")
    done = engine.generate([3, 4], SamplingParams(max_tokens=2, ignore_eos=True))
    assert len(done.token_ids) == 2
    report = api.shadow_report(engine)
    assert (report["excesses"], report["files"], len(report["unwritten"])) == (2, [], 1)


def test_kept_run_is_run_again_on_any_backend(kept, small):
    replay = read_replay(kept)
    assert (replay.stage, replay.run.inputs["u"].shape) == ("ffn[1]", (3, 48))
    for backend in ("cpu", "reference"):
        report = rerun(subject_of(small, backend=backend), replay)
        assert report.sentence() == (
            f"ffn[1]: beyond its bound as recorded, within it on {backend}"
        )
    device = planted("ffn", 1, DEFECTS[5].plant, "cpu")
    report = rerun(subject_of(small, device, role="f"), replay)
    assert report.op is None  # the first ffn that this device builds is its ffn[0]
    device = planted("ffn", 0, DEFECTS[5].plant, "cpu")
    report = rerun(subject_of(small, device, role="f"), replay)
    assert report.op == "swiglu"


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_kept_attention_run_brings_its_blocks(engine_of, small, tmp_path, dtype):
    engine = engine_of(small, dtype=dtype)
    check = engine.executor.observers[0]
    seen = []
    check._judge = lambda node, run, got: (
        seen.append((node, run, got)) or type("V", (), {"flips": (), "worst": 0.0, "excesses": ()})
    )
    engine.generate(list(range(3, 120)) * 2, SamplingParams(max_tokens=2, ignore_eos=True))
    node, run, got = next(s for s in seen if s[0].name == "attention[2]" and s[1].meta.tokens == 1)
    assert run.history[0].shape == (2, 128, 1, 16)
    subject = subject_of(small, dtype=dtype)
    digests = weight_digests(node, subject.source)
    path = tmp_path / "run.safetensors"
    write_replay(Replay(node.name, spec_json(node.spec), run, got, digests), path)
    assert rerun(subject, read_replay(path)).sentence() == (
        "attention[2]: within its bound as recorded, within it on cpu"
    )


def test_replay_of_another_checkpoint_or_dtype_is_refused(kept, small, tmp_path):
    replay = read_replay(kept)
    other = write_checkpoint(tmp_path / "other", seed=1)
    with pytest.raises(ConformanceError, match=r"weights experts, .* are not those recorded"):
        rerun(subject_of(other), replay)
    with pytest.raises(ConformanceError, match="not the stage recorded: dtype float32 -> bfloat16"):
        rerun(subject_of(small, dtype="bf16"), replay)


def test_damaged_replay_file_is_refused(kept, tmp_path):
    whole = Path(kept).read_bytes()
    for name, data in {"cut": whole[:-9], "empty": b"", "text": b"no such thing" * 9}.items():
        path = tmp_path / name
        path.write_bytes(data)
        with pytest.raises(ConfigError, match=re.escape(str(path))):
            read_replay(path)
    with pytest.raises(ConfigError, match="cannot be read"):
        read_replay(tmp_path / "missing")


@pytest.mark.parametrize(
    ("runtime", "error", "want"),
    [
        ("shadow_sample: 0.5", ConfigError,
         "run.yaml:6: runtime.shadow_sample: 0.5 without runtime.shadow_backend; name a backend, "
         "such as reference"),
        ("shadow_backend: reference", ConfigError,
         "run.yaml:6: runtime.shadow_backend: 'reference' without runtime.shadow_sample; give the "
         "part of runs to check, such as 0.01"),
        ("shadow_backend: gpu\n  shadow_sample: 1.0", BackendNotFound,
         "run.yaml:6: runtime.shadow_backend: no backend 'gpu'; installed: "),
    ],
)  # fmt: skip
def test_half_a_shadow_check_and_an_unknown_backend_are_refused(
    small, tmp_path, runtime, error, want
):
    path = tmp_path / "run.yaml"
    path.write_text(
        f"version: 1\nmodel: {small}\nroles:\n  a: {{stages: [embed, attention, ffn, head], "
        f"backend: cpu}}\nruntime:\n  {runtime}\n"
    )
    with pytest.raises(error, match=re.escape(want)):
        api.load(path)


def test_without_a_shadow_check_there_is_no_observer(small):
    roles = {"a": {"stages": ["embed", "attention", "ffn", "head"], "backend": "reference"}}
    with api.load({"version": 1, "model": str(small), "roles": roles}) as engine:
        assert list(engine.executor.observers) == []
        assert api.shadow_report(engine) is None


def test_files_of_a_config_file_lie_beside_it(small, tmp_path):
    (tmp_path / "run.yaml").write_text(
        f"version: 1\nmodel: {small}\nroles:\n  a: {{stages: [embed, attention, ffn, head], "
        "backend: cpu}\nruntime: {shadow_backend: reference, shadow_sample: 1.0, dtype: fp32}\n"
    )
    with api.load(tmp_path / "run.yaml") as engine:
        assert engine.executor.observers[0].folder == tmp_path / "shadow-excess"
    assert not (tmp_path / "shadow-excess").exists()  # made when there is something to keep
