"""Bad input gets one line on stderr and exit code 2; nothing is printed, nothing is written."""

import io
import json
import os
import re
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import load_file, save_file

FIRST, SECOND = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
INDEX = "model.safetensors.index.json"
MAIN = "from step3_hetero.cli import main; main()"
ASK = ("--prompt", "which digit is this ?")


def tree(folder):
    return {p: p.read_bytes() if p.is_file() else None for p in Path(folder).rglob("*")}


@pytest.fixture
def refuse(run, tmp_path):
    """Call the command line; return the one line with which it refuses."""

    def refuse(*arguments):
        before = tree(tmp_path)
        ran = run(*arguments)
        assert (ran.code, ran.out) == (2, "")
        assert re.fullmatch(r"error: [^\n]+\n", ran.err), ran.err
        assert tree(tmp_path) == before
        return ran.err

    return refuse


def cut_short(folder):
    os.truncate(folder / SECOND, (folder / SECOND).stat().st_size - 5)


def overwrite_header(folder):
    with (folder / SECOND).open("r+b") as file:
        file.write(b"\xff" * 64)


def change(folder, alter, file=FIRST):
    tensors = load_file(folder / file)
    alter(tensors)
    save_file(tensors, folder / file)


def change_json(path, alter):
    value = json.loads(path.read_text())
    alter(value)
    path.write_text(json.dumps(value))


def with_nan(tensors):
    tensors["model.embed_tokens.weight"][3, 4] = np.nan


def narrower(tensors):
    tensors["model.embed_tokens.weight"] = tensors["model.embed_tokens.weight"][:, 1:].copy()


def halved(tensors):
    tensors["model.embed_tokens.weight"] = tensors["model.embed_tokens.weight"].astype(np.float16)


def rename_every(folder):
    """Give all 23 tensors of a file a name that the model does not have."""
    tensors = load_file(folder / FIRST)
    save_file({f"x.{name}": t for name, t in tensors.items()}, folder / FIRST)
    change_json(
        folder / INDEX,
        lambda index: index.update(
            weight_map={
                (f"x.{n}" if file == FIRST else n): file for n, file in index["weight_map"].items()
            }
        ),
    )


def index_names(file):
    def alter(folder):
        change_json(folder / INDEX, lambda i: i["weight_map"].update({"lm_head.weight": file}))

    return alter


def config_says(**keys):
    return lambda folder: change_json(folder / "config.json", lambda c: c.update(keys))


def write(name, text):
    return lambda folder: (folder / name).write_text(text)


MANY_DIGITS = '{"model_type": "step3_text", "hidden_size": ' + "9" * 5000 + "}"

DAMAGE = {
    "missing shard": (lambda f: (f / SECOND).unlink(), f"1 of 2 files .* missing: {SECOND}"),
    "truncated shard": (cut_short, f"{SECOND}: damaged or cut short"),
    "corrupt shard": (overwrite_header, f"{SECOND}: damaged or cut short"),
    "empty shard": (lambda f: os.truncate(f / SECOND, 0), f"{SECOND}: damaged or cut short"),
    "wrong shape": (
        lambda f: change(f, narrower),
        r"embed_tokens\.weight \(128, 47\), expected \(128, 48\)",
    ),
    "wrong dtype": (lambda f: change(f, halved), "embed_tokens.weight F16, expected F32"),
    "missing and surplus": (
        rename_every,
        r"\d\d tensors missing: (\S+, ){9}\S+ and \d+ more; \d\d tensors that the model does not",
    ),
    "index names no file": (index_names("model-9.safetensors"), "missing: model-9.safetensors"),
    "path out of the folder": (index_names("../x.safetensors"), "'../x.safetensors'; expected the"),
    "absolute path": (index_names("/tmp/x.safetensors"), "'/tmp/x.safetensors'; expected the bare"),
    "NaN weight": (lambda f: change(f, with_nan), r"embed_tokens.weight\[3, 4\] is nan"),
    "other architecture": (
        config_says(model_type="llama", architectures=["Llama"]),
        "'Llama' is not Step-3",
    ),
    "no config": (lambda f: (f / "config.json").unlink(), "config.json: cannot be read"),
    "config of endless digits": (write("config.json", MANY_DIGITS), "config.json: cannot be read"),
    "damaged tokenizer": (write("tokenizer.json", "{"), "tokenizer.json: no tokenizer"),
    "damaged processor": (
        write("preprocessor_config.json", '{"image_size": -1}'),
        "preprocessor_config.json:1: image_size: expected a whole number from 1",
    ),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_model_is_refused_at_load(damage, model, config, refuse):
    alter, words = DAMAGE[damage]
    path = config(model)
    alter(model)
    assert re.search(words, refuse("generate", path, "--prompt-ids", "1,2,3"))


@pytest.mark.parametrize(
    "damage", ["missing shard", "truncated shard", "wrong shape", "wrong dtype", "no config"]
)
def test_damaged_model_is_refused_by_inspect_and_quantise_too(damage, model, tmp_path, refuse):
    alter, words = DAMAGE[damage]
    alter(model)
    assert re.search(words, refuse("checkpoint", "inspect", model))
    assert re.search(words, refuse("checkpoint", "quantise", model, tmp_path / "fp8"))


def test_undamaged_model_is_not_refused(model, config, succeed):
    answer = succeed("generate", config(model), "--prompt-ids", "1,2,3", "--max-tokens", 2).out
    assert re.fullmatch(r"\d+,\d+\n", answer)


A, F = "roles.a.", "roles.f."
PLACEMENTS = {
    "unknown backend": (F + "backend=cuda0", "no backend 'cuda0'; installed: .*cpu, reference"),
    "unknown device": (F + "devices=[7]", "roles.f.devices: cpu has one device.*asked for 7"),
    "unknown stage": (F + "stages=[fnn]", "unknown stage 'fnn'; stages: embed, vision, attention"),
    "unknown layer": (F + 'stages=["ffn[2-9]"]', r"no ffn\[4\]; the model has 4 layers: 0-3"),
    "layers backwards": (F + 'stages=["ffn[3-1]"]', "layers run upwards"),
    "stage in two roles": (F + "stages=[ffn, head]", "head in two roles: 'a' and 'f'"),
    "stage in none": (F + 'stages=["ffn[0-2]"]', r"no role runs ffn\[3\]"),
    "idle role": (A + 'stages=[embed, attention, head, "ffn[0-3]"]', "role 'f' runs nothing"),
    "option's value": (A + "options={threads: x}", "roles.a.options: .*threads: 'x' refused"),
    "option's name": (A + "options={thread: 1}", "roles.a.options: .*no option 'thread'; options"),
    "options that differ": (A + "options={threads: 1}", "roles.f.options: .*role 'a'"),
    "dtype": (A + "weights=fp8", "'fp8' is not available yet; use 'auto'"),
    "unknown key": (A + "bakend=cpu", "unknown key 'bakend' in roles.a; keys: stages, backend"),
    "unknown role": ("roles.g.backend=cpu", "unknown role 'g'; roles: a, f"),
    "no value": ("roles.f.backend", "expected key=value"),
    "later work": ("runtime.processes=per-role", "'per-role' is not available yet"),
    "card of a host": (F + "card=h800", "backend cpu has no card 'h800'"),
}


@pytest.mark.parametrize("what", PLACEMENTS)
def test_impossible_placement_is_refused(what, model, config, refuse):
    setting, words = PLACEMENTS[what]
    path = config(model)
    found = refuse("check", path, "--here", "--set", setting)
    assert re.search(words, found)
    assert found == refuse("generate", path, "--prompt-ids", "1", "--set", setting)


@pytest.mark.parametrize(
    ("key", "value"),
    [("backend", "cuda0"), ("devices", [7]), ("stages", ["fnn"]), ("options", {"threads": 0})],
)
def test_impossible_placement_names_its_line(key, value, model, config, refuse):
    roles = {
        "a": {"stages": ["embed", "attention", "head"], "backend": "reference"},
        "f": {"stages": ["ffn"], "backend": "cpu", key: value},
    }
    path = config(model, roles=roles)
    lines = path.read_text().splitlines()
    line = next(n for n, text in enumerate(lines, 1) if key in text and n > lines.index("  f:"))
    line += key == "stages"  # the item, below its key
    assert f"run.yaml:{line}: " in refuse("check", path, "--here")


FILES = {
    "missing": (lambda path: None, "cannot be read: No such file"),
    "not YAML": (lambda path: path.write_text("a: [1\nb: {"), r":2: not YAML"),
    "empty": (lambda path: path.write_text(""), "expected keys and values at the top"),
    "binary": (lambda path: path.write_bytes(b"\x80\x00"), "not UTF-8"),
    "directory": (lambda path: path.mkdir(), "is a directory"),
    "another file": (lambda path: path.write_text("name: x\n"), ":1: unknown key 'name'; keys: v"),
    "no such model": (
        lambda path: path.write_text(
            "version: 1\nmodel: ./none\nroles:\n  a: {stages: [ffn], backend: cpu}\n"
        ),
        ":2: model: no folder",
    ),
    "no such family": (
        lambda path: path.write_text(
            "version: 1\nmodel: step4\nroles:\n  a: {stages: [ffn], backend: cpu}\n"
        ),
        ":2: model: 'step4' is no folder and no family; families: step3",
    ),
}


@pytest.mark.parametrize("what", FILES)
@pytest.mark.parametrize(
    "command", [("check",), ("graph",), ("generate", "--prompt", "a"), ("eval", "digits")], ids=str
)
def test_config_that_cannot_be_used_is_refused(what, command, tmp_path, refuse):
    make, words = FILES[what]
    make(tmp_path / "run.yaml")
    assert re.search(words, refuse(*command, tmp_path / "run.yaml"))


REQUESTS = {
    "neither": ((), "give either --prompt or --prompt-ids"),
    "both": ((*ASK, "--prompt-ids", "1"), "give either --prompt or --prompt-ids"),
    "no numbers": (("--prompt-ids", "1,x"), "'1,x' refused; allowed: whole numbers with commas"),
    "no ids": (("--prompt-ids", ""), "'' refused"),
    "endless id": (("--prompt-ids", "9" * 5000), "refused; allowed: whole numbers"),
    "id of the vocabulary's size": (("--prompt-ids", "5,64"), "token 64 at place 1 .* 0 to 63"),
    "negative id": (("--prompt-ids=-1",), "expected 0 or more, found -1"),
    "image token, no image": (("--prompt-ids", "1,6,2"), r"1 <im_patch> token .* but 0 images"),
    "image token in text": (("--prompt", "<im_patch>"), r"1 <im_patch> token .* but 0 images"),
    "over the context": (("--prompt", "sum " * 5000), "tokens, the model's context is 4096"),
    "no tokens": ((*ASK, "--max-tokens", "0"), "max_tokens: 0 refused; allowed: at least 1"),
    "temperature": ((*ASK, "--temperature", "nan"), "temperature: nan refused; allowed: 0"),
    "top_p": ((*ASK, "--top-p", "1.5"), "top_p: 1.5 refused; allowed: over 0"),
    "top_k": ((*ASK, "--top-k", "-2"), "top_k: -2 refused"),
    "seed": ((*ASK, "--seed", "-1"), "seed: -1 refused"),
    "stop": ((*ASK, "--stop", ""), "stop: .*allowed: strings that are not empty"),
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


def test_eval_of_a_model_without_held_out_digits_is_refused(model, config, refuse):
    assert "eval digits needs a model with held-out digits" in refuse(
        "eval", "digits", config(model)
    )


@pytest.mark.parametrize(
    "alter",
    [
        lambda held: held.clear(),
        lambda held: held.update(images=held["images"][:, :4]),
        lambda held: held.update(pairs=held["pairs"] + len(held["images"])),
        lambda held: held.update(labels=held["labels"][:-1]),
        lambda held: held.update(labels=held["labels"].astype("U2")),
    ],
    ids=["empty", "image shape", "pairs beyond the images", "labels missing", "labels of text"],
)
def test_damaged_held_out_digits_are_refused(alter, digits, model, config, refuse):
    held = dict(np.load(digits.parents[1] / "models/tiny-step3-digits/eval/held_out.npz"))
    alter(held)
    (model / "eval").mkdir()
    np.savez(model / "eval" / "held_out.npz", **held)
    assert re.search(r"held_out\.npz: ", refuse("eval", "digits", config(model)))


def test_held_out_digits_that_are_no_archive_are_refused(model, config, refuse):
    (model / "eval").mkdir()
    (model / "eval" / "held_out.npz").write_bytes(b"PK\x03\x04 and no more")
    assert re.search(r"held_out\.npz: ", refuse("eval", "digits", config(model)))


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


def test_reading_a_checkpoint_leaves_it_as_it_was(model, config, succeed):
    path = config(model)
    before = tree(model)
    succeed("checkpoint", "inspect", model)
    succeed("generate", path, "--prompt-ids", "1", "--max-tokens", "1")
    assert tree(model) == before
