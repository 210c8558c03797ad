"""What a plan says of its own run, what its file leaves out, and vendors joined by host NICs."""

import json
from dataclasses import replace

import pytest
import yaml
from click.testing import CliRunner

from step3_hetero.cli.plan_command import command
from step3_hetero.model.config import FAMILIES
from step3_hetero.placement.asked import request_of
from step3_hetero.placement.catalogue import Catalogue
from step3_hetero.placement.pipeline import PredictedPipeline
from step3_hetero.placement.plan_json import run_json
from step3_hetero.placement.plan_pipeline import period_s, pipeline_of
from step3_hetero.placement.planner import plan
from step3_hetero.placement.pools import parse_pools
from step3_hetero.placement.simulate import Scenario, simulate
from step3_hetero.placement.workload import step3_workload

pytest.importorskip("scipy")

MIXED = ("--model", "step3", "--pool", "h800=32", "--pool", "h20=64")
CROSSING = ("--model", "step3", "--pool", "h800=32", "--pool", "ascend-910b=64")


@pytest.fixture(scope="module")
def mixed():
    pools = parse_pools(["h800=32", "h20=64"], Catalogue.read())
    request = request_of(step3_workload(FAMILIES["step3"]()), pools, 8192, 0.05)
    outcome = plan(request)
    return outcome, pipeline_of(outcome.plan, request.problem)


def planned(*arguments):
    done = CliRunner().invoke(command, [*arguments, "--json"], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return json.loads(done.stdout)


def whole_run_s(pipeline):
    still = replace(
        pipeline,
        attention=tuple(replace(g, seconds_per_context_token=0.0) for g in pipeline.attention),
    )
    return simulate(still, Scenario(tokens=20)).tpot_s["p50"]


def test_one_of_each_group_runs_as_the_whole_pipeline_does(mixed):
    _, pipeline = mixed
    assert pipeline.attention_instances > 8
    assert period_s(pipeline) == pytest.approx(whole_run_s(pipeline), rel=1e-9)


@pytest.mark.parametrize("sets", [1, 2, 3])
def test_few_instances_take_turns_with_their_sets(sets):
    """One instance of three micro-batches; an FFN three times as slow needs its sets."""
    pipeline = PredictedPipeline.from_json(
        {
            "micro_batches": 3, "context": 100,
            "layers": [{"count": 5, "kind": "moe", "ffn": "remote"}],
            "attention": [
                {"name": "a", "card": "h20", "instances": 1, "cards": 1, "batch": 8,
                 "seconds": {"moe": 1.0}}
            ],
            "ffn": [
                {"name": "f", "card": "h800", "instances": sets, "cards": 8,
                 "seconds": {"moe": 3.0}}
            ],
        }
    )  # fmt: skip
    assert period_s(pipeline) == pytest.approx(whole_run_s(pipeline), rel=1e-9)
    # One set: 3 x 3 s a layer. Three: each micro-batch has its own, 1 + 3 s a layer.
    assert period_s(pipeline) / 5 == pytest.approx({1: 9, 2: 6, 3: 4}[sets], rel=0.05)


def test_run_counts_that_the_ffn_waits_while_the_head_works(mixed):
    """The head keeps attention for a millisecond of each micro-batch, once a token.

    Three micro-batches, 61 layers: between the tokens the FFN waits for the head, in all other
    layers attention waits for the FFN, which is a little slower.
    """
    outcome, pipeline = mixed
    layer_s = pipeline.ffn[0].seconds["moe"]
    assert pipeline.attention[0].seconds["moe"] < layer_s
    head_s = pipeline.between_tokens_s + pipeline.attention[0].seconds["moe"]
    by_hand = 3 * (head_s + (pipeline.layer_count - 1) * layer_s)
    assert period_s(pipeline) == pytest.approx(by_hand, rel=0.005)
    assert outcome.plan.pass_s < period_s(pipeline) < outcome.request.tpot_s


def test_run_is_charged_for_what_it_serves(mixed):
    outcome, _ = mixed
    pools = outcome.request.problem.pools
    usual, slow = (run_json(outcome.plan, pools, outcome.plan.pass_s * n) for n in (1, 2))
    assert slow["tpot_ms"] == pytest.approx(2 * usual["tpot_ms"])
    assert slow["tokens_per_s"] == pytest.approx(usual["tokens_per_s"] / 2)
    assert slow["usd_per_mtok"] == pytest.approx(2 * usual["usd_per_mtok"])
    little = replace(outcome.plan, tokens_per_s=1000.0)
    still = run_json(little, pools, outcome.plan.pass_s * 2)
    assert still["tokens_per_s"] == 1000.0, "a demand that is met stays met"


def test_plan_and_simulator_tell_the_same_run(tmp_path):
    path = tmp_path / "plan.yaml"
    found = planned(*MIXED, "--out", str(path))
    assert found["racks"] and any("as the pipeline runs" in note for note in found["notes"])
    written = yaml.safe_load(path.read_text())
    assert "racks" not in written["predicted"], "a config need not name every server"
    pipeline = PredictedPipeline.from_json(written["predicted"]["pipeline"])
    ran = simulate(pipeline, Scenario(tokens=20))
    assert ran.tpot_s["mean"] * 1e3 == pytest.approx(found["run"]["tpot_ms"], rel=2e-3)
    # The file holds whole sequences, the plan 66.7 of them.
    assert ran.tokens_per_s == pytest.approx(found["run"]["tokens_per_s"], rel=0.01)


def crossing_usd(found):
    """Return what H800 attention with 910B FFN costs in the answer's alternatives."""
    label = [a for a in found["alternatives"] if a["label"].startswith("attention on")]
    return min(
        a["usd_per_mtok"] for a in label
        if a["usd_per_mtok"] is not None
        and "h800" in a["label"].partition(", FFN")[0]
        and "ascend-910b" in a["label"].partition(", FFN")[2]
    )  # fmt: skip


def test_faster_host_nics_make_crossing_cheaper_and_it_still_loses():
    one = [
        planned(*CROSSING, "--host-nic-gbit", str(gbit), "--host-nics-per-server", "1")
        for gbit in (25, 100, 200, 400)
    ]
    costs = [crossing_usd(found) for found in one]
    assert costs == sorted(costs, reverse=True) and costs[0] > 4 * costs[-1]
    for found, cost in zip(one, costs, strict=True):
        assert not found["split"] and cost > found["objective_usd_per_mtok"]
        assert any(note.startswith("do not split") for note in found["notes"])
    eight = planned(*CROSSING, "--host-nic-gbit", "50", "--host-nics-per-server", "8")
    assert crossing_usd(eight) == pytest.approx(costs[-1]), "eight of 50 are one of 400"
