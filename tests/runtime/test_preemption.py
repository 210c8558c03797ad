"""Sequences that grow block by block: who gives way, who waits, and that all end."""

import numpy as np
import pytest
from runtime.checking_executor import (
    CheckingExecutor,
    assert_nothing_is_left,
    audit,
    undisturbed,
)

from step3_hetero.errors import RequestError
from step3_hetero.runtime.instance import Instance
from step3_hetero.runtime.request import Request, SamplingParams


def tokens(n, seed=0):
    return np.random.default_rng(seed).integers(7, 64, n).tolist()


def running(engine):
    return [s.id for lane in engine.lanes.lanes for s in lane.scheduler.running]


def answered(engine, asked):
    """Run all requests, auditing each step; return the order in which they ended."""
    order, done = [], {}
    while engine._sequences:
        for completion in engine.step():
            order.append(completion.request_id)
            done[completion.request_id] = completion
        audit(engine)
    while any(engine.executor.air):
        engine.step()
    assert_nothing_is_left(engine)
    for number, (ids, params) in asked.items():
        built = engine.prompter.build(ids, ())
        want, _ = undisturbed(built, params, engine.prompter.stop_ids, engine.prompter.banned_id)
        assert list(done[number].token_ids) == want
    return order


def submitted(engine, lengths, max_tokens=200):
    params = SamplingParams(max_tokens=max_tokens, ignore_eos=True)
    prompts = [tokens(n, seed) for seed, n in enumerate(lengths)]
    return {engine.submit(ids, params): (ids, params) for ids in prompts}


def test_a_sequence_starts_with_the_blocks_of_its_prompt_alone(checked):
    engine = checked(CheckingExecutor(6))
    asked = submitted(engine, [100], max_tokens=300)
    engine.step()
    assert engine.stats().free_blocks == 5
    answered(engine, asked)


def test_nobody_is_admitted_without_a_block_of_room(checked):
    engine = checked(CheckingExecutor(4), prefix_reuse=False)
    submitted(engine, [100, 300, 100])  # 1 + 3 blocks would fill the cache
    engine.step()
    assert (running(engine), len(engine.lanes.waiting)) == ([1], 2)


def test_the_youngest_gives_way_and_the_oldest_never_does(checked):
    engine = checked(CheckingExecutor(4))
    asked = submitted(engine, [120, 120, 120])
    oldest_computed = 0
    first = engine._sequences[1]
    while 1 in engine._sequences:
        engine.step()
        assert first.computed > oldest_computed, "the oldest stands still or began again"
        oldest_computed = first.computed
    assert engine.stats().preemptions >= 2
    assert answered(engine, {}) == [2, 3]
    assert asked.keys() == {1, 2, 3}


def test_who_gave_way_is_the_first_to_come_back(checked):
    engine = checked(CheckingExecutor(4), max_batch=3)
    asked = submitted(engine, [120, 120, 120, 10, 10])
    while not engine.stats().preemptions:
        engine.step()
    assert [s.id for s in engine.lanes.waiting] == [3, 4, 5]
    assert answered(engine, asked)[0] == 1


def test_preemption_looks_across_the_lanes_of_an_instance(checked):
    executor = CheckingExecutor(4, microbatches=3)
    engine = checked(executor, max_batch=1)
    asked = submitted(engine, [120, 120, 120])
    answered(engine, asked)
    assert engine.stats().preemptions > 0


def test_blocks_of_who_gave_way_are_not_used_before_its_tokens_have_landed(checked, monkeypatch):
    leaving, settle = [], Instance.settle

    def counted(instance, flight):
        leaving.extend(s.id for s in flight.lane.leaving if s.finished is None)
        settle(instance, flight)

    monkeypatch.setattr(Instance, "settle", counted)
    engine = checked(CheckingExecutor(3, microbatches=2), max_batch=1, prefix_reuse=False)
    asked = submitted(engine, [100, 126])  # the younger takes the last block, then the older asks
    answered(engine, asked)
    assert leaving == [2], "nobody had to give way with tokens under way"


def tight(checked):
    """Return an instance whose four blocks are held by three sequences and by the test."""
    engine = checked(CheckingExecutor(4), prefix_reuse=False)
    submitted(engine, [100, 100, 100, 100])
    engine.step()
    instance = engine.lanes.instances[0]
    return engine, instance, [engine._sequences[n] for n in (1, 2, 3)], instance.pool.take(1)


def test_while_someone_waits_for_a_block_nobody_younger_gets_one(checked):
    engine, instance, (_, second, third), spare = tight(checked)
    third.under_way = True
    assert not instance.grow(second)
    assert instance.lanes[0].leaving == [third]
    instance.pool.give_back(spare)
    assert not instance.grow(third)
    fourth = engine.lanes.waiting[0]
    fourth.max_new = 20  # it would fit into the block that is there
    assert not instance.admit(fourth, instance.lanes[0], [])
    assert instance.grow(second)
    assert len(second.blocks) == 2


def test_no_more_give_way_than_are_needed(checked):
    _, instance, (first, second, third), _ = tight(checked)
    third.under_way = True
    for _ in range(3):
        assert not instance.grow(first)
    assert instance.lanes[0].leaving == [third]
    assert second in instance.lanes[0].scheduler.running
    assert instance.preemptions == 1


def test_the_youngest_waits_with_what_it_holds(checked):
    engine, instance, (_, _, third), spare = tight(checked)
    assert not instance.grow(third)
    assert (len(third.blocks), instance.preemptions) == (1, 0)
    instance.pool.give_back(spare)
    engine.step()
    assert instance.grow(third)


def test_a_lane_is_in_order_of_age_whoever_comes_back_to_it(checked):
    engine, instance, sequences, spare = tight(checked)
    instance.pool.give_back(spare)
    first = sequences[0]
    instance.leave(first)
    assert engine.lanes.waiting[0] is first
    assert instance.admit(engine.lanes.waiting.popleft(), instance.lanes[0], [])
    assert instance.lanes[0].scheduler.running == sequences


def test_stats_count_what_runs_waits_and_is_held(checked):
    engine, instance, _, spare = tight(checked)
    instance.pool.give_back(spare)
    stats = engine.stats()
    assert (stats.running, stats.waiting, stats.blocks) == (3, 1, 4)
    assert (stats.free_blocks, stats.cached_blocks, stats.preemptions) == (1, 0, 0)


def test_images_of_who_gave_way_are_forgotten_and_sent_again(checked):
    from PIL import Image

    executor = CheckingExecutor(3)
    engine = checked(executor, prefix_reuse=False)
    params = SamplingParams(max_tokens=150, ignore_eos=True)
    asked = submitted(engine, [120])
    picture, ids = Image.new("RGB", (32, 32), (9, 60, 200)), [*tokens(50, 1), 6, *tokens(60, 2)]
    number = engine.submit(ids, params, images=[picture])
    while not engine.stats().preemptions:
        engine.step()
    assert executor.images == [{}]
    (completion,) = [c for c in drained(engine) if c.request_id == number]
    built = engine.prompter.build(ids, [picture])
    assert list(completion.token_ids) == undisturbed(built, params, (), 6)[0]
    assert asked.keys() == {1}


def drained(engine):
    """Run until nothing is left; return what ended."""
    ended = []
    while engine._sequences:
        ended += engine.step()
    assert_nothing_is_left(engine)
    return ended


def test_cancelling_who_gave_way_or_waits_leaves_nothing(checked):
    engine = checked(CheckingExecutor(4, microbatches=2), max_batch=2)
    submitted(engine, [120, 120, 120, 120])
    while not engine.stats().preemptions:
        engine.step()
    for number in (4, 3, 2, 1):
        engine.cancel(number)
        audit(engine)
    while any(engine.executor.air):
        engine.step()
    assert_nothing_is_left(engine)


def test_a_request_larger_than_the_cache_is_refused_at_once(checked):
    engine = checked(CheckingExecutor(2))
    with pytest.raises(RequestError, match=r"the KV cache holds 256; raise runtime\.kv_blocks"):
        engine.submit(tokens(200), SamplingParams(max_tokens=57))
    engine.submit(tokens(200), SamplingParams(max_tokens=56))
    assert len(engine._sequences) == 1


@pytest.mark.parametrize("blocks", [2, 3, 4, 5])
@pytest.mark.parametrize("lanes", [1, 3])
def test_requests_that_each_fill_the_cache_all_end(checked, blocks, lanes):
    executor = CheckingExecutor(blocks, microbatches=lanes)
    engine = checked(executor, max_batch=4)
    most = blocks * 128
    asked = submitted(engine, [most - 129, max(1, most - 200), 127, 100, 1], max_tokens=129)
    answered(engine, asked)


@pytest.mark.parametrize("attention", ["cpu", "reference"])
def test_preempted_requests_give_the_bits_of_a_roomy_cache(engine_of, small, prompt, attention):
    prompts = [prompt(n, seed=n) for n in (120, 126)]
    params = SamplingParams(max_tokens=12, logprobs=0, temperature=0.8, seed=3, ignore_eos=True)
    asked = [Request(ids, params) for ids in prompts]
    tight, roomy = (
        engine_of(attention, attention, model=small, batch_invariant=True, kv_blocks=n)
        for n in (3, 40)
    )
    found, wanted = tight.generate_all(asked), roomy.generate_all(asked)
    assert tight.stats().preemptions > 0
    assert roomy.stats().preemptions == 0
    for done, want in zip(found, wanted, strict=True):
        assert done.token_ids == want.token_ids
        assert [p.chosen for p in done.logprobs] == [p.chosen for p in want.logprobs]


def test_many_decode_while_another_prefills(checked):
    engine = checked(CheckingExecutor(40), max_batch=12, prefill_chunk=50)
    decoding = list(submitted(engine, [5] * 10, max_tokens=60))
    engine.step()
    long = engine.submit(tokens(1000, 99), SamplingParams(max_tokens=1))
    before = [len(engine._sequences[n].generated) for n in decoding]
    computed = []
    for _ in range(19):
        engine.step()
        computed.append(engine._sequences[long].computed)
    after = [len(engine._sequences[n].generated) for n in decoding]
    assert [b - a for a, b in zip(before, after, strict=True)] == [19] * 10
    assert computed == [50 * n for n in range(1, 20)]
