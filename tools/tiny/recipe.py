"""The training loop: single digits and sums side by side, many small steps, averaged weights."""

import math
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass
from functools import cache
from itertools import product

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

from tiny.digits import Digits, drawn, normalise, vary
from tiny.net import Step3
from tiny.shape import TEXT, VISION
from tiny.text import PAD, QUESTIONS, VOCABULARY, answer_ids, prompt_ids

PAD_ID, IGNORED = VOCABULARY.index(PAD), -100
Report = Callable[[int, float], None]


@dataclass(frozen=True)
class Recipe:
    """Everything that decides the result, beside the code and the data."""

    steps: int = 4000
    seed: int = 0
    threads: int = 1
    batch: int = 32
    learning_rate: float = 2e-3
    last_rate: float = 4e-5
    warmup_steps: int = 100
    constant_share: float = 0.5
    weight_decay: float = 0.05
    average: float = 0.995
    balance: float = 0.01
    plain_share: float = 0.9

    def rate(self, step: int) -> float:
        """Return the learning rate: warm up, hold, then fall along a cosine to ``last_rate``."""
        warm = min(1.0, (step + 1) / self.warmup_steps)
        fallen = max(0.0, (step / self.steps - self.constant_share) / (1 - self.constant_share))
        cosine = 0.5 * (1 + math.cos(math.pi * fallen))
        return warm * (self.last_rate + (self.learning_rate - self.last_rate) * cosine)


def prompt(images: int, recipe: Recipe, rng: np.random.Generator) -> list[int]:
    """Draw a prompt: often the plain one, else any question, the pictures before or after it."""
    if rng.random() < recipe.plain_share:
        return _prompts(images)[0]
    return _prompts(images)[rng.integers(len(_prompts(images)))]


@cache
def _prompts(images: int) -> list[list[int]]:
    return [
        prompt_ids(question, images, image_tokens=VISION.image_tokens, image_first=first)
        for first, question in product((True, False), QUESTIONS[images])
    ]


def answer_loss(net: Step3, start: list[int], digits: list[list[int]], rows: Tensor) -> Tensor:
    """Return the cross-entropy of the right answers, and only of these.

    Shapes: digits (seqs, images), rows (seqs, images, image_tokens, hidden).
    """
    answers = [answer_ids(d) for d in digits]
    longest = max(map(len, answers))
    ids = torch.tensor([start + a + [PAD_ID] * (longest - len(a)) for a in answers])
    wanted = ids[:, len(start) :]  # (seqs, longest)
    hidden = net(ids[:, :-1], rows.flatten(0, 1))[:, len(start) - 1 :]
    wanted = wanted.masked_fill(wanted == PAD_ID, IGNORED)
    return F.cross_entropy(
        net.lm_head(hidden).flatten(0, 1), wanted.flatten(), ignore_index=IGNORED
    )


class Trainer:
    """Holds the network, its average and the optimiser, and takes one step at a time."""

    def __init__(self, recipe: Recipe, digits: Digits) -> None:
        torch.manual_seed(recipe.seed)
        self.recipe = recipe
        self.rng = np.random.default_rng(recipe.seed)
        self.pictures, self.labels = drawn(digits), digits.labels
        self.net = Step3(TEXT, VISION)
        self.averaged = deepcopy(self.net).requires_grad_(False)
        self.optimiser = self._optimiser()

    def step(self, number: int) -> float:
        """Learn from one batch of digits and one of their sums; return the loss."""
        for group in self.optimiser.param_groups:
            group["lr"] = self.recipe.rate(number)
        loss = self._loss(self.rng.integers(0, len(self.labels), self.recipe.batch))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.net.parameters(), 1.0)
        self.optimiser.step()
        self.optimiser.zero_grad(set_to_none=True)
        self._average(number + 1)
        return loss.item()

    def _loss(self, chosen: npt.NDArray[np.int64]) -> Tensor:
        """The mean loss over both tasks; the sums pair pictures of the same batch."""
        rows = self.net.see(normalise(vary(self.pictures[chosen])))
        total = torch.zeros(())
        for images in QUESTIONS:
            picks = self._picks(images)
            start = prompt(images, self.recipe, self.rng)
            digits = self.labels[chosen[picks]].tolist()
            total = total + answer_loss(self.net, start, digits, rows[picks]) / len(QUESTIONS)
            balance = torch.stack([e.balance for e in self.net.experts()]).sum()
            total = total + self.recipe.balance * balance / len(QUESTIONS)
        return total

    def _picks(self, images: int) -> npt.NDArray[np.int64]:
        """Shapes: (batch, images), positions within the batch."""
        batch = self.recipe.batch
        if images == 1:
            return np.arange(batch)[:, None]
        return self.rng.integers(0, batch, (batch, images))

    def _average(self, steps_done: int) -> None:
        keep = min(self.recipe.average, steps_done / (steps_done + 10))
        slow, fast = list(self.averaged.parameters()), list(self.net.parameters())
        torch._foreach_lerp_(slow, [p.detach() for p in fast], 1 - keep)

    def _optimiser(self) -> torch.optim.AdamW:
        matrices = [p for p in self.net.parameters() if p.dim() > 1]
        vectors = [p for p in self.net.parameters() if p.dim() <= 1]
        groups = [
            {"params": matrices, "weight_decay": self.recipe.weight_decay},
            {"params": vectors, "weight_decay": 0.0},
        ]
        return torch.optim.AdamW(
            groups, lr=self.recipe.learning_rate, betas=(0.9, 0.98), fused=True
        )


def train(recipe: Recipe, digits: Digits, report: Report) -> Step3:
    """Train from nothing and return the averaged weights; ``report`` hears of every step."""
    torch.set_num_threads(recipe.threads)
    trainer = Trainer(recipe, digits)
    for number in range(recipe.steps):
        report(number + 1, trainer.step(number))
    return trainer.averaged.eval()
