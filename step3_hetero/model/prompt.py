"""From a text, a conversation or raw ids to the ids that the model reads, images merged in.

A prompt holds one ``<im_patch>`` for each image. It grows to the image's crops and its view::

    crop         <patch_start> <im_patch> x 81 <patch_end>
    end of row   <patch_newline>, after every row of crops but the last
    view         <im_start> <im_patch> x 169 <im_end>

Each ``<im_patch>`` then stands for one feature row of the vision stage, in the same order.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from reprlib import repr as short
from typing import Any

import numpy as np
from PIL import Image

from step3_hetero.errors import ConfigError, RequestError
from step3_hetero.model.image import FeatureRows, ImageConfig, ImageViews, preprocess
from step3_hetero.model.tokenizer import FILE as TOKENIZER_FILE
from step3_hetero.model.tokenizer import Tokenizer

IMAGE_TOKEN = "<im_patch>"
IMAGE_PARTS = ("image", "image_url")

Message = Mapping[str, Any]
"""A turn: ``role``, and as ``content`` a text or a list of parts, each of a ``type``."""


@dataclass(frozen=True, slots=True)
class ImagePlacement:
    """An image and where in the prompt its feature rows go: crops first, then the view."""

    views: ImageViews
    positions: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Prompt:
    """What the model reads."""

    token_ids: tuple[int, ...]
    images: tuple[ImagePlacement, ...] = ()


@dataclass(frozen=True, slots=True)
class ImageSetup:
    """What a prompt needs to know of the model's vision part."""

    config: ImageConfig
    rows: FeatureRows
    image_token_id: int


@dataclass(frozen=True, slots=True)
class ImageTokenIds:
    """The special tokens of images; a field's name in angle brackets is its token."""

    im_patch: int
    im_start: int
    im_end: int
    patch_start: int
    patch_end: int
    patch_newline: int

    @classmethod
    def of(cls, tokenizer: Tokenizer, image_token_id: int | None = None) -> ImageTokenIds:
        """Look the tokens up; ``image_token_id`` is what the model's config calls ``<im_patch>``.

        Raises:
            ConfigError: the tokenizer lacks some of them, or disagrees with the model's config.
        """
        ids = {field.name: tokenizer.token_id(f"<{field.name}>") for field in fields(cls)}
        found = {name: number for name, number in ids.items() if number is not None}
        if missing := [f"<{name}>" for name in ids if name not in found]:
            raise ConfigError(
                f"{TOKENIZER_FILE}: no token {', '.join(missing)}; images cannot be placed without"
            )
        special = cls(**found)
        if image_token_id is not None and image_token_id != special.im_patch:
            raise ConfigError(
                f"{TOKENIZER_FILE}: {IMAGE_TOKEN} is token {special.im_patch}, but config.json "
                f"says image_token_id {image_token_id}"
            )
        return special


def build_prompt(
    tokenizer: Tokenizer | None,
    prompt: str | Sequence[int] | Sequence[Message],
    images: Sequence[Image.Image] = (),
    *,
    vision: ImageSetup | None = None,
) -> Prompt:
    """Make the model's input of a text, of raw ids or of a conversation, and its images.

    A text is taken as it stands; a conversation goes through the chat template. Both are encoded
    with special tokens recognised. Whether an id is in the model's vocabulary is not checked here.

    Raises:
        RequestError: the prompt is empty or malformed, an image is unusable, or the number of
            image tokens is not that of the images.
        ConfigError: the tokenizer lacks the special tokens of images.
    """
    ids = _token_ids(tokenizer, prompt)
    if vision is None:
        if images:
            raise RequestError(f"{_count(len(images), 'image')} given to a model without vision")
        return Prompt(tuple(ids))
    if images and tokenizer is None:
        raise RequestError(
            f"{_count(len(images), 'image')} given, but the checkpoint has no {TOKENIZER_FILE}, "
            "which names the tokens around an image; add the file"
        )
    _check_count(ids, len(images), vision.image_token_id)
    if not images or tokenizer is None:
        return Prompt(tuple(ids))
    special = ImageTokenIds.of(tokenizer, vision.image_token_id)
    views = [preprocess(image, vision.config) for image in images]
    return expand_images(ids, views, special, vision.rows)


def user_message(text: str, images: int = 0) -> Message:
    """Return a user's turn that shows some images before the text."""
    parts = [{"type": "image"}] * images
    return {"role": "user", "content": [*parts, {"type": "text", "text": text}]}


def expand_images(
    token_ids: Sequence[int],
    images: Sequence[ImageViews],
    special: ImageTokenIds,
    rows: FeatureRows,
) -> Prompt:
    """Put the tokens of each image in the place of its ``<im_patch>``.

    Raises:
        RequestError: there are more or fewer places than images.
    """
    _check_count(token_ids, len(images), special.im_patch)
    ids: list[int] = []
    placed: list[ImagePlacement] = []
    for token in token_ids:
        if token != special.im_patch:
            ids.append(token)
            continue
        views = images[len(placed)]
        tokens = image_token_ids(views, special, rows)
        positions = (len(ids) + i for i, t in enumerate(tokens) if t == special.im_patch)
        placed.append(ImagePlacement(views, tuple(positions)))
        ids += tokens
    return Prompt(tuple(ids), tuple(placed))


def image_token_ids(views: ImageViews, special: ImageTokenIds, rows: FeatureRows) -> list[int]:
    """Return the tokens that stand for one image."""
    crop = [special.patch_start, *[special.im_patch] * rows.crop, special.patch_end]
    ids: list[int] = []
    for newline in views.newline_after:
        ids += crop
        if newline:
            ids.append(special.patch_newline)
    return [*ids, special.im_start, *[special.im_patch] * rows.view, special.im_end]


def _check_count(ids: Sequence[int], images: int, image_token_id: int) -> None:
    places = list(ids).count(image_token_id)
    if places != images:
        raise RequestError(
            f"{_count(places, f'{IMAGE_TOKEN} token')} (id {image_token_id}) in the prompt, but "
            f"{_count(images, 'image')} given; each image needs exactly one"
        )


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"


def _token_ids(
    tokenizer: Tokenizer | None, prompt: str | Sequence[int] | Sequence[Message]
) -> list[int]:
    """Encode whatever form the prompt has; ids are taken as they are."""
    if isinstance(prompt, str) or any(isinstance(x, Mapping) for x in prompt):
        if tokenizer is None:
            raise RequestError(
                f"a text needs {TOKENIZER_FILE}, which the checkpoint lacks; give token ids instead"
            )
        text = prompt if isinstance(prompt, str) else tokenizer.chat(_flattened(prompt))
        ids = tokenizer.encode(text)
    else:
        ids = [_token_id(x, place) for place, x in enumerate(prompt)]
    if not ids:
        raise RequestError(f"the prompt {short(prompt)} is empty: it holds no token")
    return ids


def _token_id(value: object, place: int) -> int:
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or value < 0:
        raise RequestError(
            f"token {short(value)} at place {place} is no token id; allowed: whole numbers from 0"
        )
    return int(value)


def _flattened(messages: Sequence[object]) -> list[dict[str, Any]]:
    """Turn every content into one text, so that templates need not know of parts."""
    return [_flat_message(message, f"messages[{i}]") for i, message in enumerate(messages)]


def _flat_message(message: object, where: str) -> dict[str, Any]:
    if not isinstance(message, Mapping):
        raise RequestError(f"{where}: expected a role and a content, found {short(message)}")
    role, content = message.get("role"), message.get("content")
    if not isinstance(role, str):
        raise RequestError(f"{where}.role: expected a text, found {short(role)}")
    if isinstance(content, list):
        parts = [_flat_part(part, f"{where}.content[{i}]") for i, part in enumerate(content)]
        content = "".join(parts)
    if not isinstance(content, str):
        raise RequestError(f"{where}.content: expected a text or a list, found {short(content)}")
    return {**message, "content": content}


def _flat_part(part: object, where: str) -> str:
    if not isinstance(part, Mapping):
        raise RequestError(f"{where}: expected an object with a type, found {short(part)}")
    kind, text = part.get("type"), part.get("text")
    if kind in IMAGE_PARTS:
        return IMAGE_TOKEN
    if kind != "text":
        known = ", ".join(("text", *IMAGE_PARTS))
        raise RequestError(f"{where}.type: {short(kind)} is not known; known: {known}")
    if not isinstance(text, str):
        raise RequestError(f"{where}.text: expected a text, found {short(text)}")
    return text
