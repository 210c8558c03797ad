"""Requests, images and calls that will not do: one line on stderr, exit code 2, no more."""

import io
import re
import struct
import subprocess
import sys
import zlib

import pytest
from PIL import Image

MAIN = "from step3_hetero.cli import main; main()"
ASK = ("--prompt", "which digit is this ?")

REQUESTS = {
    "neither": ((), "give either --prompt or --prompt-ids"),
    "both": ((*ASK, "--prompt-ids", "1"), "give either --prompt or --prompt-ids"),
    "no numbers": (("--prompt-ids", "1,x"), "'1,x' refused; allowed: whole numbers with commas"),
    "no ids": (("--prompt-ids", ""), "'' refused"),
    "endless id": (("--prompt-ids", "9" * 5000), "refused; allowed: whole numbers"),
    "id of the vocabulary's size": (("--prompt-ids", "5,64"), "token 64 at place 1 .* 0 to 63"),
    "negative id": (
        ("--prompt-ids=-1",),
        "token -1 at place 0 is no token id; allowed: whole numbers from 0",
    ),
    "image token, no image": (("--prompt-ids", "1,6,2"), r"1 <im_patch> token .* but 0 images"),
    "image token in text": (("--prompt", "<im_patch>"), r"1 <im_patch> token .* but 0 images"),
    "over the context": (("--prompt", "sum " * 5000), "tokens, the model's context is 4096"),
    "no tokens": (
        (*ASK, "--max-tokens", "0"),
        "max_tokens: 0 refused; allowed: a whole number, at least 1",
    ),
    "temperature": ((*ASK, "--temperature", "nan"), "temperature: nan refused; allowed: 0"),
    "top_p": ((*ASK, "--top-p", "1.5"), "top_p: 1.5 refused; allowed: over 0"),
    "top_k": ((*ASK, "--top-k", "-2"), "top_k: -2 refused"),
    "seed": ((*ASK, "--seed", "-1"), "seed: -1 refused"),
    "stop": ((*ASK, "--stop", ""), "stop: .*allowed: a tuple of strings that are not empty"),
    "logprobs": ((*ASK, "--logprobs", "-1"), "logprobs: -1 refused"),
    "missing image": ((*ASK, "--image", "none.png"), "none.png: cannot be read: .*No such file"),
}


@pytest.mark.parametrize("what", REQUESTS)
def test_request_that_cannot_be_served_is_refused(what, digits, refuse):
    arguments, words = REQUESTS[what]
    assert re.search(words, refuse("generate", digits, *arguments))


def test_image_for_a_text_model_is_refused(model, config, seven, refuse):
    found = refuse("generate", config(model), "--prompt-ids", "1", "--image", seven)
    assert "1 image given to a model without vision" in found


def test_text_without_a_tokenizer_is_refused(model, config, refuse):
    assert "give token ids instead" in refuse("generate", config(model), *ASK)


def png(width, height):
    """Return a PNG file that says it is of this size, with a few bytes of pixels."""

    def chunk(kind, data):
        return (
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        )

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    pixels = chunk(b"IDAT", zlib.compress(bytes(1000)))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + pixels + chunk(b"IEND", b"")


def picture(width, height, **options):
    file = io.BytesIO()
    Image.new("RGB", (width, height)).save(file, "PNG", **options)
    return file.getvalue()


IMAGES = {
    "empty file": (b"", "no picture of a known format; known: PNG, JPEG"),
    "text": (b"which digit is this ?", "no picture of a known format"),
    "cut short": (picture(400, 300)[:-100], "cannot be read|truncated"),
    "decompression bomb": (png(60000, 60000), "too large, limit 67108864 pixels"),
    "just over the limit": (png(8193, 8192), "8193x8192 is too large, limit 67108864 pixels"),
    "no width": (png(0, 20), "holds no pixels|no picture|cannot be read"),
    "too thin": (picture(3000, 9), "too thin"),
}


@pytest.mark.parametrize("what", IMAGES)
@pytest.mark.filterwarnings("default")  # as a shell calls it: a warning must not be what refuses
def test_image_that_cannot_be_used_is_refused(what, digits, tmp_path, refuse):
    data, words = IMAGES[what]
    (tmp_path / "picture.png").write_bytes(data)
    found = refuse("generate", digits, *ASK, "--image", tmp_path / "picture.png")
    assert re.search(words, found)
    assert "picture.png" in found or "image" in found


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("checkpoint", "inspect", "{tmp}"), "config.json: cannot be read"),
        (("checkpoint", "inspect", "{tmp}/none"), "none/config.json: cannot be read"),
        (("checkpoint", "inspect", "{digits}"), "is a file"),
        (("checkpoint", "quantise", "{tiny}", "{tmp}"), "exists already; name a new folder"),
        (("checkpoint", "quantise", "{tiny}", "{tmp}/no/fp8"), "cannot be written"),
        (("graph", "{digits}", "--svg", "{tmp}/no/g.svg"), "--svg: .* cannot be written: No such"),
        (("graph", "{digits}", "--svg", "{tmp}"), "is a directory"),
        (("eval", "digits", "{step3}"), "'step3' is a family without weights"),
        (("generate", "{step3}", "--prompt-ids", "1"), "'step3' is a family without weights"),
        (("eval", "digits", "{digits}", "--ablate", "ffn"), "'ffn' is not one of"),
        (("eval", "digits", "{digits}", "--limit", "0"), "0 is not in the range"),
    ],
    ids=lambda value: " ".join(value)[:60] if isinstance(value, tuple) else None,
)
def test_path_that_will_not_do_is_refused(arguments, words, digits, tmp_path, refuse):
    known = {
        "tmp": tmp_path,
        "digits": digits,
        "step3": digits.with_name("step3.yaml"),
        "tiny": digits.parents[1] / "models" / "tiny-step3-digits",
    }
    assert re.search(words, refuse(*(a.format(**known) for a in arguments)))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("frob",), "No such command 'frob'; see step3-hetero --help"),
        (("check",), "Missing argument 'CONFIG'; see step3-hetero check --help"),
        (("check", "x", "--frob"), "No such option.*--frob"),
        (("generate", "x", "--max-tokens", "many"), "'many' is not a valid integer"),
        (("checkpoint", "frob"), "No such command 'frob'; see step3-hetero checkpoint --help"),
    ],
)
def test_wrong_usage_is_one_line_too(arguments, words, refuse):
    assert re.search(words, refuse(*arguments))


@pytest.mark.parametrize("arguments", [(), ("checkpoint",), ("eval",)], ids=str)
def test_half_a_command_shows_what_there_is(arguments, run):
    ran = run(*arguments)
    assert (ran.code, ran.out) == (2, "")
    assert "Commands:" in ran.err


def test_debug_shows_the_traceback_and_the_line(run):
    ran = run("--debug", "check", "none.yaml")
    assert ran.code == 2
    assert "Traceback" in ran.err and "FileNotFoundError" in ran.err
    assert ran.err.splitlines()[-1].startswith("error: none.yaml: cannot be read")


def test_debug_as_somebodys_words_is_not_the_option(digits, refuse):
    assert "max_tokens" in refuse("generate", digits, "--prompt=--debug", "--max-tokens", "0")


def shell(*arguments, **options):
    return subprocess.run(
        [sys.executable, "-c", MAIN, *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=120,
        **options,
    )


@pytest.mark.parametrize(
    "arguments",
    [("check", "none.yaml"), ("frob",), ("generate", "{digits}", "--prompt-ids", "64")],
    ids=str,
)
def test_a_shell_sees_the_line_and_the_code(arguments, digits, tmp_path):
    ran = shell(*(a.format(digits=digits) for a in arguments), cwd=tmp_path)
    assert (ran.returncode, ran.stdout) == (2, "")
    assert re.fullmatch(r"error: [^\n]+\n", ran.stderr)


def test_a_bomb_is_refused_before_it_is_unpacked(digits, tmp_path):
    (tmp_path / "bomb.png").write_bytes(png(60000, 60000))
    ran = shell("generate", digits, *ASK, "--image", tmp_path / "bomb.png")
    assert (ran.returncode, ran.stdout, len(ran.stderr.splitlines())) == (2, "", 1)
