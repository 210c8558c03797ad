"""What Ray, which is played here, is asked for: a bundle and a card for each rank."""

import sys
from types import ModuleType, SimpleNamespace

import pytest
import yaml

from step3_hetero.afd.ray_roles import RayRoles
from step3_hetero.config import Config
from step3_hetero.runtime.resolving import resolve


class PlayedRay:
    """Takes down what it is asked for."""

    def __init__(self):
        self.bundles, self.strategy, self.actors = None, None, []
        self.room = SimpleNamespace(wait=lambda seconds: True)

    def module(self):
        ray = ModuleType("ray")
        ray.is_initialized, ray.remote = (
            lambda: True,
            lambda cls: SimpleNamespace(options=self.take),
        )
        ray.wait = lambda refs, num_returns: (refs[:1], refs[1:])  # it has ended at once
        ray.get = ray.kill = lambda ref: []
        return ray

    def util(self):
        util = ModuleType("ray.util")
        util.placement_group, util.remove_placement_group = self.reserve, lambda group: None
        return util

    def strategies(self):
        found = ModuleType("ray.util.scheduling_strategies")
        found.PlacementGroupSchedulingStrategy = lambda group, placement_group_bundle_index: (
            group,
            placement_group_bundle_index,
        )
        return found

    def reserve(self, bundles, strategy):
        self.bundles, self.strategy = bundles, strategy
        return self.room

    def take(self, **options):
        method = SimpleNamespace(remote=lambda *arguments: arguments)
        self.actors.append(options)
        return SimpleNamespace(
            remote=lambda: SimpleNamespace(serve=method, facts=method, ask=method)
        )


@pytest.fixture
def ray(monkeypatch):
    played = PlayedRay()
    monkeypatch.setitem(sys.modules, "ray", played.module())
    monkeypatch.setitem(sys.modules, "ray.util", played.util())
    monkeypatch.setitem(sys.modules, "ray.util.scheduling_strategies", played.strategies())
    monkeypatch.setenv("STEP3_HETERO_KEY", "the key of a test")
    return played


@pytest.fixture
def launched(ray, write_config):
    """Launch every process of a config; return what each actor was asked with, by its name."""

    def launch(**keys):
        keys = {"transport__kind": "tcp", "runtime__batch_invariant": False, **keys}
        values = yaml.safe_load(write_config(**keys).read_text())
        roles = RayRoles(resolve(Config.from_dict(values, ".")), None)
        for member in roles._members:
            roles.launch(member).end()
        roles.close()
        return dict(zip([m.name for m in roles._members], ray.actors, strict=True))

    return launch


def test_every_rank_of_every_instance_asks_for_a_card_of_its_own(ray, launched):
    asked = launched(
        roles__a__backend="ascend", roles__f__backend="cuda", roles__f__instances=2, roles__f__tp=2
    )
    assert list(asked) == ["a:0", "f:0", "f:1", "f:2", "f:3"]
    assert ray.bundles == [{"CPU": 1.0, "NPU": 1.0}] + 4 * [{"CPU": 1.0, "GPU": 1.0}]
    assert ray.strategy == "SPREAD"
    for number, options in enumerate(asked.values()):
        assert options["scheduling_strategy"] == (ray.room, number), "in its own bundle"
        assert options["num_cpus"] == 1.0 and options["max_restarts"] == 0
    assert [o["num_gpus"] for o in asked.values()] == [0, 1.0, 1.0, 1.0, 1.0]
    assert [o["resources"] for o in asked.values()] == [{"NPU": 1.0}, {}, {}, {}, {}]


def test_spares_ask_for_a_card_too_and_backends_of_the_host_for_none(ray, launched):
    asked = launched(roles__a__backend="cpu", roles__f__backend="cuda", roles__f__spares=1)
    assert list(asked) == ["a:0", "f:0", "f:1"]
    assert ray.bundles == [{"CPU": 1.0}, {"CPU": 1.0, "GPU": 1.0}, {"CPU": 1.0, "GPU": 1.0}]
    assert [o["num_gpus"] for o in asked.values()] == [0, 1.0, 1.0]
