"""From what a caller gives to tokens and pixels, by the checkpoint's tokenizer and constants."""

from __future__ import annotations

from collections.abc import Sequence

from PIL import Image

from step3_hetero.errors import RequestError
from step3_hetero.model.config import ModelConfig
from step3_hetero.model.image import FeatureRows, ImageConfig, open_image
from step3_hetero.model.prompt import ImageSetup, Prompt, build_prompt, user_message
from step3_hetero.model.tokenizer import Tokenizer
from step3_hetero.runtime.request import ImageLike, PromptLike


class Prompter:
    """Builds prompts for one model and knows which tokens end an answer or may not be chosen."""

    def __init__(
        self, model: ModelConfig, tokenizer: Tokenizer | None, images: ImageConfig
    ) -> None:
        self.tokenizer = tokenizer
        self._vocab = model.text.vocab_size
        self._setup = _image_setup(model, images)

        own = tokenizer.eos_id if tokenizer else None
        self.stop_ids = frozenset(model.text.eos_token_ids) | ({own} if own is not None else set())

    @property
    def banned_id(self) -> int:
        """Return the image token, which is never sampled; -1 for a text model."""
        return self._setup.image_token_id if self._setup else -1

    def build(self, prompt: PromptLike, images: Sequence[ImageLike]) -> Prompt:
        """Return tokens and pixels of a question (in the chat template) or of token ids.

        Raises:
            RequestError: text without a tokenizer, a token outside the vocabulary, a broken image,
                images that do not match the image tokens.
        """
        opened = [_opened(image) for image in images]
        turn = [user_message(prompt, len(opened))] if isinstance(prompt, str) else prompt
        built = build_prompt(self.tokenizer, turn, opened, vision=self._setup)
        for place, token in enumerate(built.token_ids):
            if not 0 <= token < self._vocab:
                raise RequestError(
                    f"token {token} at place {place} is outside the vocabulary; allowed: 0 to "
                    f"{self._vocab - 1}"
                )
        return built


def _image_setup(model: ModelConfig, images: ImageConfig) -> ImageSetup | None:
    if model.vision is None or model.image_token_id is None:
        return None
    rows = FeatureRows.of(images, model.vision.patch_size, model.projector_stride)
    return ImageSetup(images, rows, model.image_token_id)


def _opened(image: ImageLike) -> Image.Image:
    return image if isinstance(image, Image.Image) else open_image(image)
