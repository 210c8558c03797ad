"""What a plan says of its own run, and what its file leaves out."""

import json
from dataclasses import replace

import pytest
import yaml
from click.testing import CliRunner

from step3_hetero.cli.plan_command import command
from step3_hetero.model.config import FAMILIES
from step3_hetero.placement.asked import Asked, request_of
from step3_hetero.placement.catalogue import Catalogue
from step3_hetero.placement.pipeline import PredictedPipeline
from step3_hetero.placement.plan_json import run_json
from step3_hetero.placement.plan_pipeline import period_s, pipeline_of
from step3_hetero.placement.planner import best_split, plan
from step3_hetero.placement.pools import parse_pools
from step3_hetero.placement.simulate import Scenario, simulate
from step3_hetero.placement.workload import step3_workload

pytest.importorskip("scipy")

MIXED = ("--model", "step3", "--pool", "h800=32", "--pool", "h20=64")


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


def test_pace_counts_that_the_ffn_waits_while_the_head_works(mixed):
    """By hand: 61 layers of a slot, and what the head keeps the FFN waiting for.

    The head holds up each of three micro-batches once a token, less what attention has left of the
    first layer's slot.
    """
    outcome, pipeline = mixed
    clock, best = outcome.space.clocks, outcome.plan
    slot_s = clock.body_s[best.clock] / 61
    (attention,) = pipeline.attention
    assert best.micro_batches == 3 and set(attention.seconds) == {"dense", "moe"}
    left_s = slot_s - 3 * attention.seconds["dense"]
    by_hand = 61 * slot_s + 3 * pipeline.between_tokens_s - left_s
    assert best.pass_s == pytest.approx(by_hand, rel=1e-4)
    assert 3 * pipeline.between_tokens_s > 2e-3, "two milliseconds that no layer hides"


PLANNED = {
    "H800 and H20": (["h800=32", "h20=64"], 8192, 50.0),
    "H800 alone": (["h800=32"], 8192, 50.0),
    "a tight target": (["h800=32", "h20=64"], 4096, 30.0),
    "a long context": (["h800=32", "h20=64"], 32768, 50.0),
    "A800 and H20": (["a800=32", "h20=64"], 8192, 100.0),
    "a very long context": (["h800=16", "h20=400"], 131072, 50.0),
    "910B alone": (["ascend-910b=200"], 8192, 100.0),
}


@pytest.mark.parametrize(("pools", "context", "tpot_ms"), PLANNED.values(), ids=PLANNED)
def test_prediction_and_pipeline_agree_within_a_hundredth(pools, context, tpot_ms):
    asked = Asked.of(model="step3", pools=pools, context=context, tpot_ms=tpot_ms)
    best = best_split(asked.request).plan
    pipeline = pipeline_of(best, asked.request.problem, asked.about.layers)
    assert whole_run_s(pipeline) == pytest.approx(best.pass_s, rel=0.01)


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
    assert found["racks"] and found["cost_by_context"] and found["pareto"]
    assert not any("as the pipeline runs" in note for note in found["notes"])
    written = yaml.safe_load(path.read_text())
    long = {"racks", "cost_by_context", "pareto"} & set(written["predicted"])
    assert not long, "a config need not name every server, nor draw curves"
    pipeline = PredictedPipeline.from_json(written["predicted"]["pipeline"])
    ran = simulate(pipeline, Scenario(tokens=20))
    assert ran.tpot_s["mean"] * 1e3 == pytest.approx(found["run"]["tpot_ms"], rel=2e-3)
    # The file holds whole sequences, the plan 66.7 of them.
    assert ran.tokens_per_s == pytest.approx(found["run"]["tokens_per_s"], rel=0.01)
