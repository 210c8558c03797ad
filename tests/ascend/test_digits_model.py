"""The tiny model reads digits with its FFN, its attention or all of it on the stand-in."""

from pathlib import Path

import pytest

from step3_hetero.api import load
from step3_hetero.evals.digits import SINGLE, SUM, HeldOut, draw_digit
from step3_hetero.model.quantise import quantise_checkpoint
from step3_hetero.runtime.request import Request, SamplingParams

ROOT = Path(__file__).resolve().parents[2]
TINY = ROOT / "models" / "tiny-step3-digits"
EXAMPLES = ROOT / "examples"
ASKED = 12


@pytest.fixture(scope="module")
def requests():
    held = HeldOut.read(TINY)
    pictures = [draw_digit(pixels) for pixels in held.images]
    short = SamplingParams(max_tokens=8)
    asked = [Request(SINGLE, short, [p]) for p in pictures[:ASKED]]
    return asked + [Request(SUM, short, [pictures[a], pictures[b]]) for a, b in held.pairs[:ASKED]]


def answers(requests, attention, experts, *, model=TINY, dtype="fp32", kv="auto", **options):
    roles = {
        "a": {"stages": ["embed", "vision", "attention", "head", "ffn[0,3]"],
              "backend": attention},
        "f": {"stages": ["ffn"], "backend": experts},
    }  # fmt: skip
    for role in roles.values():
        if role["backend"] == "ascend":
            role["options"] = options
    config = {"version": 1, "model": str(model), "roles": roles,
              "runtime": {"dtype": dtype, "kv_dtype": kv}}  # fmt: skip
    with load(config) as engine:
        return [done.text for done in engine.generate_all(requests)]


@pytest.fixture(scope="module")
def wanted(requests):
    return answers(requests, "reference", "reference")


@pytest.mark.parametrize(
    ("attention", "experts"), [("cpu", "ascend"), ("ascend", "cpu"), ("ascend", "ascend")]
)
def test_answers_are_the_references_wherever_ascend_stands(attention, experts, requests, wanted):
    assert answers(requests, attention, experts) == wanted
    assert len(set(wanted)) > 8


def test_answers_in_bfloat16_with_contexts_cut_in_parts(requests, wanted):
    found = answers(requests, "ascend", "ascend", dtype="bf16", kv_split=128)
    assert sum(a == b for a, b in zip(found, wanted, strict=True)) >= len(wanted) - 1


@pytest.mark.parametrize("kv", ["auto", "int8"])
def test_answers_from_graphs_are_those_without(kv, requests):
    plain, replayed = (
        answers(requests, "ascend", "ascend", dtype="bf16", kv=kv, graphs=graphs)
        for graphs in (False, True)
    )
    assert replayed == plain


def test_answers_over_an_int8_cache_are_the_references_over_one(requests):
    over_int8 = answers(requests, "reference", "reference", kv="int8")
    assert answers(requests, "ascend", "ascend", kv="int8") == over_int8
    found = answers(requests, "ascend", "ascend", dtype="bf16", kv="int8")
    assert sum(a == b for a, b in zip(found, over_int8, strict=True)) >= len(over_int8) - 1


def test_block_fp8_checkpoint_is_requantised_and_still_answers(requests, wanted, tmp_path):
    copy = quantise_checkpoint(TINY, tmp_path / "fp8")
    found = answers(requests, "cpu", "ascend", model=copy)
    assert sum(a == b for a, b in zip(found, wanted, strict=True)) >= len(wanted) - 2
