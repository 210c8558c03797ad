"""Bad files and placements: one line on stderr, exit code 2, nothing printed, nothing written."""

import json
import os
import re

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

FIRST, SECOND = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
INDEX = "model.safetensors.index.json"


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
    "unknown backend": (
        F + "backend=cuda0",
        "no backend 'cuda0'; installed: .*cpu, cuda, reference",
    ),
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
    "later work": ("runtime.fallback=true", "runtime.fallback: true is not available yet"),
    "card of a host": (
        F + "card=h800",
        "--set roles.f.card=h800: .* backend cpu has no card 'h800'",
    ),
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


def test_reading_a_checkpoint_leaves_it_as_it_was(model, config, succeed, files):
    path = config(model)
    before = files(model)
    succeed("checkpoint", "inspect", model)
    succeed("generate", path, "--prompt-ids", "1", "--max-tokens", "1")
    assert files(model) == before


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
