"""Text to token ids and back, and the chat template that puts a conversation into one text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from step3_hetero.errors import CheckpointError, RequestError
from step3_hetero.model.chat import ChatTemplate
from step3_hetero.model.json_section import Section

if TYPE_CHECKING:
    import tokenizers

FILE = "tokenizer.json"
CONFIG_FILE = "tokenizer_config.json"
TEMPLATE_FILE = "chat_template.jinja"

REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
"""What a decoder writes for bytes that are not, or not yet, a character."""


@dataclass(frozen=True, slots=True)
class Tokenizer:
    """A checkpoint's tokenizer; ``bos`` and ``eos`` are the texts of those tokens, if any."""

    backend: tokenizers.Tokenizer
    bos: str | None
    eos: str | None
    template: ChatTemplate

    @classmethod
    def read(cls, folder: Path) -> Tokenizer | None:
        """Read a checkpoint's tokenizer; None where there is no ``tokenizer.json``.

        Raises:
            CheckpointError: ``tokenizer.json`` is damaged.
            ConfigError: ``tokenizer_config.json`` or the chat template is wrong.
        """
        path = folder / FILE
        if not path.exists():
            return None
        backend = _backend(path)
        config = folder / CONFIG_FILE
        stated = Section.read(config) if config.exists() else Section(config, {})
        bos, eos = (_special(stated, key, backend) for key in ("bos_token", "eos_token"))
        return cls(backend, bos, eos, ChatTemplate.read(folder / TEMPLATE_FILE, stated))

    @property
    def vocab_size(self) -> int:
        """Return how many tokens there are; the model's vocabulary may be padded beyond."""
        return self.backend.get_vocab_size(with_added_tokens=True)

    @property
    def bos_id(self) -> int | None:
        """Return the id of the token that begins a text."""
        return None if self.bos is None else self.token_id(self.bos)

    @property
    def eos_id(self) -> int | None:
        """Return the id of the token that ends an answer."""
        return None if self.eos is None else self.token_id(self.eos)

    def token_id(self, token: str) -> int | None:
        """Return the id of one token, None where there is no such token."""
        return self.backend.token_to_id(token)

    def encode(self, text: str) -> list[int]:
        """Turn text into ids. Special tokens written in it are recognised; none is added.

        Raises:
            RequestError: the text holds half of a surrogate pair, which no encoding has.
        """
        try:
            return list(self.backend.encode(text, add_special_tokens=False).ids)
        except (TypeError, UnicodeEncodeError) as cause:
            raise RequestError(f"the text cannot be encoded: {cause}") from cause

    def decode(self, ids: Sequence[int], *, skip_special: bool = True) -> str:
        """Turn ids into text. Ids beyond the tokenizer's own, a model's padding, are silent."""
        return self.backend.decode(list(ids), skip_special_tokens=skip_special)

    def chat(
        self, messages: Sequence[Mapping[str, Any]], *, add_generation_prompt: bool = True
    ) -> str:
        """Put a conversation into the text that the model was trained on.

        Raises:
            RequestError: the template refuses the conversation.
        """
        return self.template.render(
            messages=messages,
            add_generation_prompt=add_generation_prompt,
            bos_token=self.bos or "",
            eos_token=self.eos or "",
        )


def _backend(path: Path) -> tokenizers.Tokenizer:
    """Load ``tokenizer.json``."""
    import tokenizers  # a tenth of a second that a config check does without

    try:
        backend = tokenizers.Tokenizer.from_file(str(path))
    except Exception as cause:  # the library raises bare Exception for whatever it cannot read
        raise CheckpointError(f"{path}: no tokenizer can be made of it: {cause}") from cause
    backend.no_padding()
    backend.no_truncation()
    return backend


def _special(stated: Section, key: str, backend: tokenizers.Tokenizer) -> str | None:
    """Read a special token's text: published files write a string or an object with ``content``."""
    value = stated.get(key)
    text = value.get("content") if isinstance(value, dict) else value
    if text is None:
        return None
    if not isinstance(text, str):
        raise stated.error(key, f"expected a token's text, found {value!r}")
    if backend.token_to_id(text) is None:
        raise stated.error(key, f"{text!r} is not in {FILE}; name one of its tokens")
    return text


class Detokeniser:
    """Turns a stream of ids into a stream of text.

    A character may take several tokens: text that ends in `REPLACEMENT` is held back until the
    next token, or `flush`. The pieces join to what `Tokenizer.decode` makes of all ids at once.
    Only the last piece is decoded again with each token, since a decoder may put a space between
    two tokens but never reaches further back.
    """

    def __init__(self, tokenizer: Tokenizer, *, skip_special: bool = True) -> None:
        self._tokenizer = tokenizer
        self._skip_special = skip_special
        self._window: list[int] = []
        self._told_ids = 0  # of the window, those whose text is out
        self._told_text = ""

    def add(self, token_id: int) -> str:
        """Take one more token and return the text it completes, often empty."""
        self._window.append(token_id)
        text = self._decode(self._window)
        if text.endswith(REPLACEMENT) or len(text) <= len(self._told_text):
            return ""
        return self._tell(text)

    def flush(self) -> str:
        """Return what was held back; call it after the last token."""
        text = self._decode(self._window)
        return self._tell(text)

    def _tell(self, text: str) -> str:
        piece = text[len(self._told_text) :]
        self._window = self._window[self._told_ids :]
        self._told_ids = len(self._window)
        self._told_text = self._decode(self._window)
        return piece

    def _decode(self, ids: list[int]) -> str:
        return self._tokenizer.decode(ids, skip_special=self._skip_special)
