"""Measures the model by generating its answers: accuracy, and what breaks without each part."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from copy import deepcopy
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from tiny.digits import Digits, drawn, normalise
from tiny.net import Step3
from tiny.shape import VISION
from tiny.text import END_OF_TURN, QUESTIONS, VOCABULARY, number_said, prompt_ids

LONGEST_ANSWER = 8
BATCH = 250
STOP = VOCABULARY.index(END_OF_TURN)


@dataclass(frozen=True)
class Accuracy:
    """The share of right answers for one digit and for the sum of two, 0 to 1."""

    single: float
    sums: float

    def __str__(self) -> str:
        return f"{self.single:.1%} single digits, {self.sums:.1%} sums"


def generate(net: Step3, prompt: list[int], image_rows: Tensor) -> list[list[int]]:
    """Answer one prompt for many pictures, always taking the likeliest token.

    Shapes: image_rows (seqs, images, image_tokens, hidden).
    """
    ids = torch.tensor(prompt).expand(len(image_rows), -1)
    rows = image_rows.flatten(0, 1)
    for _ in range(LONGEST_ANSWER):
        following = net.lm_head(net(ids, rows)[:, -1]).argmax(-1, keepdim=True)
        ids = torch.cat([ids, following], 1)
    return [_until_stop(row) for row in ids[:, len(prompt) :].tolist()]


def _until_stop(ids: list[int]) -> list[int]:
    return ids[: ids.index(STOP)] if STOP in ids else ids


def _said(net: Step3, image_rows: Tensor) -> list[int | None]:
    """Shapes: image_rows (seqs, images, image_tokens, hidden) -> one number per sequence."""
    images = image_rows.shape[1]
    prompt = prompt_ids(QUESTIONS[images][0], images, image_tokens=VISION.image_tokens)
    answers = (generate(net, prompt, rows) for rows in image_rows.split(BATCH))
    return [number_said(a) for batch in answers for a in batch]


def _share(said: list[int | None], truth: list[int]) -> float:
    return sum(s == t for s, t in zip(said, truth, strict=True)) / len(truth)


@torch.no_grad()
def measure(net: Step3, digits: Digits) -> Accuracy:
    """Ask for every digit, and for the sum of every fixed pair."""
    rows = torch.cat([net.see(p) for p in normalise(drawn(digits)).split(BATCH)])
    pairs, labels = torch.from_numpy(digits.pairs()), torch.from_numpy(digits.labels)
    single = _share(_said(net, rows[:, None]), labels.tolist())
    return Accuracy(single, _share(_said(net, rows[pairs]), labels[pairs].sum(1).tolist()))


def rounded(net: Step3) -> Step3:
    """Return a copy whose weights are rounded to bfloat16; it still computes in float32."""
    copy = deepcopy(net).eval()
    with torch.no_grad():
        for weight in copy.parameters():
            weight.copy_(weight.bfloat16().float())
    return copy


@contextmanager
def _silent(modules: list[nn.Module]) -> Iterator[None]:
    """Make the modules answer zero."""
    hooks = [m.register_forward_hook(lambda _m, _x, out: torch.zeros_like(out)) for m in modules]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def without_attention(net: Step3) -> AbstractContextManager[None]:
    """Zero what every attention layer of the language model adds."""
    return _silent([b.self_attn for b in net.blocks()])


def without_experts(net: Step3) -> AbstractContextManager[None]:
    """Zero what the routed and the shared experts add."""
    moe = [b for b in net.blocks() if b.is_moe]
    return _silent([part for b in moe for part in (b.moe, b.share_expert)])


def without_routed_experts(net: Step3) -> AbstractContextManager[None]:
    """Zero what the routed experts alone add."""
    return _silent(list(net.experts()))


def without_vision(net: Step3) -> AbstractContextManager[None]:
    """Zero the image rows."""
    return _silent([net.vit_large_projector])


ABLATIONS: dict[str, Callable[[Step3], AbstractContextManager[None]]] = {
    "attention output zeroed, all layers": without_attention,
    "routed and shared experts zeroed": without_experts,
    "routed experts alone zeroed": without_routed_experts,
    "image rows zeroed": without_vision,
}


def ablate(net: Step3, digits: Digits) -> dict[str, Accuracy]:
    """Measure the model again with each part in turn silent."""
    found = {}
    for name, silence in ABLATIONS.items():
        with silence(net):
            found[name] = measure(net, digits)
    return found
