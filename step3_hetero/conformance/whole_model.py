"""The tiny digit model end to end on one device: distributions, greedy answers, where they part."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image

from step3_hetero.backend import Backend, Device
from step3_hetero.conformance.case import Inputs
from step3_hetero.conformance.exam import CaseResult, Finding, unclaimed
from step3_hetero.conformance.tolerance import FACTOR, ROUNDOFF
from step3_hetero.conformance.trial import reference
from step3_hetero.graph import build_graph
from step3_hetero.model.checkpoint import Checkpoint
from step3_hetero.model.config import ModelConfig
from step3_hetero.model.image import ImageConfig
from step3_hetero.model.tokenizer import Tokenizer
from step3_hetero.runtime.engine import Engine
from step3_hetero.runtime.loader import load_stages
from step3_hetero.runtime.local import LocalExecutor
from step3_hetero.runtime.prompting import Prompter
from step3_hetero.runtime.request import Completion, Request, SamplingParams
from step3_hetero.specs import Limits, OpSpec

MODEL = Path(__file__).with_name("model")
"""The tiny model, shipped beside this file."""

PROMPT_TOKENS = 512
QUESTIONS = ("which digit is this ?", "what is the sum ?")


@dataclass(frozen=True)
class Answers:
    """Each question's tokens and, for each token, the whole distribution.

    Shapes: distributions[question] (tokens, vocab), log-probabilities.
    """

    tokens: Sequence[tuple[int, ...]]
    distributions: Sequence[npt.NDArray[np.float64]]


@dataclass(frozen=True)
class ModelCase:
    """``questions`` held-out pictures, asked about alone and in pairs, answered greedily."""

    dtype: str
    questions: int
    full: bool = False

    @property
    def op(self) -> str:
        """Return what is tried."""
        return "model"

    @property
    def id(self) -> str:
        """Return the case in words."""
        return f"model[tiny-step3-digits,questions={self.questions},{self.dtype}]"

    def __str__(self) -> str:
        return self.id

    def specs(self) -> tuple[OpSpec, ...]:
        """Return every op of the model."""
        graph = build_graph(_checkpoint().config, dtype=self.dtype)
        specs = {s.spec for s in graph.stages}
        return tuple({str(op): op for spec in specs for op in spec.ops("auto")}.values())

    def inputs(self) -> Inputs:
        """Return nothing: the pictures are files."""
        return Inputs({})

    def examine(self, backend: Backend, device: Device) -> CaseResult:
        """Answer on the device and hold distributions and tokens against the reference."""
        if reason := unclaimed(backend, device, self):
            return CaseResult(self.id, self.op, self.dtype, "unclaimed", reason=reason)
        start = time.perf_counter()
        want, own = _judges(self.dtype, self.questions)
        got = answers(device, self.dtype, self.questions)
        worst, error, bound, findings = _compare(got, want, own, self.dtype)
        seconds = time.perf_counter() - start
        return CaseResult(
            self.id,
            self.op,
            self.dtype,
            "failed" if findings else "passed",
            tuple(findings),
            worst,
            error,
            bound,
            seconds=seconds,
        )


def answers(device: Device, dtype: str, questions: int) -> Answers:
    """Answer the questions with every stage on one device."""
    checkpoint = _checkpoint()
    model = checkpoint.config
    graph = build_graph(model, dtype=dtype)
    limits = Limits(PROMPT_TOKENS + 64, 64, 8)
    placed = {stage.name: ("m", device, "auto") for stage in graph.stages}
    stages, caches = load_stages(graph, placed, checkpoint, limits, 64)
    vision = model.vision
    assert vision is not None, "the tiny model sees"
    prompter = Prompter(model, Tokenizer.read(MODEL), ImageConfig.read(MODEL, vision.image_size))
    executor = LocalExecutor(graph, stages, caches, limits)
    engine = Engine(model, executor, prompter, max_batch=16, prefill_chunk=PROMPT_TOKENS)
    with engine:
        return _answers(engine.generate_all(_requests(questions, model.text.vocab_size)),
                        model.text.vocab_size)  # fmt: skip


@cache
def _judges(dtype: str, questions: int) -> tuple[Answers, Answers]:
    return (answers(reference(), "float64", questions),
            answers(reference("in-order"), dtype, questions))  # fmt: skip


@cache
def _checkpoint() -> Checkpoint:
    return Checkpoint.open(MODEL, ModelConfig.read(MODEL))


def _requests(questions: int, vocab: int) -> list[Request]:
    with np.load(MODEL / "eval" / "held_out.npz", allow_pickle=False) as held:
        grey = (held["images"][: 2 * questions].astype(float) * 255 / 16).round().astype(np.uint8)
    pictures = [Image.fromarray(g).resize((32, 32), Image.Resampling.BILINEAR) for g in grey]
    params = SamplingParams(max_tokens=8, logprobs=vocab)
    return [
        Request(QUESTIONS[n % 2], params, pictures[2 * n : 2 * n + 1 + n % 2])
        for n in range(questions)
    ]


def _answers(completions: Sequence[Completion], vocab: int) -> Answers:
    distributions = []
    for completion in completions:
        rows = np.zeros((len(completion.token_ids), vocab))
        for place, logprobs in enumerate(completion.logprobs or ()):
            for token, value in logprobs.top:
                rows[place, token] = value
        distributions.append(rows)
    return Answers([c.token_ids for c in completions], distributions)


def _compare(
    got: Answers, want: Answers, own: Answers, dtype: str
) -> tuple[float, float, float, list[Finding]]:
    """Return worst figure, its error and bound, and what is wrong."""
    findings = list(partings(got, want, own))
    allowed = _divergences(own, want)
    bound = FACTOR * float(allowed.max(initial=0.0)) + ROUNDOFF[dtype] ** 2
    error = float(_divergences(got, want).max(initial=0.0))
    if error > bound:
        said = f"distributions differ by up to {error:.3g} nats (KL), allowed {bound:.3g}"
        findings.append(Finding("rows", said))
    return error / bound, error, bound, findings


def _divergences(one: Answers, want: Answers) -> npt.NDArray[np.float64]:
    """Return KL(want || one) at every place up to and including the first other token."""
    found = []
    for q, tokens in enumerate(want.tokens):
        shared = _shared(tokens, one.tokens[q])
        for place in range(min(shared + 1, len(tokens), len(one.tokens[q]))):
            p, r = want.distributions[q][place], one.distributions[q][place]
            found.append(float(np.sum(np.exp(p) * (p - r), where=np.isfinite(p))))
    return np.array(found)


def partings(got: Answers, want: Answers, own: Answers) -> list[Finding]:
    """Say where a greedy answer leaves the reference's without a near tie.

    Two log-probabilities may each be off by twice as much as the reference's own rounding has
    shifted any of this answer's until there; a gap below both is a tie.
    """
    found = []
    for q, (ours, theirs) in enumerate(zip(got.tokens, want.tokens, strict=True)):
        place = _shared(theirs, ours)
        if place == len(theirs) == len(ours):
            continue
        last = min(place, len(theirs) - 1)
        top = np.sort(want.distributions[q][last])[::-1]
        margin = float(top[0] - top[1])
        allowed = 2 * np.sqrt(FACTOR) * _shift(own, want, q, last)
        if margin > allowed:
            said = (f"question {q}: first other token at place {place}, margin {margin:.3g}, "
                    f"a tie below {allowed:.3g}")  # fmt: skip
            found.append(Finding("equal", said))
    return found


def _shift(own: Answers, want: Answers, question: int, last: int) -> float:
    """Return by how much rounding shifts the reference's log-probabilities, up to place ``last``.

    Only up to the first token in which its own answers part: behind it they are of other texts.
    """
    one, other = own.distributions[question], want.distributions[question]
    shared = _shared(own.tokens[question], want.tokens[question])
    rows = min(shared, last, len(one) - 1, len(other) - 1) + 1
    differ = np.abs(one[:rows] - other[:rows])
    return float(differ[np.isfinite(differ)].max(initial=0.0))


def _shared(one: Sequence[int], other: Sequence[int]) -> int:
    """Return how many tokens two answers share from the start."""
    pairs = zip(one, other, strict=False)
    return next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(one), len(other)))
