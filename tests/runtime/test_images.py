"""Images through the engine, against a separately written processor, tower and forward."""

import json
import shutil
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest
from oracle.forward import load as load_oracle
from oracle.forward import text_forward, vision_forward
from oracle.preprocess import Constants, preprocess
from oracle.random_checkpoint import Vision, write_checkpoint
from PIL import Image
from safetensors.numpy import load_file, save_file

from step3_hetero.api import load
from step3_hetero.runtime.request import Request, SamplingParams

TINY = Path(__file__).resolve().parents[2] / "models" / "tiny-step3-digits"
PLACEMENTS = [
    ("cpu", "cpu"),
    ("reference", "reference"),
    ("cpu", "reference"),
    ("reference", "cpu"),
]
BOUND = 2e-5
IM_PATCH = 6
KEYS = {
    "view": "image_size",
    "crop": "crop_size",
    "longest": "max_side",
    "thin": "min_side",
    "thin_ratio": "max_ratio",
    "small_ratio": "window_ratio",
    "fraction": "crop_round_up",
    "mean": "image_mean",
    "std": "image_std",
}
"""Each constant of the oracle and its key in preprocessor_config.json."""
PROCESSOR = {"image_size": 32, "crop_size": 24, "max_side": 96, "min_side": 8}
SIZES = {
    (32, 32): 0,
    (20, 9): 3,  # 2.2 windows of 9, and more than 0.2 of a third
    (50, 40): 4,  # two rows: a line end
    (96, 70): 12,  # three rows
    (150, 200): 12,  # brought down to 72 x 96
    (40, 5): 4,  # thin: padded to 40 x 40
    (200, 7): 16,  # thin: padded to 200 x 200, brought down to 96 x 96
    (300, 12): 32,  # 96 x 3 once it is brought down: thin only then, and not padded
}
"""Width and height of a picture, and how many crops it is cut into."""


@pytest.fixture(scope="session")
def seeing(tmp_path_factory):
    """Write a random model with vision and the tiny model's tokenizer."""
    folder = write_checkpoint(
        tmp_path_factory.mktemp("seeing") / "model",
        vision=Vision(image_size=28),  # another grid than the view's: positions are resized
        vocab_size=64,
        image_token_id=IM_PATCH,
        projector_bias=True,
        norm_expert_weight=True,
    )
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(TINY / name, folder)
    (folder / "preprocessor_config.json").write_text(json.dumps(PROCESSOR))
    return folder


@pytest.fixture(scope="session")
def pictures(tmp_path_factory):
    """Write a PNG of noise for each size."""
    folder = tmp_path_factory.mktemp("pictures")
    for width, height in SIZES:
        rng = np.random.default_rng(width)
        pixels = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{width}x{height}.png")
    return lambda size: folder / f"{size[0]}x{size[1]}.png"


def constants(folder):
    stated = json.loads((folder / "preprocessor_config.json").read_text())
    known = {name: stated[key] for name, key in KEYS.items() if key in stated}
    assert known.keys() <= {f.name for f in fields(Constants)}
    return Constants(patch=4, **known)


@pytest.fixture(scope="session")
def words():
    """Return the number of each special token."""
    tokens = json.loads((TINY / "tokenizer.json").read_text())["added_tokens"]
    return {t["content"]: t["id"] for t in tokens}


@pytest.fixture(scope="session")
def expected(seeing, words):
    """Return the oracle's token ids and log-probabilities of ids with images, ``answer`` after."""
    config, weights = load_oracle(seeing)

    def expected(ids, files, answer=()):
        prepared = [preprocess(Image.open(f), constants(seeing)) for f in files]
        images, whole, rows = iter(prepared), [], []
        for token in ids:
            if token != IM_PATCH:
                whole.append(token)
                continue
            image = next(images)
            whole += [words[name] for name in image.layout]
            rows += [vision_forward(config, weights, v) for v in (*image.crops, image.view)]
        whole += answer
        positions = np.flatnonzero(np.array(whole) == IM_PATCH)
        rows = np.concatenate(rows) if rows else np.zeros((0, 48))
        return whole, text_forward(config, weights, whole, rows, positions)

    return expected


def log_probabilities(done, vocab=64):
    """Return the whole distribution from which each token was chosen. Shape: (tokens, vocab)."""
    found = np.full((len(done.token_ids), vocab), np.nan)
    for row, reported in zip(found, done.logprobs, strict=True):
        for token, value in reported.top:
            row[token] = value
    return found


ALL = {"logprobs": 64, "ignore_eos": True}


def assert_agrees(done, ids, files, expected):
    whole, want = expected(ids, files, done.token_ids)
    steps = len(done.token_ids)
    assert done.prompt_tokens == len(whole) - steps
    np.testing.assert_allclose(log_probabilities(done), want[-steps - 1 : -1], rtol=0, atol=BOUND)


@pytest.mark.parametrize("size", SIZES, ids=lambda s: f"{s[0]}x{s[1]}")
@pytest.mark.parametrize(("attention", "ffn"), PLACEMENTS[:3])
def test_an_image_agrees_with_the_oracle(
    attention, ffn, size, engine_of, seeing, pictures, expected
):
    ids = [20, 21, IM_PATCH, 30, 31]
    engine = engine_of(attention, ffn, model=seeing)
    done = engine.generate(ids, SamplingParams(max_tokens=3, **ALL), images=[pictures(size)])
    assert_agrees(done, ids, [pictures(size)], expected)


@pytest.mark.parametrize("size", SIZES, ids=lambda s: f"{s[0]}x{s[1]}")
def test_sizes_are_cut_as_their_list_says(size, seeing, pictures):
    made = preprocess(Image.open(pictures(size)), constants(seeing))
    assert made.layout.count("<patch_start>") == len(made.crops) == SIZES[size]


@pytest.mark.parametrize(("attention", "ffn"), PLACEMENTS)
def test_several_images_agree_with_the_oracle(
    attention, ffn, engine_of, seeing, pictures, expected
):
    ids = [IM_PATCH, 20, IM_PATCH, IM_PATCH, 31]
    files = [pictures(size) for size in ((50, 40), (32, 32), (40, 5))]
    engine = engine_of(attention, ffn, model=seeing)
    done = engine.generate(ids, SamplingParams(max_tokens=2, **ALL), images=files)
    assert_agrees(done, ids, files, expected)


@pytest.mark.parametrize("chunk", [1, 7, 32])
@pytest.mark.parametrize(("attention", "ffn"), PLACEMENTS[:3])
def test_an_image_may_be_cut_by_a_chunk(
    attention, ffn, chunk, engine_of, seeing, pictures, expected
):
    ids = [20, IM_PATCH, 21, IM_PATCH, 30]
    files = [pictures((50, 40)), pictures((32, 32))]
    engine = engine_of(attention, ffn, model=seeing, prefill_chunk=chunk)
    done = engine.generate(ids, SamplingParams(max_tokens=1, **ALL), images=files)
    assert_agrees(done, ids, files, expected)


@pytest.mark.parametrize("chunk", [5, 512])
def test_images_of_requests_in_one_batch_do_not_mix(chunk, engine_of, seeing, pictures, expected):
    ids = [20, IM_PATCH, 30]
    files = [pictures(size) for size in ((32, 32), (50, 40), (40, 5))]
    engine = engine_of(model=seeing, prefill_chunk=chunk)
    params = SamplingParams(max_tokens=4, **ALL)
    requests = [*(Request(ids, params, [f]) for f in files), Request([20, 22, 30], params)]
    for request, done in zip(requests, engine.generate_all(requests), strict=True):
        assert_agrees(done, request.prompt, request.images, expected)


def test_the_order_of_images_matters(engine_of, seeing, pictures):
    engine = engine_of(model=seeing)
    files = [pictures((32, 32)), pictures((50, 40))]
    params = SamplingParams(max_tokens=1, **ALL)
    ids = [IM_PATCH, 20, IM_PATCH]
    one, other = (engine.generate(ids, params, images=f) for f in (files, files[::-1]))
    assert one.prompt_tokens == other.prompt_tokens
    assert np.abs(log_probabilities(one) - log_probabilities(other)).max() > 0.01


def test_rows_of_an_image_are_forgotten_after_the_request(engine_of, seeing, pictures):
    engine = engine_of(model=seeing)
    number = engine.submit(
        [IM_PATCH, 20, IM_PATCH],
        SamplingParams(max_tokens=3, ignore_eos=True),
        images=[pictures((32, 32)), pictures((50, 40))],
    )
    engine.step()
    assert len(engine.executor._program._images) == 2
    engine.run([number])
    assert engine.executor._program._images == {}


def test_rows_of_an_image_are_forgotten_after_a_cancel(engine_of, seeing, pictures):
    engine = engine_of(model=seeing, prefill_chunk=4)
    number = engine.submit([20, IM_PATCH, 20], images=[pictures((50, 40))])
    engine.step()
    assert len(engine.executor._program._images) == 1
    engine.cancel(number)
    assert engine.executor._program._images == {}


@pytest.fixture(scope="session")
def obsessed(seeing, tmp_path_factory):
    """Return a copy whose head points at <im_patch> almost always."""
    folder = tmp_path_factory.mktemp("obsessed") / "model"
    shutil.copytree(seeing, folder)
    tensors = load_file(folder / "model.safetensors")
    tensors["lm_head.weight"][IM_PATCH] *= 100
    save_file(tensors, folder / "model.safetensors")
    return folder


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("how", [{}, {"temperature": 50.0}, {"temperature": 1.0, "top_k": 1}])
def test_the_image_token_is_never_chosen(backend, how, engine_of, obsessed):
    engine = engine_of(backend, backend, model=obsessed)
    prompts = [[30, 31, 20 + n] for n in range(8)]
    wanted = sum(engine.logits(p)[-1].argmax() == IM_PATCH for p in prompts)
    assert wanted >= 2, "the model has to want it"
    params = SamplingParams(max_tokens=8, ignore_eos=True, **how)
    for done in engine.generate_all([Request(p, params) for p in prompts]):
        assert IM_PATCH not in done.token_ids


def test_a_question_in_the_template_agrees_with_the_oracle(engine_of, seeing, pictures, expected):
    engine = engine_of(model=seeing)
    file = pictures((50, 40))
    text = engine.tokenizer.chat([{"role": "user", "content": "<im_patch>which digit is this ?"}])
    done = engine.generate(
        "which digit is this ?", SamplingParams(max_tokens=2, **ALL), images=[file]
    )
    assert_agrees(done, engine.tokenizer.encode(text), [file], expected)


def test_a_picture_is_the_same_as_path_bytes_and_object(engine_of, seeing, pictures):
    engine, file = engine_of(model=seeing), pictures((50, 40))
    forms = [str(file), file, file.read_bytes(), Image.open(file)]
    params = SamplingParams(max_tokens=1, **ALL)
    first, *others = (
        log_probabilities(engine.generate([IM_PATCH], params, images=[form])) for form in forms
    )
    for other in others:
        np.testing.assert_array_equal(first, other)


def test_vision_may_have_a_role_of_its_own(seeing, pictures, expected):
    stages = {"eyes": ["vision"], "in": ["embed"], "rest": ["attention", "ffn", "head"]}
    backends = {"eyes": "reference", "in": "cpu", "rest": "reference"}
    roles = {name: {"stages": s, "backend": backends[name]} for name, s in stages.items()}
    config = {"version": 1, "model": str(seeing), "roles": roles, "runtime": {"dtype": "fp32"}}
    ids = [20, IM_PATCH, 30]
    with load(config) as engine:
        done = engine.generate(
            ids, SamplingParams(max_tokens=2, **ALL), images=[pictures((50, 40))]
        )
    assert_agrees(done, ids, [pictures((50, 40))], expected)
