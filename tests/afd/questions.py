"""Questions about digits to an engine of any shape, and its answers beside another one's."""

import threading
from contextlib import contextmanager
from pathlib import Path

from step3_hetero import SamplingParams, load
from step3_hetero.runtime.request import Request

ROOT = Path(__file__).resolve().parents[2]
DIGITS = ROOT / "examples" / "digits.yaml"
PICTURES = sorted((ROOT / "examples" / "digits").glob("*.png"))
ONE = {"roles__f__backend": "cpu", "runtime__batch_invariant": True}
APART = {**ONE, "runtime__processes": "per-role"}
LOGPROBS_WITHIN = 2e-5
MARGIN = 1e-3


def split(attention, ffn, ep, tp=1, **more):
    """Return the overrides for so many instances of both roles."""
    instances = {"roles__a__instances": attention, "roles__f__instances": ffn}
    return {**APART, **instances, "roles__f__ep": ep, "roles__f__tp": tp, **more}


@contextmanager
def under_way(disturb, *args):
    """Give a progress callback that starts ``disturb`` in a thread at the first token told.

    No clock says when: a fast machine would be done before.
    """
    if disturb is None:
        yield None
        return
    thread = threading.Thread(target=disturb, args=args)

    def tick(done, total):
        if 0 < done < total and thread.ident is None:
            thread.start()

    try:
        yield tick
        assert thread.ident is not None, "the answers came before the disturbance"
    finally:
        if thread.ident is not None:
            thread.join()


def answers(count=6, disturb=None, ended=None, **overrides):
    """Return each answer's tokens and two best log-probabilities; every other one is sampled.

    ``disturb`` meets the executor at work, ``ended`` once all is answered.
    """
    asked = [
        Request(
            "which digit is this ?",
            SamplingParams(max_tokens=8, logprobs=2, temperature=0.7 * (n % 2), seed=n),
            [PICTURES[n % len(PICTURES)]],
        )
        for n in range(count)
    ]
    with load(DIGITS, **overrides) as engine, under_way(disturb, engine.executor) as tick:
        done = engine.generate_all(asked, on_progress=tick)
        if ended is not None:
            ended(engine.executor)
        assert engine.lanes.free_blocks == engine.executor.kv_blocks * engine.executor.instances
    return [(c.token_ids, c.logprobs) for c in done]


def differences(got, want):
    """Yield, of each answer, the margin at its first other token; hold what precedes together.

    A sampled token's rule is about its draw: here none may differ.
    """
    for number, ((tokens, seen), (wanted, known)) in enumerate(zip(got, want, strict=True)):
        pairs = zip(tokens, wanted, strict=False)  # an answer may end at its other token
        alike = next((i for i, (mine, theirs) in enumerate(pairs) if mine != theirs), len(wanted))
        for mine, theirs in zip(seen[:alike], known[:alike], strict=True):
            assert abs(mine.chosen - theirs.chosen) <= LOGPROBS_WITHIN
        if alike < len(wanted):
            assert number % 2 == 0, "a sampled token differs"
            (_, best), (_, second) = known[alike].top
            yield best - second
