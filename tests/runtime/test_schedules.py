"""Random schedules over an executor that checks everything: whatever happens, the same tokens."""

import numpy as np
import pytest
from PIL import Image
from runtime.checking_executor import (
    CheckingExecutor,
    assert_nothing_is_left,
    audit,
    undisturbed,
)

from step3_hetero.runtime.request import SamplingParams

IM_PATCH = 6


def picture(number):
    """Return a picture of noise; the same number, the same noise."""
    pixels = np.random.default_rng(number).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def drawn_request(draws, stems, answers):
    """Return prompt ids, pictures and parameters: some begin alike, some to the last token."""
    stem = stems[draws.integers(len(stems))]
    length = draws.choice([int(draws.integers(1, 128)), 100, 123, 128, 128, 256, 300])
    ids = stem[:length] + draws.integers(7, 64, draws.choice([0, 0, 0, 50])).tolist()
    shown = [picture(int(draws.random() < 0.1)) for _ in range(ids.count(IM_PATCH))]
    params = SamplingParams(
        max_tokens=int(draws.choice(answers)),
        temperature=float(draws.integers(0, 2)),
        seed=int(draws.integers(0, 3)),
        ignore_eos=bool(draws.random() < 0.9),
        deadline_s=draws.choice([1e-9, 1e9 / 32, None], p=[0.05, 0.05, 0.9]),
    )
    return ids, shown, params


def drawn_stems(draws):
    """Return two beginnings: a text, and one with two pictures of 6 tokens each.

    The rows of the second picture lie on both sides of the end of block 1.
    """
    text, seeing = (draws.integers(7, 64, 300).tolist() for _ in range(2))
    seeing[20] = seeing[249] = IM_PATCH
    return text, seeing


def play(engine, seed, count, cancel=0.01, answers=(1, 100, 200, 250), audits=0.3):
    """Submit and cancel by lot until all is done; return how many ended for which reason."""
    draws = np.random.default_rng(seed)
    stems, asked, done = drawn_stems(draws), {}, {}
    while len(asked) < count or engine._sequences:
        for _ in range(draws.integers(0, 5)):
            if len(asked) < count:
                ids, shown, params = drawn_request(draws, stems, answers)
                asked[engine.submit(ids, params, images=shown)] = ids, shown, params
        if engine._sequences and draws.random() < cancel:
            engine.cancel(int(draws.choice(list(engine._sequences))))
        if engine._sequences and draws.random() < cancel:  # its deadline is now
            engine._deadlines.add(int(draws.choice(list(engine._sequences))), 0.0)
        for completion in engine.step():
            assert completion.request_id not in done
            done[completion.request_id] = completion
        if draws.random() < audits:
            audit(engine)
    while any(engine.executor.air):
        engine.step()
    assert done.keys() == asked.keys()
    assert_nothing_is_left(engine)
    reasons = dict.fromkeys(("length", "stop", "cancelled", "deadline"), 0)
    for number, (ids, shown, params) in asked.items():
        prompter = engine.prompter
        built = prompter.build(ids, shown)
        tokens, reason = undisturbed(built, params, prompter.stop_ids, prompter.banned_id)
        found = done[number]
        whole = found.finish_reason in ("length", "stop")
        assert list(found.token_ids) == tokens[: None if whole else len(found.token_ids)]
        assert not whole or found.finish_reason == reason
        reasons[found.finish_reason] += 1
    return reasons


@pytest.mark.parametrize("instances", [1, 2, 3])
@pytest.mark.parametrize("lanes", [1, 2, 3, 4])
def test_tokens_are_those_of_an_undisturbed_run(checked, lanes, instances):
    seed = 10 * lanes + instances
    executor = CheckingExecutor(5, instances, lanes, seed=seed)
    engine = checked(executor, max_batch=6, prefill_chunk=100)
    play(engine, seed, 40, cancel=0.003)
    stats = engine.stats()
    assert stats.preemptions > 0 or instances > 1
    assert stats.prefix_tokens_reused > 0


@pytest.mark.parametrize("tells_epoch", [True, False])
@pytest.mark.parametrize(("lanes", "instances"), [(1, 1), (4, 1), (2, 2), (3, 3)])
def test_tokens_are_the_same_when_instances_are_lost(checked, lanes, instances, tells_epoch):
    seed = 10 * lanes + instances
    executor = CheckingExecutor(5, instances, lanes, seed=seed, loss=0.03, tells_epoch=tells_epoch)
    engine = checked(executor, max_batch=6, prefill_chunk=100)
    play(engine, seed, 40, cancel=0.003)
    assert executor.lost > 5


def test_without_prefix_reuse_nothing_is_shared_or_copied(checked):
    executor = CheckingExecutor(5, 1, 2)
    engine = checked(executor, max_batch=6, prefill_chunk=100, prefix_reuse=False)
    play(engine, 3, 40)
    stats = engine.stats()
    assert (stats.prefix_tokens_reused, stats.cached_blocks, executor.copies) == (0, 0, 0)


def test_a_thousand_requests_leak_nothing(checked):
    executor = CheckingExecutor(5, 2, 2, seed=1, loss=0.0005)
    engine = checked(executor, max_batch=6, prefill_chunk=200)
    reasons = play(engine, 1, 1000, cancel=0.03, answers=(1, 3, 20, 70), audits=0.05)
    assert min(reasons.values()) > 10
    stats = engine.stats()
    assert stats.preemptions > 10
    assert stats.prefix_tokens_reused > 10_000
    assert executor.copies > 10
    assert executor.lost > 0
