"""Rounds of the fault suite: many requests under way, one fault, the tokens of an undisturbed run.

An engine lives through all rounds of its rack. A round is right when every request has the tokens
and, bit for bit, the log-probabilities that one process without any fault gives (batch-invariant),
and no block is held when it ends.
"""

from __future__ import annotations

import os
import random
import signal
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from faults.between import put_between
from faults.proxy import BACK, THERE, FaultyProxy
from step3_hetero import SamplingParams, load
from step3_hetero.runtime.engine import Engine
from step3_hetero.runtime.request import Completion, Request

ROOT = Path(__file__).resolve().parents[2]
DIGITS = ROOT / "examples" / "digits.yaml"
PICTURES = sorted((ROOT / "examples" / "digits").glob("*.png"))

TOGETHER: dict[str, Any] = {"roles__f__backend": "cpu", "runtime__batch_invariant": True}
APART = {**TOGETHER, "runtime__processes": "per-role", "transport__kind": "tcp"}

STAGE_BYTES = 1500
"""A frame of a stage's tensors is larger than this, a sign of life far smaller."""

CUT_S = 0.5
STOPPED_S = 10.0

Answer = tuple[tuple[int, ...], tuple[float, ...]]


@dataclass(frozen=True)
class Rack:
    """One way of standing, and how long after a fault of an FFN the tokens may stay away."""

    name: str
    keys: Mapping[str, Any]
    ffn_s: float


RACKS = (
    Rack("1A1F", {}, 12.0),
    Rack("2A2F, m = 2", {
        "roles__a__instances": 2, "roles__f__instances": 2, "runtime__microbatches": 2,
    }, 3.0),
    Rack("1A1F and a spare", {"roles__f__spares": 1}, 3.0),
)  # fmt: skip
RESTART_S = 12.0
"""An attention instance is started again, and its requests are computed again from their tokens."""


@dataclass
class Scene:
    """A rack at work: its engine, and the proxies between it and its FFN instances."""

    rack: Rack
    engine: Engine
    proxies: dict[str, FaultyProxy]
    logs: LogDisk

    def signal(self, role: str, number: signal.Signals) -> None:
        """Send a signal to the process that does the work of a role's first instance."""
        executor = self.engine.executor
        os.kill(executor.processes()[executor.serving(role, 0)], number)

    @property
    def can_be_struck(self) -> bool:
        """Say whether there is a process to strike: one may be about to be started again."""
        executor = self.engine.executor
        running = executor.processes()
        return all(executor.serving(role, 0) in running for role in ("a", "f"))

    @property
    def proxy(self) -> FaultyProxy:
        """Return what lies between attention and the first FFN instance."""
        return self.proxies[self.engine.executor.serving("f", 0)]


class LogDisk:
    """Where the roles' lines go; a full one takes none."""

    def __init__(self) -> None:
        self.is_full = False
        self.refused = 0

    def __call__(self, name: str, line: str) -> None:
        """Take a line."""
        if self.is_full:
            self.refused += 1
            raise OSError(28, "No space left on device")


@dataclass(frozen=True)
class Fault:
    """Something that happens to a rack; ``within_s``: when tokens have to come again."""

    name: str
    strike: Callable[[Scene], None]
    within_s: Callable[[Rack], float]


def _of_ffn(rack: Rack) -> float:
    return rack.ffn_s


def _of_attention(_: Rack) -> float:
    return RESTART_S


def _stop(role: str) -> Callable[[Scene], None]:
    def strike(scene: Scene) -> None:
        """Stop a process; it is killed long before it could go on."""
        scene.signal(role, signal.SIGSTOP)

    return strike


def _cut(scene: Scene) -> None:
    proxy = scene.proxy
    proxy.cut()
    time.sleep(CUT_S)
    proxy.heal()


def _fill(scene: Scene) -> None:
    scene.logs.is_full = True
    scene.signal("f", signal.SIGKILL)  # what starts anew has something to say


FAULTS = (
    Fault("FFN killed", lambda s: s.signal("f", signal.SIGKILL), _of_ffn),
    Fault("attention killed", lambda s: s.signal("a", signal.SIGKILL), _of_attention),
    Fault("FFN stopped", _stop("f"), _of_ffn),
    Fault("attention stopped", _stop("a"), _of_attention),
    Fault("link cut and healed", _cut, lambda _: 3.0),
    Fault("A2F damaged", lambda s: s.proxy.corrupt_next(THERE, least_bytes=STAGE_BYTES),
          lambda _: 3.0),
    Fault("F2A damaged", lambda s: s.proxy.corrupt_next(BACK, least_bytes=STAGE_BYTES),
          lambda _: 3.0),
    Fault("disk full, FFN killed", _fill, lambda _: RESTART_S),
)  # fmt: skip


@contextmanager
def standing(rack: Rack, monkeypatch: Any) -> Iterator[Scene]:
    """Start a rack whose FFN instances are reached through proxies."""
    logs = LogDisk()
    proxies = put_between(monkeypatch, "f", on_line=logs)
    try:
        with load(DIGITS, **{**APART, **rack.keys}) as engine:
            yield Scene(rack, engine, proxies, logs)
    finally:
        for proxy in list(proxies.values()):
            proxy.close()


def requests_of(count: int, seed: int) -> list[Request]:
    """Return requests of unlike lengths: every other one sampled, one in eight with a picture."""
    draw = np.random.default_rng(seed)
    found = []
    for n in range(count):
        params = SamplingParams(
            max_tokens=int(draw.integers(6, 20)), logprobs=1, temperature=0.7 * (n % 2), seed=n,
            ignore_eos=n % 8 != 0,
        )  # fmt: skip
        if n % 8 == 0:
            picture = PICTURES[int(draw.integers(len(PICTURES)))]
            found.append(Request("which digit is this ?", params, [picture]))
        else:
            prompt = draw.integers(20, 60, int(draw.integers(1, 24))).tolist()
            found.append(Request(prompt, params))
    return found


def answer_of(done: Completion) -> Answer:
    """Return what has to be the same."""
    assert done.logprobs is not None
    return done.token_ids, tuple(p.chosen for p in done.logprobs)


def undisturbed(requests: list[Request]) -> list[Answer]:
    """Return the answers of one process."""
    with load(DIGITS, **TOGETHER) as engine:
        return [answer_of(done) for done in engine.generate_all(requests)]


@dataclass
class Round:
    """What came of one round."""

    rack: str
    fault: str
    wrong: list[int]
    """Requests whose answer is not that of the undisturbed run."""
    held_blocks: int
    away_s: float
    """The longest that a sequence that was decoding waited for its next token after the fault."""
    within_s: float
    took_s: float
    struck: bool
    """Whether requests were still under way when the fault came."""

    @property
    def right(self) -> bool:
        """Say whether no request was lost or altered, and nothing is held."""
        return not self.wrong and self.held_blocks == 0


@dataclass
class Watch:
    """When each sequence got its tokens, and when the fault struck."""

    times: list[list[float]]
    struck_s: float = field(default=float("inf"))

    def token(self, number: int) -> Callable[[object], None]:
        """Return the callback of one sequence."""
        return lambda _: self.times[number].append(time.monotonic())

    @property
    def count(self) -> int:
        """Return the tokens of all sequences so far."""
        return sum(map(len, self.times))

    @property
    def last_s(self) -> float:
        """Return when the last token came."""
        return max(times[-1] for times in self.times if times)

    def away_s(self) -> float:
        """Return the longest wait for a next token that ended after the fault."""
        waits = [
            later - max(earlier, self.struck_s)
            for times in self.times
            for earlier, later in pairwise(times)
            if later > self.struck_s
        ]
        return max(waits, default=0.0)


def run_round(
    scene: Scene, fault: Fault, requests: list[Request], want: list[Answer], draw: random.Random
) -> Round:
    """Answer all requests, let the fault strike somewhere in between, and compare."""
    engine, watch = scene.engine, Watch([[] for _ in requests])
    numbers = [
        engine.submit(r.prompt, r.params, images=r.images, on_token=watch.token(n))
        for n, r in enumerate(requests)
    ]
    strike_at = draw.uniform(0.05, 0.7) * sum(len(tokens) for tokens, _ in want)
    done: dict[int, Completion] = {}
    start = time.monotonic()
    while len(done) < len(requests):
        is_time = watch.count >= strike_at and watch.struck_s == float("inf")
        if is_time and scene.can_be_struck:
            watch.struck_s = time.monotonic()
            fault.strike(scene)
        done |= {finished.request_id: finished for finished in engine.step()}
    scene.logs.is_full = False
    got = [answer_of(done[number]) for number in numbers]
    held = engine.executor.kv_blocks * engine.executor.instances - engine.lanes.free_blocks
    wrong = [n for n, (g, w) in enumerate(zip(got, want, strict=True)) if g != w]
    return Round(
        scene.rack.name, fault.name, wrong, held, watch.away_s(), fault.within_s(scene.rack),
        time.monotonic() - start, watch.struck_s < watch.last_s,
    )  # fmt: skip
