"""A written plan is a config: `check` holds it against the catalogue, `load` refuses it."""

import json

import pytest
import yaml
from click.testing import CliRunner

from step3_hetero import api
from step3_hetero.cli.check_command import command as check
from step3_hetero.cli.plan_command import command as plan
from step3_hetero.config import Config
from step3_hetero.errors import ConfigError, PlacementError
from step3_hetero.placement.plan_check import check_plan, only_planned
from step3_hetero.registry import get_backend

pytest.importorskip("scipy")

ASKED = (
    "--model", "step3", "--pool", "h800=32", "--pool", "ascend-910b=64", "--host-nic-gbit", "400",
    "--host-nics-per-server", "8",
)  # fmt: skip
CROSSING = ("--exclude", "attention:ascend-910b", "--exclude", "ffn:h800")


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """Return a written plan of H800 attention with 910B FFN."""
    path = tmp_path_factory.mktemp("plan") / "plan.yaml"
    done = CliRunner().invoke(plan, [*ASKED, *CROSSING, "--out", str(path)], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return path


@pytest.fixture
def changed(written, tmp_path):
    """Write the plan with one key changed, and read it as a plan."""

    def changed(key, value):
        values = yaml.safe_load(written.read_text())
        *above, last = key.split(".")
        place = values
        for name in above:
            place = place[name]
        place[last] = value
        path = tmp_path / "plan.yaml"
        path.write_text(yaml.safe_dump(values, sort_keys=False))
        return Config.read(path, planned=True)

    return changed


def test_plan_and_check_say_which_hop_of_the_edges_is_the_slowest(written):
    """Eight NICs of 400 Gb/s give each card 50 GB/s, PCIe 20: both cards' PCIe, H800's first."""
    told = CliRunner().invoke(plan, [*ASKED, *CROSSING], catch_exceptions=False).stdout
    row = next(line for line in told.splitlines() if "h800 - ascend-910b" in line)
    assert "host NICs" in row and "PCIe of h800" in row and " us" in row
    assert "alternatives" not in told, "there are none, and no empty table of them"
    found = CliRunner().invoke(check, [str(written)], catch_exceptions=False).stdout
    assert "note: the slowest hop of these edges, as planned, is PCIe of h800" in found
    crossing = check_plan(Config.read(written, planned=True))["crossing"]
    assert {c["slowest_hop"] for c in crossing} == {"PCIe of h800"}


@pytest.mark.parametrize("edges", [None, [], [1], [{"cards": 3}], "x", [{"cards": ["h800"]}]])
def test_a_plan_that_says_nothing_of_its_edges_is_checked_all_the_same(changed, edges):
    crossing = check_plan(changed("predicted.edges", edges))["crossing"]
    assert [c["slowest_hop"] for c in crossing] == [None, None]


def test_check_accepts_what_plan_writes(written):
    done = CliRunner().invoke(check, [str(written), "--json"], catch_exceptions=False)
    assert done.exit_code == 0
    found = json.loads(done.stdout)
    a, f = found["roles"]
    assert (a["device"], f["device"]) == ("h800", "ascend-910b")
    # 304.1 GB of FFN weights over the cards of a set, by hand from the model's config.
    assert f["weight_bytes"] == pytest.approx(304.1e9 / (f["tp"] * f["ep"]), rel=1e-3)
    # 61 layers of 512 bytes a token at 8K.
    sequences = yaml.safe_load(written.read_text())["runtime"]["max_batch"]
    assert a["kv_bytes"] == 61 * 512 * 8192 * sequences
    assert {e["kind"]: e["dtype"] for e in found["crossing"]} == {"a2f": "int8", "f2a": "bf16"}
    assert {e["members"] for e in found["crossing"]} == {f["tp"] * f["ep"]}
    assert {e["sent_bytes_per_token"] / e["bytes_per_token"] for e in found["crossing"]} == {
        f["tp"] * f["ep"]
    }
    assert a["tp"] > 1 and f["tp"] > 1 and f["ep"] > 1
    (said,) = found["not_run_yet"]  # no degree: attention is split over ranks, too
    assert said.startswith("roles.a.weights: 'fp8' is not available yet")


def test_colocated_plan_is_accepted_too(tmp_path):
    path = tmp_path / "plan.yaml"
    done = CliRunner().invoke(plan, [*ASKED, "--out", str(path)], catch_exceptions=False)
    assert done.exit_code == 0
    done = CliRunner().invoke(check, [str(path)], catch_exceptions=False)
    assert done.exit_code == 0 and "no edge crosses" in done.output


def test_load_names_the_first_key_that_it_cannot_run(written):
    with pytest.raises(
        ConfigError, match=r"plan\.yaml:\d+: roles\.a\.\w+: .* is not available yet"
    ):
        api.load(written)


def test_plan_keys_need_a_plan(written, tmp_path):
    values = yaml.safe_load(written.read_text())
    del values["predicted"]
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(values))
    with pytest.raises(ConfigError, match="is not available yet"):
        Config.read(path, planned=True)


REFUSED = {
    "more KV than memory": (
        "runtime.max_batch", 4096, PlacementError,
        r"roles\.a\.card: does not fit: 7\.0 GB of weights and .* on one h800, which offers 72\.0",
    ),
    "weights of a set on too few cards": (
        "roles.f.tp", 1, PlacementError, r"roles\.f\.card: does not fit: .* on one ascend-910b",
    ),
    "fp8 weights on a 910B": (
        "roles.f.weights", "fp8", ConfigError,
        r"roles\.f\.weights: 'fp8' on ascend-910b: no such arithmetic; allowed: bf16, int8",
    ),
    "fp8 on the wire to a 910B": (
        "transport.a2f_dtype", "fp8", ConfigError,
        r"transport\.a2f_dtype: 'fp8' with ascend-910b, which has no FP8; allowed: int8",
    ),
    "a group larger than a server": (
        "roles.f.tp", 16, ConfigError, r"roles\.f\.tp: 16: a server holds 8 ascend-910b",
    ),
    "experts that do not divide": (
        "roles.f.ep", 5, ConfigError, r"roles\.f\.ep: 5 does not divide 48 experts",
    ),
    "an unfinished set": (
        "roles.f.instances", 5, ConfigError, r"roles\.f\.instances: 5 is no multiple of ep",
    ),
    "an unknown card": ("roles.a.card", "h8000", ConfigError, r"roles\.a\.card: unknown .*h8000"),
    "no card": ("roles.a.card", None, ConfigError, r"roles\.a\.card: is needed in a plan"),
}  # fmt: skip


@pytest.mark.parametrize(("key", "value", "error", "said"), REFUSED.values(), ids=REFUSED)
def test_what_cannot_be_is_refused_by_its_key(key, value, error, said, changed):
    with pytest.raises(error, match=said):
        check_plan(changed(key, value))


def test_a_format_that_a_backend_lacks_keeps_a_plan_a_plan(changed, monkeypatch):
    cuda = type(get_backend("cuda"))
    claims = cuda.supports

    def supports(self, info, spec):
        return "no int8 here" if spec.weight_format == "int8" else claims(self, info, spec)

    monkeypatch.setattr(cuda, "supports", supports)

    def said(weights):
        stages = ["embed", "vision", "attention", "head", "ffn[0-3,60]"]
        return only_planned(changed("roles", {
            "a": {"stages": stages, "backend": "cuda", "card": "h800"},
            "f": {"stages": ["ffn"], "backend": "cuda", "card": "h800", "weights": weights},
        }))  # fmt: skip

    (why,) = said("int8")
    assert "roles.f: cuda on" in why and "int8" in why
    assert said("auto") == []


def test_a_set_shared_by_two_kinds_of_attention_is_not_written_twice(tmp_path):
    path = tmp_path / "plan.yaml"
    asked = ("--model", "step3", "--pool", "h800=5", "--pool", "ascend-910b=32", "--context",
             "32768", "--host-nic-gbit", "400", "--host-nics-per-server", "8")  # fmt: skip
    done = CliRunner().invoke(plan, [*asked, "--out", str(path)])
    assert isinstance(done.exception, PlacementError) and not path.exists()
    assert "share 1 FFN set" in str(done.exception) and "--exclude attention:" in str(
        done.exception
    )


@pytest.fixture(scope="module")
def of_the_docs(tmp_path_factory):
    """Return the plan of README.md and docs/planner.md, as written and as JSON."""
    path = tmp_path_factory.mktemp("docs") / "plan.yaml"
    asked = ["--model", "step3", "--pool", "h800=32", "--pool", "h20=64", "--out", str(path)]
    done = CliRunner().invoke(plan, [*asked, "--json"], catch_exceptions=False)
    return path, json.loads(done.stdout)


def test_plan_of_the_docs_fits_the_cards_that_it_fills(of_the_docs):
    path, document = of_the_docs
    assert document["attention"]["batch"] == pytest.approx(103)
    assert "is full at 103" in document["binding"]  # one sequence more does not fit
    assert yaml.safe_load(path.read_text())["runtime"]["max_batch"] == 3 * 103
    done = CliRunner().invoke(check, [str(path)], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    assert "A2F" in done.output and "F2A" in done.output  # as `check` of another config writes them


def test_curve_of_a_plan_does_not_lie_above_it(of_the_docs):
    _, document = of_the_docs
    at_asked = {
        line["label"]: next(p["usd_per_mtok"] for p in line["points"] if p["context"] == 8192)
        for line in document["cost_by_context"]
    }
    (chosen,) = (line["label"] for line in document["cost_by_context"] if line["chosen"])
    assert at_asked[chosen] <= document["objective_usd_per_mtok"] * (1 + 1e-9)
    assert min(at_asked, key=lambda label: at_asked[label]) == chosen
