"""Two roles on emulated cards over tcp, their tensors cut small: the tokens of one process."""

from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest

from step3_hetero import SamplingParams, load
from step3_hetero.afd import leaving, local
from step3_hetero.afd.elsewhere import Threads
from step3_hetero.afd.landing import Landed
from step3_hetero.afd.leaving import Leaving
from step3_hetero.runtime.request import Request

pytest.importorskip("torch")

ROOT = Path(__file__).resolve().parents[2]
DIGITS = ROOT / "examples" / "digits.yaml"
PICTURES = sorted((ROOT / "examples" / "digits").glob("*.png"))

pytestmark = pytest.mark.usefixtures("no_leaks")


def answers(**overrides):
    cards = {
        "roles__f__backend": "cpu",
        "roles__a__emulate": {"card": "h800", "copy_bytes_per_s": 1e8},
        "roles__f__emulate": {"card": "h20", "copy_bytes_per_s": 1e8},
        "runtime__batch_invariant": True,
    }
    with load(DIGITS, **{**cards, **overrides}) as engine:
        asked = [
            Request("which digit is this ?", SamplingParams(max_tokens=6, logprobs=1), [picture])
            for picture in PICTURES[:4]
        ]
        done = engine.generate_all(asked)
    return [(c.token_ids, [p.chosen for p in c.logprobs]) for c in done]


@pytest.mark.parametrize(
    ("kind", "wire", "ep"),
    [
        pytest.param("tcp", "auto", 1, id="plain"),
        pytest.param("tcp", "int8", 1, id="scaled"),
        pytest.param("tcp", "auto", 2, id="a set"),
        pytest.param("nixl", "auto", 1, id="nixl"),
    ],
)
def test_tokens_do_not_depend_on_how_tensors_are_cut(monkeypatch, kind, wire, ep):
    if kind == "nixl" and find_spec("nixl") is None:
        pytest.skip("nixl is missing: make test-nixl")
    dtypes = {"transport__a2f_dtype": wire, "transport__f2a_dtype": wire}
    apart = {**dtypes, "runtime__processes": "per-role", "transport__kind": kind}
    if ep > 1:
        apart |= {"roles__f__instances": ep, "roles__f__ep": ep}

    def in_threads(resolved, *_):
        def serve(member, tell, drain):
            local.serve_role(resolved.config, member.role, member.number, "", tell, drain)

        return Threads(serve)

    monkeypatch.setattr(local, "_own_launcher", in_threads)
    want = answers(**apart)
    cut, landed = [], []
    start, there = Leaving._start, Landed.there

    def started(self, x, kind, nbytes):
        if kind != np.int32:  # ids are renumbered on the host, for the member that they come to
            cut.append(nbytes)
        return start(self, x, kind, nbytes)

    def came(self):
        landed.append(self.array.shape)
        return there(self)

    monkeypatch.setattr(Leaving, "_start", started)
    monkeypatch.setattr(Landed, "there", came)
    monkeypatch.setattr(leaving, "PIECE_BYTES", 256)
    assert answers(**apart) == want
    assert len(cut) >= 14
    if kind == "nixl":  # it rings when all is there
        assert not landed
        return
    assert len(landed) >= len(cut)  # a call of a set is cut once, and lands with each member
