"""Roles as Ray actors over a local cluster of three nodes: placed apart, replaced, nothing left."""

import os
import signal
import time
from pathlib import Path

import pytest
from afd.questions import under_way

from step3_hetero import SamplingParams, load
from step3_hetero.errors import ConfigError, PlacementError, RequestError
from step3_hetero.runtime.request import Request

pytest.importorskip("torch")
pytestmark = [pytest.mark.xdist_group("ray"), pytest.mark.ray]

ROOT = Path(__file__).resolve().parents[2]
PICTURES = sorted((ROOT / "examples" / "digits").glob("*.png"))
ASK = "which digit is this ?"
STORE_BYTES = 80_000_000
"""The least that Ray accepts: nothing of ours goes through it."""


@pytest.fixture(scope="module")
def cluster():
    ray = pytest.importorskip("ray", reason="ray is not installed")
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    from ray.cluster_utils import Cluster

    node = {"num_cpus": 1, "object_store_memory": STORE_BYTES}
    cluster = Cluster(initialize_head=True, head_node_args={**node, "include_dashboard": False})
    for _ in range(2):
        cluster.add_node(**node)
    ray.init(address=cluster.address, log_to_driver=False)
    yield ray
    ray.shutdown()
    cluster.shutdown()


@pytest.fixture
def config(write_config):
    return write_config(transport__kind="tcp", roles__f__instances=2)


def test_digits_are_read_by_roles_on_three_nodes(cluster, config):
    params = SamplingParams(max_tokens=8)
    with load(config, launcher="ray") as engine:
        nodes = set(_group(cluster, engine)["bundles_to_node_id"].values())
        for picture in PICTURES[:5]:
            answer = engine.generate(ASK, params, images=[picture]).text
            assert answer.split()[-1] == picture.name[0]
        pids = engine.executor.processes()
    assert set(pids) == {"a:0", "f:0", "f:1"}
    assert os.getpid() not in pids.values()
    assert len(nodes) == 3
    assert _group(cluster, engine)["state"] == "REMOVED"
    until = time.monotonic() + 20
    while left := [pid for pid in pids.values() if Path(f"/proc/{pid}").exists()]:
        assert time.monotonic() < until, left
        time.sleep(0.2)


def _group(ray, engine):
    """Return what Ray says of the placement group of an engine's roles."""
    return ray.util.placement_group_table(engine.executor._launcher._otherwise._group)


@pytest.mark.parametrize("name", ["a:0", "f:0"])
def test_tokens_are_the_same_when_an_actor_dies(cluster, config, name):
    params = SamplingParams(max_tokens=40, ignore_eos=True)
    with load(config, launcher="ray") as engine:
        undisturbed = engine.generate([21, 22, 23], params).token_ids
        pid = engine.executor.processes()[name]
        with under_way(os.kill, pid, signal.SIGKILL) as tick:
            (done,) = engine.generate_all([Request([21, 22, 23], params)], on_progress=tick)
        assert done.token_ids == undisturbed
        assert engine.generate([21, 22, 23], params).token_ids == undisturbed
        assert engine.executor.processes().get(name) != pid


def test_a_cluster_without_room_is_refused_with_what_it_has(cluster, config, monkeypatch):
    monkeypatch.setattr("step3_hetero.afd.ray_roles.PLACE_S", 1.0)
    with pytest.raises(PlacementError, match=r"no room for .* within 1 s; it has .*'CPU': 3\.0"):
        load(config, launcher="ray", roles__f__instances=9)


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"transport__kind": "shm"}, "'shm' refused with --launcher ray; use tcp"),
        ({"transport__kind": "tcp", "roles__f__devices": [0]}, "which chooses the cards"),
    ],
)
def test_what_does_not_fit_ray_is_refused_with_its_key(write_config, keys, said):
    with pytest.raises(ConfigError, match=said):
        load(write_config(**keys), launcher="ray")


def test_one_process_has_nothing_to_launch(write_config):
    with pytest.raises(ConfigError, match="one leaves no role to launch"):
        load(write_config(runtime__processes="one"), launcher="ray")


def test_ray_that_is_not_installed_is_named_with_the_extra(write_config, monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(RequestError, match=r"pip install 'step3-hetero\[distributed\]'"):
        load(write_config(transport__kind="tcp"), launcher="ray")
