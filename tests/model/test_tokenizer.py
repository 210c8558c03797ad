import json
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer as Library
from tokenizers import decoders, models, pre_tokenizers, processors

from step3_hetero.errors import CheckpointError, ConfigError, RequestError
from step3_hetero.model.tokenizer import Detokeniser, Tokenizer

SPECIAL = ["<bos>", "<eos>", "<|BOT|>", "<|EOT|>", "<im_patch>"]
TINY = Path(__file__).parents[2] / "models" / "tiny-step3-digits"
QUESTION = [{"role": "user", "content": "<im_patch>Which digit?"}]


def byte_level() -> Library:
    """One token for each byte, as in the release's alphabet, and a few merges."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = ["he", "ll", "hell"]
    vocab = {piece: number for number, piece in enumerate(alphabet + words)}
    library = Library(models.BPE(vocab, [("h", "e"), ("l", "l"), ("he", "ll")]))
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    library.decoder = decoders.ByteLevel()
    library.add_special_tokens(SPECIAL)
    return library


def word_level() -> Library:
    """Words and single digits, with a decoder that puts spaces between tokens."""
    words = ["<unk>", "the", "sum", "is", "do", "not", ".", *"0123456789"]
    library = Library(models.WordLevel({w: n for n, w in enumerate(words)}, unk_token="<unk>"))
    library.pre_tokenizer = pre_tokenizers.Whitespace()
    library.decoder = decoders.WordPiece(prefix="##", cleanup=False)
    library.add_special_tokens(SPECIAL)
    return library


def metaspace() -> Library:
    """Words that carry their space in front; the decoder drops a leading one."""
    words = ["▁", "▁the", "▁sum", "s", "."]
    library = Library(models.WordLevel({w: n for n, w in enumerate(words)}, unk_token="▁"))
    library.decoder = decoders.Metaspace()
    library.add_special_tokens(SPECIAL)
    return library


LIBRARIES = {"byte_level": byte_level, "word_level": word_level, "metaspace": metaspace}


@pytest.fixture
def folder(tmp_path):
    byte_level().save(str(tmp_path / "tokenizer.json"))
    return tmp_path


def config(folder, **keys):
    (folder / "tokenizer_config.json").write_text(json.dumps(keys, indent=1))
    return folder


# Text and ids


def test_a_folder_without_tokenizer_json_has_no_tokenizer(tmp_path):
    assert Tokenizer.read(tmp_path) is None


@pytest.mark.parametrize("text", ["hello", "  two  spaces\n", "naïve 你好 👩‍🚀", "", "\x00"])
def test_text_comes_back_from_its_ids(folder, text):
    tokenizer = Tokenizer.read(folder)
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_special_tokens_in_a_text_are_recognised_and_none_is_added(tmp_path):
    library = byte_level()
    library.post_processor = processors.TemplateProcessing(
        single="<bos> $A", special_tokens=[("<bos>", library.token_to_id("<bos>"))]
    )
    library.save(str(tmp_path / "tokenizer.json"))
    tokenizer = Tokenizer.read(config(tmp_path, bos_token="<bos>", add_bos_token=True))
    patch = tokenizer.token_id("<im_patch>")
    assert tokenizer.encode("hell<im_patch>") == [tokenizer.token_id("hell"), patch]


def test_special_tokens_are_silent_in_text_unless_asked_for(folder):
    tokenizer = Tokenizer.read(folder)
    ids = tokenizer.encode("he<eos>")
    assert tokenizer.decode(ids) == "he"
    assert tokenizer.decode(ids, skip_special=False) == "he<eos>"


def test_an_unknown_token_has_no_id_and_an_id_of_padding_no_text(folder):
    tokenizer = Tokenizer.read(folder)
    assert tokenizer.token_id("<nowhere>") is None
    assert tokenizer.decode([tokenizer.vocab_size, tokenizer.token_id("he")]) == "he"


def test_padding_and_truncation_that_a_file_asks_for_are_not_done(tmp_path):
    library = byte_level()
    library.enable_truncation(2)
    library.enable_padding(length=50)
    library.save(str(tmp_path / "tokenizer.json"))
    assert len(Tokenizer.read(tmp_path).encode("abcdef")) == 6


def test_half_a_surrogate_pair_is_refused(folder):
    with pytest.raises(RequestError, match="cannot be encoded"):
        Tokenizer.read(folder).encode("\ud800")


# Files that are wrong


@pytest.mark.parametrize("text", ["", "{", "[]", '{"version": "1.0"}', "\x00\x01"])
def test_a_damaged_tokenizer_json_is_refused_by_name(tmp_path, text):
    (tmp_path / "tokenizer.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"tokenizer\.json: no tokenizer"):
        Tokenizer.read(tmp_path)


def test_a_tokenizer_config_that_is_no_json_is_refused_with_its_line(folder):
    (folder / "tokenizer_config.json").write_text("{\n,")
    with pytest.raises(ConfigError, match=r"tokenizer_config\.json:2: not JSON"):
        Tokenizer.read(folder)


@pytest.mark.parametrize(
    "keys, message",
    [
        ({"eos_token": 3}, "eos_token: expected a token's text, found 3"),
        ({"eos_token": {"content": [1]}}, "eos_token: expected a token's text"),
        ({"bos_token": "<s>"}, "bos_token: '<s>' is not in tokenizer.json"),
        ({"chat_template": [1]}, "chat_template: expected one text, found list"),
        ({"chat_template": "{% if %}"}, "chat_template: line 1: "),
    ],
)
def test_a_wrong_key_is_refused_with_file_and_key(folder, keys, message):
    with pytest.raises(ConfigError) as refusal:
        Tokenizer.read(config(folder, **keys))
    assert "tokenizer_config.json:" in str(refusal.value)
    assert message in str(refusal.value)


# Beginning and end


def test_bos_and_eos_are_read_as_text_or_as_an_object(folder):
    read = Tokenizer.read(config(folder, bos_token="<bos>", eos_token={"content": "<eos>"}))
    assert (read.bos, read.eos) == ("<bos>", "<eos>")
    assert (read.bos_id, read.eos_id) == (read.token_id("<bos>"), read.token_id("<eos>"))


def test_bos_and_eos_are_none_where_no_file_names_them(folder):
    for tokenizer in (Tokenizer.read(folder), Tokenizer.read(config(folder, bos_token=None))):
        assert (tokenizer.bos, tokenizer.eos) == (None, None)
        assert (tokenizer.bos_id, tokenizer.eos_id) == (None, None)


# Streams


@pytest.mark.parametrize("skip_special", [True, False])
@pytest.mark.parametrize("kind", LIBRARIES)
def test_a_stream_joins_to_the_text_of_all_its_ids(tmp_path, kind, skip_special):
    LIBRARIES[kind]().save(str(tmp_path / "tokenizer.json"))
    tokenizer, rng = Tokenizer.read(tmp_path), np.random.default_rng(5)
    for _ in range(100):
        ids = rng.integers(0, tokenizer.vocab_size + 2, rng.integers(0, 30)).tolist()
        stream = Detokeniser(tokenizer, skip_special=skip_special)
        pieces = [stream.add(number) for number in ids] + [stream.flush()]
        assert "".join(pieces) == tokenizer.decode(ids, skip_special=skip_special), ids


def test_a_character_is_told_when_its_last_byte_arrives(folder):
    tokenizer = Tokenizer.read(folder)
    stream = Detokeniser(tokenizer)
    pieces = [stream.add(number) for number in tokenizer.encode("a你b")]
    assert pieces == ["a", "", "", "你", "b"]
    assert stream.flush() == ""


def test_an_unfinished_character_is_told_at_the_end(folder):
    tokenizer = Tokenizer.read(folder)
    stream = Detokeniser(tokenizer)
    ids = tokenizer.encode("a你")[:-1]
    assert [stream.add(number) for number in ids] == ["a", "", ""]
    assert stream.flush() == "\N{REPLACEMENT CHARACTER}"
    assert stream.flush() == ""


def test_a_long_stream_decodes_only_its_last_piece_again(folder):
    tokenizer = Tokenizer.read(folder)
    lengths = []

    class Counting(Detokeniser):
        def _decode(self, ids):
            lengths.append(len(ids))
            return super()._decode(ids)

    stream = Counting(tokenizer)
    for number in tokenizer.encode("hello 你好 " * 50):
        stream.add(number)
    assert max(lengths) <= 8


# Conversations


def test_the_default_template_is_the_published_prompt(folder):
    tokenizer = Tokenizer.read(config(folder, bos_token="<bos>"))
    assert tokenizer.chat(QUESTION) == (
        "<bos> You are a helpful assistant. <|BOT|>user\n <im_patch>Which digit? <|EOT|>"
        "<|BOT|>assistant\n<think>\n"
    )


def test_the_default_template_takes_a_system_message_and_earlier_turns(folder):
    turns = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "A"},
        {"role": "assistant", "content": "B"},
    ]
    text = Tokenizer.read(folder).chat(turns, add_generation_prompt=False)
    assert text == " Be brief. <|BOT|>user\n A <|EOT|><|BOT|>assistant\n B <|EOT|>"


def test_a_template_of_its_own_file_goes_before_the_configs(folder):
    config(folder, chat_template="from the config")
    assert Tokenizer.read(folder).chat(QUESTION) == "from the config"
    (folder / "chat_template.jinja").write_text("from the file")
    assert Tokenizer.read(folder).chat(QUESTION) == "from the file"


def test_templates_render_with_the_options_that_published_ones_expect(folder):
    template = (
        "  {% for m in messages %}\n{{ m | tojson }}\n{% break %}\n  {% endfor %}\n{{ eos_token }}"
    )
    tokenizer = Tokenizer.read(config(folder, eos_token="<eos>", chat_template=template))
    assert tokenizer.chat([{"role": "<é>"}, {}]) == '{"role": "<é>"}\n<eos>'


def test_a_templates_own_refusal_reaches_the_caller(folder):
    template = "{{ raise_exception('roles must alternate') }}"
    tokenizer = Tokenizer.read(config(folder, chat_template=template))
    with pytest.raises(RequestError, match="cannot render the conversation: roles must alternate"):
        tokenizer.chat(QUESTION)


@pytest.mark.parametrize(
    "template", ["{{ messages.append(1) }}", "{{ ''.__class__.__mro__ }}", "{{ none + 'a' }}"]
)
def test_a_template_can_neither_reach_out_of_the_sandbox_nor_crash_the_caller(folder, template):
    tokenizer = Tokenizer.read(config(folder, chat_template=template))
    with pytest.raises(RequestError, match="chat_template cannot render the conversation: "):
        tokenizer.chat(QUESTION)


@pytest.mark.parametrize("template", ["{" * 20_000, "{{" + "(" * 5_000 + "1" + ")" * 5_000 + "}}"])
def test_a_template_nested_without_end_is_refused_by_its_source(folder, template):
    with pytest.raises(ConfigError, match="chat_template: nested too deeply"):
        Tokenizer.read(config(folder, chat_template=template))


@pytest.mark.skipif(not (TINY / "tokenizer.json").exists(), reason="no tiny model in this checkout")
def test_the_tiny_models_question_has_one_place_for_its_image():
    tokenizer = Tokenizer.read(TINY)
    ids = tokenizer.encode(tokenizer.chat(QUESTION))
    assert ids[0] == tokenizer.bos_id
    assert ids.count(tokenizer.token_id("<im_patch>")) == 1
