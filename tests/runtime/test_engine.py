"""Requests through the engine: batching, sampling, stopping, cancelling, refusing."""

import numpy as np
import pytest

from step3_hetero.errors import RequestError
from step3_hetero.runtime.request import Request, SamplingParams

FREE = {"ignore_eos": True}


def test_greedy_tokens_are_the_oracles(engine_of, oracle, prompt):
    ids = prompt(20)
    done = engine_of().generate(ids, SamplingParams(max_tokens=12, **FREE))
    text = [*ids, *done.token_ids]
    want = oracle(text)[len(ids) - 1 : -1]
    margin = np.sort(want, -1)[:, -1] - np.sort(want, -1)[:, -2]
    decided = margin > 1e-3
    assert decided.any()
    np.testing.assert_array_equal(want.argmax(-1)[decided], np.array(done.token_ids)[decided])


def test_one_line_moves_a_stage_and_the_tokens_stay(engine_of, prompt):
    params = SamplingParams(max_tokens=16, **FREE)
    found = {
        (a, f): engine_of(a, f).generate(prompt(50), params).token_ids
        for a in ("cpu", "reference")
        for f in ("cpu", "reference")
    }
    assert len(set(found.values())) == 1


def test_sequences_of_different_lengths_batch_without_a_trace(engine_of, prompt):
    lengths = [1, 3, 130, 40, 127, 128]
    prompts = [prompt(n, seed=n) for n in lengths]
    params = SamplingParams(max_tokens=10, logprobs=0, **FREE)
    together = engine_of(batch_invariant=True, max_batch=4, prefill_chunk=50)
    batch = together.generate_all([Request(ids, params) for ids in prompts])
    alone = engine_of(batch_invariant=True)
    for ids, done in zip(prompts, batch, strict=True):
        single = alone.generate(ids, params)
        assert single.token_ids == done.token_ids
        assert [p.chosen for p in single.logprobs] == [p.chosen for p in done.logprobs]


def test_log_probabilities_are_those_of_teacher_forcing(engine_of, prompt, log_softmax):
    engine = engine_of()
    ids = prompt(30)
    done = engine.generate(ids, SamplingParams(max_tokens=6, logprobs=3, **FREE))
    forced = log_softmax(engine.logits([*ids, *done.token_ids]))[len(ids) - 1 : -1]
    for row, token, reported in zip(forced, done.token_ids, done.logprobs, strict=True):
        assert reported.chosen == pytest.approx(row[token], abs=2e-5)
        assert [i for i, _ in reported.top] == np.argsort(-row, kind="stable")[:3].tolist()


def test_the_same_seed_draws_the_same_tokens_on_every_backend(engine_of, prompt):
    params = SamplingParams(max_tokens=12, temperature=1.0, top_k=40, top_p=0.95, seed=11, **FREE)
    found = {engine_of(b, b).generate(prompt(9), params).token_ids for b in ("cpu", "reference")}
    assert len(found) == 1


def test_another_seed_draws_other_tokens(engine_of, prompt):
    engine = engine_of()
    found = {
        engine.generate(
            prompt(9), SamplingParams(max_tokens=12, temperature=2.0, seed=s, **FREE)
        ).token_ids
        for s in range(4)
    }
    assert len(found) == 4


def test_top_k_of_one_is_greedy(engine_of, prompt):
    engine = engine_of()
    greedy = engine.generate(prompt(9), SamplingParams(max_tokens=8, **FREE))
    forced = engine.generate(
        prompt(9), SamplingParams(max_tokens=8, temperature=1.0, top_k=1, seed=3, **FREE)
    )
    assert greedy.token_ids == forced.token_ids


def test_generation_ends_at_the_models_own_end(engine_of, prompt):
    engine = engine_of()
    free = engine.generate(prompt(20), SamplingParams(max_tokens=8, **FREE))
    engine.prompter.stop_ids = frozenset({free.token_ids[3]})
    first = free.token_ids.index(free.token_ids[3])
    stopped = engine.generate(prompt(20), SamplingParams(max_tokens=8))
    assert (stopped.token_ids, stopped.finish_reason) == (free.token_ids[: first + 1], "stop")


def test_streaming_sees_every_token_in_order(engine_of, prompt):
    seen = []
    done = engine_of().generate(
        prompt(5), SamplingParams(max_tokens=7, **FREE), on_token=lambda t: seen.append(t.id)
    )
    assert tuple(seen) == done.token_ids
    assert done.finish_reason == "length"


def test_more_requests_than_memory_wait_their_turn(engine_of, prompt):
    engine = engine_of(kv_blocks=3, max_batch=8)
    prompts = [prompt(100, seed=n) for n in range(7)]
    params = SamplingParams(max_tokens=40, **FREE)
    done = engine.generate_all([Request(ids, params) for ids in prompts])
    roomy = engine_of()
    for ids, completion in zip(prompts, done, strict=True):
        assert (
            completion.token_ids
            == roomy.generate(ids, SamplingParams(max_tokens=40, **FREE)).token_ids
        )
    assert engine.lanes.free_blocks == 3


def test_cancelling_frees_blocks_and_leaves_the_others_alone(engine_of, prompt):
    engine = engine_of()
    params = SamplingParams(max_tokens=20, **FREE)
    kept, dropped = engine.submit(prompt(30), params), engine.submit(prompt(40, seed=1), params)
    for _ in range(5):
        engine.step()
    partial = engine.cancel(dropped)
    assert partial.finish_reason == "cancelled"
    assert 0 < len(partial.token_ids) < 20
    done = engine.run([kept])[0]
    assert done.token_ids == engine_of().generate(prompt(30), params).token_ids
    assert engine.lanes.free_blocks == engine.executor.kv_blocks


def test_a_long_prompt_does_not_stall_those_who_decode(engine_of, prompt):
    engine = engine_of(prefill_chunk=10)
    decoding = engine.submit(prompt(4), SamplingParams(max_tokens=12, **FREE))
    engine.step()
    engine.submit(prompt(200, seed=2), SamplingParams(max_tokens=1, **FREE))
    finished = []
    for _ in range(12):
        finished += [c.request_id for c in engine.step()]
    assert finished == [decoding]


@pytest.mark.parametrize(
    "field,value",
    [
        ("max_tokens", 0),
        ("temperature", -1.0),
        ("temperature", float("nan")),
        ("top_k", -1),
        ("top_p", 0.0),
        ("top_p", 1.5),
        ("seed", -1),
        ("stop", ("",)),
        ("stop", "</think>"),
        ("top_k", 2**31),
        ("max_tokens", 2.5),
        ("seed", 1.5),
        ("temperature", True),
        ("logprobs", 100000),
    ],
)
def test_a_bad_parameter_is_named_with_what_is_allowed(field, value):
    with pytest.raises(RequestError, match=f"{field}: .* refused; allowed:"):
        SamplingParams(**{field: value})


@pytest.mark.parametrize(
    "ids,words",
    [
        ([], "the prompt is empty|is empty"),
        ([5, 130], "token 130 at place 1 is outside the vocabulary; allowed: 0 to 129"),
        ([-1], "token -1 at place 0 is no token id; allowed: whole numbers from 0"),
        ([5] * 640, "the prompt has 640 tokens, the model's context is 640"),
    ],
)
def test_a_bad_prompt_is_refused_and_nothing_is_held(ids, words, engine_of):
    engine = engine_of()
    with pytest.raises(RequestError, match=words):
        engine.generate(ids)
    assert engine.lanes.free_blocks == engine.executor.kv_blocks
    assert not engine.lanes.waiting


def test_text_without_a_tokenizer_is_refused(engine_of):
    with pytest.raises(RequestError, match=r"tokenizer\.json"):
        engine_of().generate("which digit is this ?")


def test_an_image_for_a_text_model_is_refused(engine_of, prompt):
    from PIL import Image

    with pytest.raises(RequestError, match="without vision"):
        engine_of().generate(prompt(3), images=[Image.new("RGB", (8, 8))])


def test_a_request_larger_than_the_cache_is_refused_with_what_to_change(engine_of, prompt):
    with pytest.raises(RequestError, match=r"raise runtime\.kv_blocks \(1\) or lower max_tokens"):
        engine_of(kv_blocks=1).generate(prompt(120), SamplingParams(max_tokens=20))


def test_generation_stops_at_the_context(engine_of, prompt):
    done = engine_of().generate(prompt(636), SamplingParams(max_tokens=50, **FREE))
    assert (len(done.token_ids), done.finish_reason) == (4, "length")


def test_a_callback_that_raises_ends_its_own_request_only(engine_of, prompt):
    engine = engine_of()
    params = SamplingParams(max_tokens=6, **FREE)

    def raise_(token):
        raise RuntimeError("the listener is gone")

    kept = engine.submit(prompt(30), params)
    engine.submit(prompt(40, seed=1), params, on_token=raise_)
    with pytest.raises(RuntimeError, match="the listener is gone"):
        engine.step()
    assert engine.run([kept])[0].token_ids == engine_of().generate(prompt(30), params).token_ids
    assert engine.lanes.free_blocks == engine.executor.kv_blocks


@pytest.mark.parametrize(("at", "reason"), [(1, "cancelled"), (4, "length")])
def test_a_callback_may_cancel_its_request_at_any_token(at, reason, engine_of, prompt):
    engine = engine_of()
    seen = []

    def stop(token):
        seen.append(token.id)
        if len(seen) == at and number in engine._sequences:
            engine.cancel(number)

    number = engine.submit(prompt(9), SamplingParams(max_tokens=4, **FREE), on_token=stop)
    done = engine.run([number])[0]
    assert (len(done.token_ids), done.finish_reason) == (at, reason)


def test_answers_finished_in_someone_elses_run_are_kept(engine_of, prompt):
    engine = engine_of()
    first = engine.submit(prompt(5), SamplingParams(max_tokens=2, **FREE))
    engine.generate(prompt(6), SamplingParams(max_tokens=8, **FREE))
    engine.logits(prompt(4))
    assert len(engine.run([first])[0].token_ids) == 2
    with pytest.raises(RequestError, match=f"no request {first}"):
        engine.run([first])


def test_a_refused_request_leaves_none_of_its_batch_behind(engine_of, prompt):
    engine = engine_of()
    with pytest.raises(RequestError):
        engine.generate_all([Request(prompt(3)), Request([999])])
    assert not engine.lanes.waiting
    assert not engine._sequences


def test_a_temperature_near_zero_is_greedy(engine_of, prompt):
    for backend in ("cpu", "reference"):
        engine = engine_of(backend, backend)
        cold = SamplingParams(max_tokens=6, temperature=1e-300, seed=5, **FREE)
        greedy = SamplingParams(max_tokens=6, **FREE)
        drawn, chosen = (engine.generate(prompt(9), p).token_ids for p in (cold, greedy))
        assert drawn == chosen


def test_what_a_block_held_before_does_not_reach_its_next_owner(engine_of, prompt):
    engine = engine_of(kv_blocks=4)
    clean = engine.generate(prompt(10), SamplingParams(max_tokens=4, **FREE)).token_ids
    for cache in engine.executor._caches:
        cache.k.fill_(float("inf"))
        cache.v.fill_(float("inf"))
    long, short = Request(prompt(120, seed=1)), Request(prompt(10))
    params = SamplingParams(max_tokens=4, **FREE)
    done = engine.generate_all([Request(r.prompt, params) for r in (long, short)])
    assert done[1].token_ids == clean


@pytest.mark.parametrize("attention,ffn", [("cpu", "cpu"), ("reference", "reference")])
def test_weights_are_rounded_to_the_format_a_role_asks_for(attention, ffn, odd, prompt):
    from step3_hetero.api import load

    def logits(weights):
        roles = {
            "a": {"stages": ["embed", "attention", "head"], "backend": attention},
            "f": {"stages": ["ffn"], "backend": ffn, "weights": weights},
        }
        config = {"version": 1, "model": str(odd), "roles": roles, "runtime": {"dtype": "fp32"}}
        return load(config).logits(prompt(12))

    exact, rounded = logits("auto"), logits("bf16")
    assert 1e-4 < np.abs(exact - rounded).max() < 1
