import numpy as np
import pytest
from PIL import Image
from tokenizers import Tokenizer as Library
from tokenizers import models, pre_tokenizers

from step3_hetero.errors import ConfigError, RequestError
from step3_hetero.model.image import FeatureRows, ImageConfig, ImageViews, image_tokens
from step3_hetero.model.prompt import (
    ImageSetup,
    ImageTokenIds,
    Prompt,
    build_prompt,
    expand_images,
    user_message,
)
from step3_hetero.model.tokenizer import Tokenizer

PATCH, IM, END, CROP, DONE, LINE = range(6)
NAMES = ["<im_patch>", "<im_start>", "<im_end>", "<patch_start>", "<patch_end>", "<patch_newline>"]
SPECIAL = ImageTokenIds(PATCH, IM, END, CROP, DONE, LINE)
ROWS = FeatureRows(view=3, crop=2)
SETUP = ImageSetup(ImageConfig(image_size=8, crop_size=8), ROWS, image_token_id=PATCH)
WORDS = ["<unk>", "what", "is", "this"]
PICTURE = Image.new("RGB", (8, 8))
WIDE = Image.new("RGB", (16, 8))  # two crops side by side


@pytest.fixture
def read(tmp_path):
    """Reads a small tokenizer of words that has some special tokens, all by default."""

    def read(special=NAMES) -> Tokenizer:
        vocab = {word: number for number, word in enumerate([*special, *WORDS])}
        library = Library(models.WordLevel(vocab, unk_token="<unk>"))
        library.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
        library.add_special_tokens(list(special))
        library.save(str(tmp_path / "tokenizer.json"))
        return Tokenizer.read(tmp_path)

    return read


def views(*newline_after) -> ImageViews:
    crops = np.zeros((len(newline_after), 3, 8, 8), np.float32)
    return ImageViews(np.zeros((3, 8, 8), np.float32), crops, newline_after)


# The tokens of an image


def test_a_picture_without_crops_is_a_bracketed_view():
    got = expand_images([7, PATCH, 8], [views()], SPECIAL, ROWS)
    assert got.token_ids == (7, IM, PATCH, PATCH, PATCH, END, 8)
    assert got.images[0].positions == (2, 3, 4)


def test_crops_come_first_with_a_line_end_after_every_row_but_the_last():
    got = expand_images([PATCH], [views(False, True, False, False)], SPECIAL, ROWS)
    crop = (CROP, PATCH, PATCH, DONE)
    assert got.token_ids == (*crop, *crop, LINE, *crop, *crop, IM, PATCH, PATCH, PATCH, END)


def test_positions_are_the_feature_rows_in_order_and_only_those():
    images = [views(True, False), views()]
    got = expand_images([7, PATCH, 8, PATCH, 9], images, SPECIAL, ROWS)
    places = [i for i, token in enumerate(got.token_ids) if token == PATCH]
    assert [*got.images[0].positions, *got.images[1].positions] == places
    assert [len(image.positions) for image in got.images] == [2 * 2 + 3, 3]
    assert [image.views for image in got.images] == images


@pytest.mark.parametrize("line_ends", [(), (False,), (True, False), (False, True, False, False)])
def test_an_image_takes_as_many_tokens_as_the_count_says(line_ends):
    got = expand_images([PATCH], [views(*line_ends)], SPECIAL, ROWS)
    assert len(got.token_ids) == image_tokens(ROWS.view, ROWS.crop, views(*line_ends))


@pytest.mark.parametrize(
    "ids, images, message",
    [
        ([7], 1, r"0 <im_patch> tokens \(id 0\) in the prompt, but 1 image given"),
        ([PATCH], 0, "1 <im_patch> token .* 0 images given"),
        ([PATCH, 7, PATCH], 1, "2 <im_patch> tokens .* 1 image given"),
    ],
)
def test_another_number_of_places_than_images_is_refused_with_both(ids, images, message):
    with pytest.raises(RequestError, match=message):
        expand_images(ids, [views()] * images, SPECIAL, ROWS)


# The special tokens


def test_special_tokens_are_found_by_their_names(read):
    assert ImageTokenIds.of(read(), image_token_id=PATCH) == SPECIAL


def test_missing_special_tokens_are_named(read):
    with pytest.raises(ConfigError, match=r"tokenizer.json: no token <im_end>, <patch_newline>;"):
        ImageTokenIds.of(read([n for n in NAMES if n not in ("<im_end>", "<patch_newline>")]))


def test_a_tokenizer_that_disagrees_with_the_models_config_is_refused_with_both_ids(read):
    with pytest.raises(ConfigError, match=r"<im_patch> is token 0, .* image_token_id 128001"):
        ImageTokenIds.of(read(), image_token_id=128001)


# Whole prompts


def test_a_text_is_taken_as_it_stands(read):
    tokenizer = read()
    assert build_prompt(tokenizer, "what is this") == Prompt((7, 8, 9))


def test_raw_ids_are_taken_as_they_are_without_a_tokenizer():
    assert build_prompt(None, np.array([5, 9], np.int32)) == Prompt((5, 9))
    assert build_prompt(None, [5, 9], vision=SETUP) == Prompt((5, 9))


def test_an_image_in_a_text_is_preprocessed_and_placed(read):
    got = build_prompt(read(), "what <im_patch>", [WIDE], vision=SETUP)
    assert got.token_ids[:6] == (7, CROP, PATCH, PATCH, DONE, CROP)
    assert got.images[0].views.crops.shape == (2, 3, 8, 8)
    assert got.images[0].positions == (2, 3, 6, 7, 10, 11, 12)


def test_images_of_a_conversation_stand_where_its_parts_say(read):
    turn = {
        "role": "user",
        "content": [
            {"type": "text", "text": " what "},
            {"type": "image_url", "image_url": {"url": "data:"}},
            {"type": "text", "text": " is "},
            {"type": "image"},
        ],
    }
    got = build_prompt(read(), [turn], [PICTURE, PICTURE], vision=SETUP)
    what, is_ = got.token_ids.index(7), got.token_ids.index(8)
    first, second = (image.positions for image in got.images)
    assert what < first[0] < first[-1] < is_ < second[0]


def test_a_users_message_shows_its_images_before_the_text(read):
    got = build_prompt(read(), [user_message(" what", images=2)], [PICTURE] * 2, vision=SETUP)
    assert got.images[1].positions[-1] < got.token_ids.index(7)
    assert user_message("what") == {"role": "user", "content": [{"type": "text", "text": "what"}]}


def test_a_text_without_images_needs_no_special_tokens(read):
    assert build_prompt(read(special=[]), "what", vision=SETUP) == Prompt((1,))


def test_the_image_token_in_raw_ids_without_an_image_is_refused():
    with pytest.raises(RequestError, match=r"1 <im_patch> token .* 0 images given"):
        build_prompt(None, [7, PATCH], vision=SETUP)


def test_images_without_a_tokenizer_are_refused_with_what_is_missing():
    with pytest.raises(RequestError, match=r"1 image given, .* no tokenizer\.json"):
        build_prompt(None, [PATCH], [PICTURE], vision=SETUP)


def test_images_for_a_model_without_vision_are_refused_with_their_number(read):
    with pytest.raises(RequestError, match="2 images given to a model without vision"):
        build_prompt(read(), "<im_patch> <im_patch>", [PICTURE] * 2)


def test_images_for_a_tokenizer_without_their_tokens_are_a_config_error(read):
    with pytest.raises(ConfigError, match="no token <im_start>"):
        build_prompt(read(["<im_patch>"]), "<im_patch>", [PICTURE], vision=SETUP)


@pytest.mark.parametrize("prompt", ["what", [{"role": "user", "content": "what"}]])
def test_text_without_a_tokenizer_is_refused(prompt):
    with pytest.raises(RequestError, match=r"needs tokenizer\.json.* give token ids"):
        build_prompt(None, prompt)


@pytest.mark.parametrize("prompt", ["", "  ", []])
def test_an_empty_prompt_is_refused(read, prompt):
    with pytest.raises(RequestError, match=r"is empty"):
        build_prompt(read(), prompt)


@pytest.mark.parametrize("value", [-1, True, 1.5, "what", None])
def test_what_is_no_token_id_is_refused_with_place_and_value(value):
    with pytest.raises(RequestError, match=f"token {value!r} at place 1 is no token id"):
        build_prompt(None, [4, value])


@pytest.mark.parametrize(
    "message, refusal",
    [
        ({"content": "what"}, r"messages\[0\].role: expected a text, found None"),
        ({"role": "user"}, r"messages\[0\].content: expected a text or a list, found None"),
        ({"role": "user", "content": ["a"]}, r"content\[0\]: expected an object .* found 'a'"),
        ({"role": "user", "content": [{"type": "audio"}]}, r"content\[0\].type: 'audio' .* image"),
        ({"role": "user", "content": [{"type": "text"}]}, r"content\[0\].text: .* found None"),
    ],
)
def test_a_malformed_message_is_refused_with_its_place(read, message, refusal):
    with pytest.raises(RequestError, match=refusal):
        build_prompt(read(), [message])


def test_a_conversation_with_something_else_in_it_is_refused_with_its_place(read):
    with pytest.raises(
        RequestError, match=r"messages\[1\]: expected a role and a content, found 7"
    ):
        build_prompt(read(), [user_message("what"), 7])
