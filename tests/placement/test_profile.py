"""Profiles: measured through the device contract, read strictly, taken by the planner."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import yaml

from step3_hetero.config import Config
from step3_hetero.errors import ConfigError, PlacementError
from step3_hetero.graph import build_graph
from step3_hetero.model.config import ModelConfig
from step3_hetero.placement.catalogue import Catalogue
from step3_hetero.placement.pools import parse_pools
from step3_hetero.placement.profile_file import Links, Profile
from step3_hetero.placement.profile_measure import (
    Bench,
    Clock,
    decode_meta,
    measure,
    measure_choosing,
)
from step3_hetero.placement.profile_predict import at, measure_engine, step_seconds, tokens_per_s
from step3_hetero.placement.profile_stages import ALIKE, Seat, measure_stages, stage_key
from step3_hetero.registry import get_backend
from step3_hetero.runtime.placing import place

BACKENDS = ("cpu", "reference")
DIGITS = Path(__file__).resolve().parents[2] / "examples" / "digits.yaml"


class Counting(Clock):
    """Runs an action once and says how many were run before: no time is asserted anywhere."""

    def __init__(self):
        self.calls = 0

    def seconds(self, action):
        action()
        self.calls += 1
        return self.calls * 1e-3


@pytest.fixture(scope="module")
def profile():
    device = get_backend("reference").open(0)
    return measure(Bench(device, "float32", Counting()), "reference", "h800")


def test_profile_holds_products_attention_and_bandwidth(profile):
    assert [e["rows"] for e in profile.linear] == [1, 4, 16, 64, 1]
    assert [e["context"] for e in profile.attention] == [128, 512, 2048]
    one = profile.linear[0]
    assert profile.bandwidth_bytes_per_s == pytest.approx(
        one["inner"] * one["columns"] * 4 / one["seconds"]
    )
    most = profile.linear[3]
    assert profile.flops_per_s == pytest.approx(2 * 64 * 2048**2 / most["seconds"])
    assert profile.links == Links(None, None, None), "left to the run over two devices"


def test_file_gives_back_what_was_measured(profile, tmp_path):
    path = tmp_path / "device.yaml"
    profile.write(path)
    again = Profile.read(path)
    assert again.to_json() == profile.to_json()


BROKEN = {
    "flops_per_s": (-1.0, "expected a positive number, found -1.0"),
    "call_s": (True, "expected a positive number, found True"),
    "dtype": ("float8", "expected one of"),
    "version": (2, "expected 1, found 2"),
    "linear": ([{"rows": 1}], "linear.0: expected seconds above 0"),
    "links": ({"peer": None}, "links.peer: unknown; keys: peers, bytes_per_s, message_s"),
    "surprise": (1, "unknown; keys:"),
}


@pytest.mark.parametrize(("key", "value", "said"), [(k, *v) for k, v in BROKEN.items()], ids=BROKEN)
def test_broken_file_names_the_key_and_its_line(key, value, said, profile, tmp_path):
    path = tmp_path / "device.yaml"
    path.write_text(yaml.safe_dump(profile.to_json() | {key: value}), encoding="utf-8")
    with pytest.raises(ConfigError) as refused:
        Profile.read(path)
    assert said in str(refused.value) and "device.yaml:" in str(refused.value)


def test_planner_takes_the_measured_card_and_refuses_another(profile):
    pools = parse_pools(["h800=8", "h20=8"], Catalogue.read())
    measured, other = profile.applied(pools)
    assert measured.card.memory_bandwidth_bytes_per_s == profile.bandwidth_bytes_per_s
    assert measured.card.flops_per_s["bf16"] == profile.flops_per_s
    sheet = pools[0].card.flops_per_s
    assert measured.card.flops_per_s["fp8"] / sheet["fp8"] == pytest.approx(
        profile.flops_per_s / sheet["bf16"]
    )
    assert measured.efficiency.call_s == profile.call_s and measured.efficiency.calibrated
    assert measured.efficiency.message_s == pools[0].efficiency.message_s, "links are null"
    assert other == pools[1]
    with pytest.raises(PlacementError, match="measured the card 'h800', the pools are h20"):
        profile.applied(pools[1:])


def test_measured_links_stand_in_for_the_data_sheet(profile):
    linked = replace(profile, links=Links(("ascend:0",), 5e9, 2e-5))
    pool = linked.applied(parse_pools(["h800=8"], Catalogue.read()))[0]
    assert pool.card.nic_bytes_per_s == 5e9 and pool.efficiency.message_s == 2e-5


def test_batch_of_a_decode_step_has_one_new_token_a_sequence():
    meta = decode_meta(3, 130)
    assert meta.tokens == meta.seqs == 3 and meta.block_tables.shape == (3, 2)
    assert (meta.positions == 129).all() and (meta.context_lens == 130).all()
    assert meta.slots.tolist() == [(2 * n + 1) * 128 + 1 for n in range(3)]
    assert len(np.unique(meta.block_tables)) == 6


@pytest.fixture(scope="module")
def digits():
    config = Config.read(DIGITS)
    model = ModelConfig.read(config.model_path)
    graph = build_graph(model, dtype="float32", router_logits="fp32", batch_invariant=False)
    return model, place(config, model, graph)


@pytest.fixture(scope="module")
def profiles(digits, profile):
    """One profile for each backend; the stages are built and run once for each size."""
    placement = digits[1]
    found = {}
    for name in BACKENDS:
        bench = Bench(get_backend(name).open(0), "float32", Counting())
        seat, every = Seat(bench), placement.graph.stages
        stages = measure_stages(every, {s.name: seat for s in every}, 64, rows=(1, 2))[seat]
        crossing = [{"rows": n, "columns": 128, "seconds": 1e-5} for n in (1, 2)]
        found[name] = replace(
            profile, backend=name, stages=stages, crossing=crossing,
            step_s=[{"rows": n, "seconds": 5e-4} for n in (1, 2)],
            choose=measure_choosing(bench, 64, (1, 2)),
        )  # fmt: skip
    return found


def test_every_kind_of_stage_is_measured_once(digits, profiles):
    keys = {stage_key(s) for s in digits[1].graph.stages if s.kind != "vision"}
    for found in profiles.values():
        assert {e["key"] for e in found.stages} == keys
        assert {e["kind"] for e in found.stages} == {"embed", "attention", "ffn", "head"}


class Ordered(Counting):
    """Runs a round of actions once, for as many seconds as its place in the round says."""

    def in_turn(self, actions):
        for action in actions:
            action()
        return [float(place) for place in range(len(actions))]


def test_stages_of_two_backends_take_turns_in_the_order_of_the_model(digits):
    placement = digits[1]
    seats = {n: Seat(Bench(get_backend(n).open(0), "float32", Ordered())) for n in BACKENDS}
    seat_of = {
        s.name: seats[placement.roles[placement.role_of[s.name]].backend.name]
        for s in placement.graph.stages
    }
    found = measure_stages(placement.graph.stages, seat_of, 32, rows=(1,))
    order = [s.name for s in placement.graph.stages if s.kind != "vision"]
    for backend, seat in seats.items():
        for entry in found[seat]:
            mine = [
                s.name for s in placement.graph.stages
                if seat_of[s.name] is seat and stage_key(s) == entry["key"]
            ][:ALIKE]  # fmt: skip
            places = [order.index(name) for name in mine]
            assert entry["seconds"] == sum(places) / len(places), (backend, mine)
    assert {e["kind"] for e in found[seats["reference"]]} == {"ffn"}


def test_seconds_in_turn_are_means_of_the_rounds_in_the_middle(monkeypatch):
    totals = iter([9.0, 50.0, 50.0, *[1.0] * 8, 3.0, 3.0])  # the first does not count
    clock = Clock()
    monkeypatch.setattr(clock, "_run", lambda action, times: next(totals), raising=False)
    passed = iter([0.0, *[0.0] * 5, 9.0])  # eight rounds come first, whatever they take
    monkeypatch.setattr("time.perf_counter", lambda: next(passed))
    assert clock.in_turn([lambda: None]) == [pytest.approx((1.0 * 5 + 3.0) / 6)]


def test_step_is_the_sum_of_its_stages_copies_and_the_engine(digits, profiles):
    placement = digits[1]
    want = 5e-4 + at(profiles["cpu"].choose, 2, 1)
    for stage in placement.graph.stages:
        if stage.kind != "vision":
            backend = placement.roles[placement.role_of[stage.name]].backend.name
            entries = [e for e in profiles[backend].stages if e["key"] == stage_key(stage)]
            want += at(entries, 2, 40)
    want += sum(1e-5 * len(edge.tensors) for edge in placement.crossing())
    assert step_seconds(placement, profiles, 2, 40) == pytest.approx(want)
    rate = tokens_per_s(placement, profiles, batch=2, prompt=30, decoded=20)
    assert rate == pytest.approx(2 / step_seconds(placement, profiles, 2, 40))


def test_backend_that_was_not_measured_is_named(digits, profiles):
    with pytest.raises(PlacementError, match="no profile of backend 'reference'; given: cpu"):
        step_seconds(digits[1], {"cpu": profiles["cpu"]}, 1, 10)
    empty = {name: replace(p, stages=()) for name, p in profiles.items()}
    with pytest.raises(PlacementError, match="does not know stage embed"):
        step_seconds(digits[1], empty, 1, 10)


def test_seconds_between_measured_points_are_on_the_line_and_never_fall_beyond():
    entries = [
        {"rows": r, "context": c, "seconds": s}
        for r, c, s in ((1, 10, 1.0), (1, 20, 2.0), (3, 10, 3.0), (3, 20, 6.0))
    ]
    assert at(entries, 2, 15) == pytest.approx(3.0)
    assert at(entries, 1, 5) == 1.0 and at(entries, 1, 30) == pytest.approx(3.0)
    falling = [{"rows": 1, "seconds": 2.0}, {"rows": 2, "seconds": 1.0}]
    assert at(falling, 9, 1) == 1.0


def test_engine_is_timed_around_an_executor_that_does_nothing(digits):
    found = measure_engine(*digits, rows=(1, 2))
    assert [e["rows"] for e in found] == [1, 2] and all(e["seconds"] > 0 for e in found)
