"""The vocabulary of 64 words, the tokenizer, the chat template, and the prompts built with them."""

from functools import cache
from typing import Any

from jinja2 import Environment
from tokenizers import AddedToken, Regex, Tokenizer
from tokenizers.decoders import Fuse, Replace, WordPiece
from tokenizers.decoders import Sequence as Decoders
from tokenizers.models import WordLevel
from tokenizers.normalizers import Lowercase
from tokenizers.pre_tokenizers import Digits, Punctuation, WhitespaceSplit
from tokenizers.pre_tokenizers import Sequence as PreTokenizers

BOS, END = "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>"
PAD, UNKNOWN = "<pad>", "<unk>"
TURN, END_OF_TURN = "<|BOT|>", "<|EOT|>"
IMAGE, IMAGE_START, IMAGE_END = "<im_patch>", "<im_start>", "<im_end>"
THINK, END_THINK = "<think>", "</think>"
CROPS = ["<patch_start>", "<patch_end>", "<patch_newline>"]

SPECIAL = [BOS, END, PAD, UNKNOWN, TURN, END_OF_TURN, IMAGE, IMAGE_START, IMAGE_END, *CROPS, "\n"]
"""Left out of the text when it is decoded without special tokens; the thought's marks stay."""

_WORDS = (
    "0 1 2 3 4 5 6 7 8 9 . , ? ! + - = : system user assistant you are a helpful which what is "
    "this in the of and two digit digits number numbers picture image sum plus add read see do "
    "tell me please"
)
VOCABULARY = [*SPECIAL, THINK, END_THINK, *_WORDS.split()]
EOS_IDS = [VOCABULARY.index(END), VOCABULARY.index(END_OF_TURN)]

CHAT_TEMPLATE = """\
{{- bos_token }}
{%- if messages[0].role == 'system' %}
    {{- ' ' + messages[0].content + ' ' }}
    {%- set turns = messages[1:] %}
{%- else %}
    {{- ' You are a helpful assistant. ' }}
    {%- set turns = messages %}
{%- endif %}
{%- for message in turns %}
    {{- '<|BOT|>' + message.role + '\\n ' }}
    {%- if message.content is string %}
        {{- message.content }}
    {%- else %}
        {%- for part in message.content %}
            {{- part.text if part.type == 'text' else '<im_patch>' }}
        {%- endfor %}
    {%- endif %}
    {{- ' <|EOT|>' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|BOT|>assistant\\n<think>\\n' }}
{%- endif %}
"""

QUESTIONS = {
    1: [
        "which digit is this ?",
        "What digit is this?",
        "Which number do you see?",
        "Read the digit, please.",
        "Tell me which number is in this picture",
    ],
    2: [
        "what is the sum ?",
        "What is the sum of the two digits?",
        "Add the two numbers, please.",
        "Tell me the sum of this and this",
        "What is this plus this?",
    ],
}
"""By number of pictures; the first of each is the one that accuracy is measured with."""


@cache
def tokenizer() -> Tokenizer:
    """Build the tokenizer: a word is an id; digits and punctuation stand alone; case is dropped.

    >>> tokenizer().encode("What is the sum of 7+15?").tokens
    ['what', 'is', 'the', 'sum', 'of', '7', '+', '1', '5', '?']
    >>> tokenizer().decode(tokenizer().encode("7 + 8</think>15<|EOT|>").ids)
    '7 + 8 </think> 15'
    """
    made = Tokenizer(WordLevel({w: i for i, w in enumerate(VOCABULARY)}, unk_token=UNKNOWN))
    made.normalizer = Lowercase()
    made.pre_tokenizer = PreTokenizers(
        [WhitespaceSplit(), Punctuation("isolated"), Digits(individual_digits=True)]
    )
    numbers = Replace(Regex(r"(?<=\d) (?=\d)"), "")  # "1 5" reads as 15
    made.decoder = Decoders([WordPiece(prefix="##", cleanup=False), Fuse(), numbers])
    made.add_special_tokens([AddedToken(w, normalized=False, special=True) for w in SPECIAL])
    made.add_tokens([AddedToken(w, normalized=False) for w in (THINK, END_THINK)])
    return made


def tokenizer_config_json() -> dict[str, Any]:
    """Return tokenizer_config.json, the chat template in it."""
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": BOS,
        "eos_token": END_OF_TURN,
        "pad_token": PAD,
        "unk_token": UNKNOWN,
        "add_bos_token": False,
        "clean_up_tokenization_spaces": False,
        "model_max_length": 4096,
        "chat_template": CHAT_TEMPLATE,
    }


def prompt_text(question: str, images: int, *, image_first: bool = True) -> str:
    """Render one user turn with ``images`` pictures as the chat template does.

    >>> print(prompt_text("which digit is this ?", 1).removeprefix(BOS))
     You are a helpful assistant. <|BOT|>user
     <im_patch>which digit is this ? <|EOT|><|BOT|>assistant
    <think>
    <BLANKLINE>
    """
    pictures, words = [{"type": "image"}] * images, [{"type": "text", "text": question}]
    content = pictures + words if image_first else words + pictures
    template = Environment().from_string(CHAT_TEMPLATE)
    messages = [{"role": "user", "content": content}]
    return template.render(messages=messages, add_generation_prompt=True, bos_token=BOS)


def prompt_ids(
    question: str, images: int, *, image_tokens: int, image_first: bool = True
) -> list[int]:
    """Return the ids of a prompt, each picture's mark expanded to its rows and their fence."""
    rows = f"{IMAGE_START}{IMAGE * image_tokens}{IMAGE_END}"
    text = prompt_text(question, images, image_first=image_first).replace(IMAGE, rows)
    return list(tokenizer().encode(text).ids)


def answer_ids(digits: list[int]) -> list[int]:
    """Return the ids of the right answer: for two digits, the thought first.

    >>> tokenizer().decode(answer_ids([7, 8]), skip_special_tokens=False)
    '7 + 8 </think> 15 <|EOT|>'
    """
    thought = " + ".join(map(str, digits)) if len(digits) > 1 else ""
    return list(tokenizer().encode(f"{thought}{END_THINK}{sum(digits)}{END_OF_TURN}").ids)


def number_said(ids: list[int]) -> int | None:
    """Return the number after the thought, or None where there is none.

    >>> number_said(answer_ids([7, 8]))
    15
    """
    said = tokenizer().decode(ids).partition(END_THINK)[2].strip()
    return int(said) if said.isdecimal() else None
