"""Blocks shared by sequences that begin alike: who shares, who does not, and to the bit."""

import numpy as np
import pytest
from PIL import Image
from runtime.checking_executor import CheckingExecutor, assert_nothing_is_left, audit

from step3_hetero.runtime import prefix
from step3_hetero.runtime.blocks import BlockKey, BlockPool
from step3_hetero.runtime.request import Request, SamplingParams

IM_PATCH = 6
SHORT = SamplingParams(max_tokens=3, ignore_eos=True)


def tokens(n, seed=0):
    return np.random.default_rng(seed).integers(7, 64, n).tolist()


def reused(engine, ids, images=(), params=SHORT):
    """Answer a request; return how many of its tokens were found."""
    before = engine.stats().prefix_tokens_reused
    engine.generate(ids, params, images=images)
    audit(engine)
    return engine.stats().prefix_tokens_reused - before


@pytest.mark.parametrize(
    ("first", "second", "found"),
    [
        (300, 300, 256),
        (300, 290, 256),
        (300, 255, 128),
        (127, 127, 0),  # no block is full
        (256, 256, 255),  # the newest token is computed again, in a copy
        (128, 128, 127),
        (126, 300, 128),  # two tokens of its answer fill a block... of other tokens
    ],
)
def test_full_blocks_of_the_same_beginning_are_found(checked, first, second, found):
    engine = checked(CheckingExecutor(20))
    ids = tokens(300)
    answer = engine.generate(ids[:first], SHORT).token_ids
    asked = ids[:second] if first != 126 else [*ids[:126], *answer, *ids[:171]]
    assert reused(engine, asked) == found
    assert_nothing_is_left(engine)


def test_blocks_count_only_with_everything_before_them(checked):
    engine = checked(CheckingExecutor(20))
    one, other = tokens(128, 1), tokens(128, 2)
    engine.generate([*one, *other, 9], SHORT)
    assert reused(engine, [*other, *one, 9]) == 0
    assert reused(engine, [*one, *one, 9]) == 128
    assert reused(engine, [*one, *other, 10]) == 256


def test_equal_tokens_with_another_picture_are_not_found(checked):
    engine = checked(CheckingExecutor(20))
    ids = [*tokens(30), IM_PATCH, *tokens(150)]
    one, other = (Image.new("RGB", (32, 32), colour) for colour in ((9, 9, 9), (9, 9, 10)))
    assert reused(engine, ids, [one]) == 0
    assert reused(engine, ids, [other]) == 0
    assert reused(engine, ids, [one.copy()]) == 128


def test_a_picture_cut_by_a_block_is_sent_though_its_first_rows_are_found(checked):
    engine = checked(CheckingExecutor(20))
    ids = [*tokens(125), IM_PATCH, *tokens(20)]  # <im_start> and a row in block 0, three in block 1
    picture = Image.new("RGB", (32, 32), (1, 2, 3))
    alone = engine.generate(ids, SHORT, images=[picture]).token_ids
    before = engine.stats().prefix_tokens_reused
    assert engine.generate(ids, SHORT, images=[picture]).token_ids == alone
    assert engine.stats().prefix_tokens_reused - before == 128
    assert_nothing_is_left(engine)


def test_two_contents_of_one_digest_are_told_apart(checked, monkeypatch):
    class OneDigest:
        def __init__(self, data=b""):
            pass

        def update(self, data):
            pass

        def digest(self):
            return bytes(32)

    monkeypatch.setattr(prefix, "sha256", OneDigest)
    engine = checked(CheckingExecutor(20))
    assert reused(engine, tokens(200, 1)) == 0
    assert reused(engine, tokens(200, 2)) == 0
    assert reused(engine, tokens(200, 1)) == 128


def test_running_sequences_share_blocks_and_copy_the_one_they_both_write(checked):
    executor = CheckingExecutor(8, microbatches=2)
    engine = checked(executor, max_batch=2)
    ids = tokens(256)
    engine.generate(ids, SHORT)
    long = SamplingParams(max_tokens=30, ignore_eos=True)
    numbers = [engine.submit(ids, long) for _ in range(4)]
    engine.step()
    audit(engine)
    pool = engine.lanes.instances[0].pool
    assert max(pool.holders(block) for block in range(8)) == 4
    assert executor.copies == 4
    assert len({c.token_ids for c in engine.run(numbers)}) == 1


def test_who_waits_for_logits_of_every_token_skips_none(checked):
    engine = checked(CheckingExecutor(20))
    ids = tokens(300)
    first = engine.logits(ids)
    assert engine.stats().cached_blocks == 2
    np.testing.assert_array_equal(engine.logits(ids), first)
    assert engine.stats().prefix_tokens_reused == 0
    assert len(first) == 300


def test_a_lost_instance_takes_its_prefixes_along(checked):
    executor = CheckingExecutor(20, instances=2)
    engine = checked(executor)
    ids = tokens(200)
    engine.generate(ids, SHORT)
    engine.generate(tokens(150, 1), SHORT)
    held = [instance.pool.cached for instance in engine.lanes.instances]
    executor.lose(0)  # with nothing under way: nothing comes back without a result
    engine.generate(tokens(3), SHORT)
    assert [instance.pool.cached for instance in engine.lanes.instances] == [0, held[1]]
    assert reused(engine, ids) == 0


def test_what_landed_just_before_a_loss_counts_but_is_not_kept(checked):
    executor = CheckingExecutor(20)
    engine = checked(executor)
    number = engine.submit(tokens(128), SHORT)

    def lost_at_once(deadline_s=None):
        executor._land(0)
        executor.lose(0)
        return executor._landed.popleft()

    executor.collect = lost_at_once
    engine.step()
    del executor.collect
    audit(engine)
    assert len(engine._sequences[number].generated) == 1
    assert engine.stats().cached_blocks == 0
    assert len(engine.run([number])[0].token_ids) == 3
    assert engine.stats().prefix_tokens_reused == 0


def test_nothing_is_kept_for_an_executor_that_cannot_tell_of_losses(checked):
    executor = CheckingExecutor(20)
    executor.cache_epoch = lambda instance: None
    engine = checked(executor)
    engine.generate(tokens(300), SHORT)
    engine.generate(tokens(300), SHORT)
    stats = engine.stats()
    assert (stats.prefix_tokens_reused, stats.cached_blocks) == (0, 0)


def test_a_sequence_goes_where_its_beginning_is(checked):
    engine = checked(CheckingExecutor(20, instances=3, microbatches=2))
    stems = [tokens(200, seed) for seed in range(3)]
    for stem in stems:
        engine.submit(stem, SHORT)
    while engine._sequences:
        engine.step()
    assert [instance.pool.cached for instance in engine.lanes.instances] == [1, 1, 1]
    numbers = [engine.submit([*stem, 8], SHORT) for stem in (stems[2], stems[2], stems[0])]
    engine.step()
    seats = {s.id: lane.instance for lane in engine.lanes.lanes for s in lane.scheduler.running}
    assert seats[numbers[0]] == seats[numbers[1]] != seats[numbers[2]]
    lanes = [lane for lane in engine.lanes.lanes if lane.instance == seats[numbers[0]]]
    assert [len(lane.scheduler.running) for lane in lanes] == [1, 1]


def test_one_beginning_for_all_does_not_crowd_one_instance(checked):
    engine = checked(CheckingExecutor(60, instances=2), max_batch=40)
    stem = tokens(130)
    engine.generate(stem, SHORT)
    for n in range(30):
        engine.submit([*stem, 7 + n], SamplingParams(max_tokens=5, ignore_eos=True))
    engine.step()
    loads = sorted(len(lane.scheduler.running) for lane in engine.lanes.lanes)
    assert loads[1] - loads[0] <= 9
    assert sum(loads) == 30


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("length", [128, 130])
def test_reuse_changes_no_bit_where_batches_are_invariant(
    engine_of, small, prompt, backend, length
):
    ids = prompt(length)
    params = SamplingParams(max_tokens=3, logprobs=5, ignore_eos=True)
    reusing, other = (
        engine_of(backend, backend, model=small, batch_invariant=True, prefix_reuse=on)
        for on in (True, False)
    )
    reusing.generate(ids, params)
    asked = [Request(ids, params), Request([*ids, 5], params)]
    found, wanted = reusing.generate_all(asked), other.generate_all(asked)
    assert reusing.stats().prefix_tokens_reused >= 127 + 128
    assert other.stats().prefix_tokens_reused == 0
    for done, want in zip(found, wanted, strict=True):
        assert (done.token_ids, done.logprobs) == (want.token_ids, want.logprobs)


def key(number):
    return BlockKey(bytes([number]) * 32, bytes([number]))


def test_held_blocks_are_never_evicted_and_the_one_left_longest_goes_first():
    pool = BlockPool(4)
    blocks = pool.take(4)
    for block in blocks:
        pool.keep(block, key(block))
    pool.give_back([blocks[2]])
    pool.give_back([blocks[0]])
    assert pool.take(3) is None
    assert pool.find([key(2)]) == [2]
    assert pool.take(1) == [2]
    assert pool.find([key(2)]) == []
    assert pool.find([key(0)]) == [0]
    pool.share([0])
    assert pool.take(1) is None


def test_the_end_of_a_chain_is_evicted_before_its_beginning():
    pool = BlockPool(3)
    chain = pool.take(3)
    for block in chain:
        pool.keep(block, key(block))
    pool.give_back(chain)
    pool.take(1)
    assert pool.find([key(n) for n in range(3)]) == [0, 1]
