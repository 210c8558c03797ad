"""Attention and FFN in processes of their own, predicted from profiles, against sums by hand."""

from pathlib import Path

import pytest

from step3_hetero.config import Config
from step3_hetero.errors import PlacementError
from step3_hetero.graph import build_graph
from step3_hetero.model.config import ModelConfig
from step3_hetero.placement.profile_apart import apart_pipeline, apart_tokens_per_s
from step3_hetero.placement.profile_file import Links, Profile
from step3_hetero.placement.profile_stages import stage_key
from step3_hetero.runtime.placing import place

DIGITS = Path(__file__).resolve().parents[2] / "examples" / "digits.yaml"
ATTENTION, DENSE, MOE, EMBED, HEAD, CHOOSE, ENGINE = 3e-3, 1e-3, 1.5e-3, 2e-4, 5e-4, 1e-4, 3e-4
LINK = Links(("f:0",), 1e6, 1e-4)
"""Slow enough to be seen: 408 bytes of A2F and 384 of F2A for each token and layer."""
OUT, BACK = 408e-6, 384e-6
BETWEEN = EMBED + HEAD + CHOOSE + ENGINE


@pytest.fixture(scope="module")
def placement():
    """Of four layers: 0 and 3 dense and with attention, 1 and 2 with experts and away."""
    config = Config.read(DIGITS)
    model = ModelConfig.read(config.model_path)
    graph = build_graph(model, dtype="float32", router_logits="fp32", batch_invariant=False)
    return place(config, model, graph)


@pytest.fixture(scope="module")
def profiles(placement):
    """One profile for both roles; every stage takes its seconds for each row."""
    seconds = {"embed": EMBED, "attention": ATTENTION, "head": HEAD}
    stages = {}
    for stage in placement.graph.stages:
        if stage.kind != "vision":
            of_ffn = MOE if stage.name in ("ffn[1]", "ffn[2]") else DENSE
            each = seconds.get(stage.kind, of_ffn)
            stages[stage_key(stage)] = [
                {"kind": stage.kind, "key": stage_key(stage), "rows": n, "seconds": n * each}
                for n in (1, 2, 4)
            ]
    held = Profile(
        "cpu", {"name": "cpu:0"}, "float32", 1e9, 1e9, 1e-6, (), (),
        stages=[entry for entries in stages.values() for entry in entries],
        choose=[{"rows": 1, "seconds": CHOOSE}],
        step_s=[{"rows": 1, "seconds": ENGINE}],
    )  # fmt: skip
    return {"a": held, "f": held}


def pipeline(placement, profiles, batch, microbatches, *, on_cores=False, links=LINK):
    return apart_pipeline(
        placement, profiles, links, batch, 64, microbatches, on_cores=on_cores
    )  # fmt: skip


def test_one_micro_batch_takes_the_sum_of_stages_wires_and_latencies(placement, profiles):
    step_s = BETWEEN + 4 * ATTENTION + 2 * DENSE + 2 * (MOE + OUT + BACK + 2 * LINK.message_s)
    speed = apart_tokens_per_s(pipeline(placement, profiles, 1, 1))
    assert speed == pytest.approx(1 / step_s)


def test_bytes_that_cores_carry_are_carried_at_both_ends(placement, profiles):
    step_s = BETWEEN + 4 * ATTENTION + 2 * DENSE + 2 * (MOE + 2 * (OUT + BACK) + 2e-4)
    speed = apart_tokens_per_s(pipeline(placement, profiles, 1, 1, on_cores=True))
    assert speed == pytest.approx(1 / step_s)


def test_two_micro_batches_hide_the_shorter_side(placement, profiles):
    """While one is away, for 2.5 ms, the other has its 3 ms of attention: none is waited for."""
    busy_s = BETWEEN + 4 * ATTENTION + 2 * DENSE
    speed = apart_tokens_per_s(pipeline(placement, profiles, 2, 2))
    assert speed == pytest.approx(1 / busy_s)


def test_micro_batch_has_its_share_of_the_batch(placement, profiles):
    made = pipeline(placement, profiles, 5, 2)
    assert made.attention[0].batch == 3 and made.micro_batches == 2
    assert [(run.count, run.ffn) for run in made.layers] == [
        (1, "local"), (2, "remote"), (1, "local"),
    ]  # fmt: skip


def test_link_that_was_not_measured_is_refused(placement, profiles):
    with pytest.raises(PlacementError, match=r"links None B/s, 0.0001 s a message: not measured"):
        pipeline(placement, profiles, 1, 1, links=Links(None, None, 1e-4))


def test_placement_without_an_ffn_elsewhere_is_refused(profiles):
    config = Config.read(
        DIGITS, ["roles.f.stages=[head]", "roles.a.stages=[embed, vision, attention, ffn]"]
    )
    model = ModelConfig.read(config.model_path)
    graph = build_graph(model, dtype="float32", router_logits="fp32", batch_invariant=False)
    with pytest.raises(PlacementError, match="FFNs away from 'a', found none"):
        pipeline(place(config, model, graph), profiles, 1, 1)
