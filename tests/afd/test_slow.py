"""A member that is slow is told of: in a line, in the table at the end, in JSON and as a gauge."""

import json
import signal
import urllib.request

import pytest

from step3_hetero import SamplingParams, load
from step3_hetero.runtime.paces import WINDOW_CALLS

pytest.importorskip("torch")
pytestmark = [
    pytest.mark.xdist_group("processes"),
    pytest.mark.processes,
    pytest.mark.usefixtures("no_leaks"),
]

TOKENS = 4 * WINDOW_CALLS
"""Two layers of FFN are called for each token: windows enough for several looks at who is slow."""

SET = {"transport__kind": "tcp", "roles__f__instances": 2, "roles__f__ep": 2}


@pytest.fixture
def front(command, write_config):
    """Start a set of two whose second member is slow by so much; return the front's config."""

    def start(slow):
        hosts = []
        for number, factor in enumerate((1, slow)):
            card = {"card": "h800", "memory": 0.01, "slow": factor}
            config = write_config(f"f{number}.yaml", **SET, roles__f__emulate=card)
            listen = ("--number", number, "--listen", "127.0.0.1:0")
            one = command("role", config, "--name", "f", *listen)
            hosts.append(one.says("listens at").split()[-1])
            one.says("is ready")
        return write_config("front.yaml", **SET, roles__f__hosts=hosts)

    return start


def ffn(members):
    return {m["member"]: m for m in members if (m["role"], m["stage"]) == ("f", "ffn")}


def test_slow_member_of_two_stands_in_line_table_and_json(front, command):
    asked = ("--prompt-ids", "21,22,23", "--max-tokens", TOKENS, "--ignore-eos")
    run = command("generate", front(8), *asked, "--timings", "--json")
    assert run.ends() == 0
    (told,) = [line for line in run.lines if "slow: ffn takes" in line]
    assert told.startswith("f:1 | slow: ffn takes ") and "times that of its peers" in told
    rows = [line.split() for line in run.lines if line.split()[:2] == ["f:1", "ffn"]]
    (row,) = [row for row in rows if "round" not in row]  # a round trip waits for more than it
    assert row[-2:] == ["slow", "peers"]
    members = ffn(json.loads("\n".join(run.out))["timings"]["members"])
    assert set(members) == {"f:0", "f:1"}
    assert members["f:1"]["ratio"] > 3 > 1 > members["f:0"]["ratio"]
    assert members["f:1"]["p50_s"] <= members["f:1"]["p95_s"] and members["f:1"]["mean_s"] > 0
    assert members["f:0"]["calls"] == members["f:1"]["calls"] >= 2 * (TOKENS - 1)


def test_slowness_is_a_gauge_by_member(front):
    parser = pytest.importorskip("prometheus_client.parser")
    from step3_hetero.serve.metrics import serve_metrics

    with load(front(8)) as engine, serve_metrics(engine, 0) as port:
        engine.generate([21, 22, 23], SamplingParams(max_tokens=8, ignore_eos=True))
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as page:
            families = list(parser.text_string_to_metric_families(page.read().decode()))
    samples = {
        (s.labels["member"], s.labels.get("stat")): s.value
        for family in families
        for s in family.samples
        if s.name.startswith("step3_hetero_member_") and s.labels["stage"] == "ffn"
    }
    assert samples["f:1", None] > 3 > 1 > samples["f:0", None]
    assert {stat for _, stat in samples} == {None, "mean", "p50", "p95"}


def test_up_prints_the_pace_of_what_it_kept(command, write_config, tmp_path):
    attach = tmp_path / "roles.json"
    config = write_config()
    up = command("up", config, "--json", "--timings", "--attach", attach)
    up.says('"event": "up"')
    with load(config, attach=attach) as engine:
        engine.generate([21, 22, 23], SamplingParams(max_tokens=8, ignore_eos=True))
        told = {(m.member, m.stage): m.calls for m in engine.executor.paces.rows()}
    up.popen.send_signal(signal.SIGTERM)
    assert up.ends() == 0
    (said,) = [fact for fact in up.facts() if fact["event"] == "timings"]
    kept = {(m["member"], m["stage"]): m["calls"] for m in said["members"]}
    assert kept["f:0", "ffn"] == told["f:0", "ffn"] > 0
    assert {key: told[key] for key in kept} == kept
    assert {"attention", "head", "sample"} <= {stage for member, stage in kept if member == "a:0"}
