"""The whole tiny model on the cuda backend's code path: attention and FFN, vision and sampling."""

from pathlib import Path

from step3_hetero.api import load
from step3_hetero.evals.digits import SINGLE, SUM, HeldOut, draw_digit
from step3_hetero.runtime.request import Request, SamplingParams

TINY = Path(__file__).resolve().parents[2] / "models" / "tiny-step3-digits"
INTERPRETED = {"backend": "cuda", "options": {"interpret": True}}
CPU = {"backend": "cpu"}


def open_model(attention, experts, dtype="fp32"):
    stages = ["embed", "vision", "attention", "head", "ffn[0,3]"]
    roles = {"a": {"stages": stages, **attention}, "f": {"stages": ["ffn"], **experts}}
    config = {"version": 1, "model": str(TINY), "roles": roles, "runtime": {"dtype": dtype}}
    return load(config)


def answers(attention, experts, dtype="fp32"):
    """Return what a model answers to two digits and a sum, and what is right."""
    held = HeldOut.read(TINY)
    left, right = (int(i) for i in held.pairs[0])
    pictures = [draw_digit(held.images[i]) for i in (0, left, right)]
    short = SamplingParams(max_tokens=8)
    asked = [Request(SINGLE, short, [p]) for p in pictures[:2]]
    asked.append(Request(SUM, short, pictures[1:]))
    with open_model(attention, experts, dtype) as engine:
        said = [int(done.text.split()[-1]) for done in engine.generate_all(asked)]
    one, first, second = (int(held.labels[i]) for i in (0, left, right))
    return said, [one, first, first + second]


def test_interpreted_cuda_answers_digits_and_a_sum():
    said, right = answers(INTERPRETED, INTERPRETED)
    assert said == right


def test_interpreted_cuda_experts_serve_another_backend_in_bfloat16():
    said, right = answers(CPU, INTERPRETED, "bf16")
    assert said == right


def test_interpreted_cuda_answers_with_weights_held_as_integers():
    said, right = answers(CPU, {**INTERPRETED, "weights": "int8"}, "bf16")
    assert said == right
