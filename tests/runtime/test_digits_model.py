"""The trained model in models/: what it can do, on which backends, and that it never cheated."""

from hashlib import sha256
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from step3_hetero.api import load
from step3_hetero.evals.digits import SINGLE, SUM, HeldOut, draw_digit, evaluate
from step3_hetero.model.quantise import quantise_checkpoint
from step3_hetero.runtime.request import Request, SamplingParams

ROOT = Path(__file__).resolve().parents[2]
TINY = ROOT / "models" / "tiny-step3-digits"
SUBSET = 60
PLACEMENTS = [("cpu", "cpu"), ("reference", "reference"), ("cpu", "reference")]


@pytest.fixture(scope="session")
def held():
    return HeldOut.read(TINY)


def open_model(
    attention="cpu", experts="cpu", *, model=TINY, ablate=None, kv_dtype="auto", weights="auto"
):
    roles = {
        "a": {
            "stages": ["embed", "vision", "attention", "head", "ffn[0,3]"],
            "backend": attention,
            "weights": weights,
        },
        "f": {"stages": ["ffn"], "backend": experts, "weights": weights},
    }
    runtime = {"dtype": "fp32", "kv_dtype": kv_dtype}
    config = {"version": 1, "model": str(model), "roles": roles, "runtime": runtime}
    return load(config, ablate=ablate)


@pytest.fixture(scope="session")
def scores(held):
    """Return the accuracy for single digits and for sums, on a subset that is always the same."""

    def scores(limit=SUBSET, **options):
        with open_model(**options) as engine:
            return [score.accuracy for score in evaluate(engine, held, limit=limit)]

    return scores


def test_held_out_digits_are_read_right(scores):
    singles, sums = scores(limit=None)
    assert singles >= 0.985
    assert sums >= 0.975


def test_answers_are_the_same_wherever_the_stages_run(held):
    pictures = [draw_digit(pixels) for pixels in held.images]
    short = SamplingParams(max_tokens=8)
    asked = [Request(SINGLE, short, [p]) for p in pictures[:SUBSET]]
    asked += [Request(SUM, short, [pictures[a], pictures[b]]) for a, b in held.pairs[:SUBSET]]
    found = []
    for attention, experts in PLACEMENTS:
        with open_model(attention, experts) as engine:
            found.append([(done.token_ids, done.text) for done in engine.generate_all(asked)])
    assert found[0] == found[1] == found[2]
    assert len(set(found[0])) > 20  # ten digits and their sums


@pytest.mark.parametrize("part", ["attention", "experts", "vision"])
def test_sums_need_each_part_of_the_model(part, scores):
    assert scores(ablate=part)[1] < 0.5


def test_single_digits_need_vision(scores):
    assert scores(ablate="vision")[0] < 0.5


def test_block_fp8_copy_still_answers(scores, tmp_path):
    copy = quantise_checkpoint(TINY, tmp_path / "fp8")
    for backend in ("cpu", "reference"):
        singles, sums = scores(attention=backend, experts=backend, model=copy)
        assert min(singles, sums) >= 0.95


@pytest.mark.parametrize("kv_dtype", ["bf16", "fp8", "int8"])
@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_digits_are_read_over_a_cache_of_fewer_bytes(kv_dtype, backend, scores):
    singles, sums = scores(attention=backend, experts=backend, kv_dtype=kv_dtype, limit=20)
    assert min(singles, sums) >= 0.95


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_digits_are_read_with_int8_weights_made_from_block_fp8(backend, scores, tmp_path):
    copy = quantise_checkpoint(TINY, tmp_path / "fp8")
    asked = {"attention": backend, "experts": backend, "weights": "int8", "limit": 20}
    for model in (TINY, copy):
        singles, sums = scores(model=model, **asked)
        assert min(singles, sums) >= 0.95


def test_folder_is_small_enough_to_be_kept_in_the_repository():
    assert sum(p.stat().st_size for p in TINY.rglob("*") if p.is_file()) <= 4_000_000


@pytest.fixture(scope="session")
def split():
    """Return each side's digests by their number in the data set, as split.txt lists them."""
    lines = [line.split() for line in (TINY / "split.txt").read_text().splitlines()]
    rows = [line for line in lines if line[0] != "#"]
    return {side: {int(n): d for n, s, d in rows if s == side} for side in ("train", "held-out")}


def test_held_out_digits_are_those_of_the_split_and_none_was_trained_on(held, split):
    digests = [sha256(pixels.tobytes()).hexdigest() for pixels in held.images]
    assert digests == list(split["held-out"].values())
    assert not set(digests) & set(split["train"].values())
    assert len(split["train"]) + len(digests) == 1797  # scikit-learn's digits


def test_split_goes_by_the_digest_alone(split):
    for side, digests in split.items():
        assert all((int(d, 16) % 10 < 2) == (side == "held-out") for d in digests.values())


def test_pairs_are_of_held_out_digits_and_cover_every_sum(held):
    assert held.pairs.shape == (1000, 2)
    assert 0 <= held.pairs.min() <= held.pairs.max() < len(held.images)
    sums = held.labels[held.pairs].sum(-1)
    assert set(sums.tolist()) == set(range(19))


def test_example_pictures_are_held_out_digits(held, split):
    place = {number: place for place, number in enumerate(split["held-out"])}
    files = sorted((ROOT / "examples" / "digits").glob("*.png"))
    assert len(files) >= 10
    for file in files:
        label, _, number = file.stem.split("_")
        at = place[int(number)]
        drawn = np.asarray(draw_digit(held.images[at]))
        assert int(label) == held.labels[at]
        np.testing.assert_array_equal(np.asarray(Image.open(file).convert("L")), drawn)
