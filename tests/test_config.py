"""The config file: what it accepts, and one exact line for everything that it does not."""

from pathlib import Path

import numpy as np
import pytest

from step3_hetero.config import Config
from step3_hetero.config.document import LIMIT_BYTES
from step3_hetero.errors import ConfigError

RUN = """\
version: 1
model: step3
roles:
  a:
    stages: [embed, vision, attention, head, "ffn[0,3]"]
    backend: cpu
  f:
    stages:
      - ffn
    backend: reference
runtime: {dtype: fp32, max_batch: 8}
"""

ALL_DEFAULTS = """\
runtime: {processes: one, dtype: model, batch_invariant: false, router_logits: fp32,
          microbatches: 1, max_batch: 64, kv_dtype: auto, kv_blocks: auto, prefill_chunk: 512,
          prefix_reuse: true, max_waiting: 4096, fallback: false, shadow_backend: null,
          shadow_sample: 0.0}
transport: {kind: shm, deadline_s: 2.0, a2f_dtype: auto, f2a_dtype: auto, key_file: null,
            tls_cert: null, tls_key: null, tls_ca: null}
"""
ROLE_DEFAULTS = """\
    card: null
    devices: null
    instances: 1
    tp: 1
    ep: 1
    spares: 0
    hosts: null
    weights: auto
    emulate: null
    options: {}
"""

TOP = "keys: version, model, roles, runtime, transport, predicted"
OF_ROLE = (
    "keys: stages, backend, card, devices, instances, tp, ep, spares, hosts, weights, emulate, "
    "options"
)


@pytest.fixture
def read(tmp_path, monkeypatch):
    """Write a text to run.yaml and read it from the folder it lies in, as a user would."""
    monkeypatch.chdir(tmp_path)

    def write_and_read(text, *overrides):
        Path("run.yaml").write_bytes(text if isinstance(text, bytes) else text.encode())
        return Config.read("run.yaml", overrides)

    return write_and_read


def message(read, text, *overrides):
    with pytest.raises(ConfigError) as failed:
        read(text, *overrides)
    return str(failed.value)


def test_file_becomes_one_field_per_key(read):
    config = read(RUN)
    assert config.roles["a"].stages == ("embed", "vision", "attention", "head", "ffn[0,3]")
    assert [role.backend for role in config.roles.values()] == ["cpu", "reference"]
    assert (config.runtime.dtype, config.runtime.max_batch) == ("fp32", 8)
    assert (config.transport.kind, config.transport.deadline_s) == ("shm", 2.0)


def test_every_key_may_be_written_out_at_its_default(read):
    short = RUN.replace("runtime: {dtype: fp32, max_batch: 8}\n", "")
    long = short.replace("    backend: reference\n", "    backend: reference\n" + ROLE_DEFAULTS)
    assert read(long + ALL_DEFAULTS).model_dump() == read(short).model_dump()


def test_config_cannot_be_changed_once_read(read):
    with pytest.raises(ValueError, match="frozen"):
        read(RUN).runtime.max_batch = 9


@pytest.mark.parametrize(
    ("old", "new", "want"),
    [
        ("- ffn", "- fnn", "run.yaml:9: unknown stage 'fnn'; stages: embed, vision, attention, "
         "ffn, head"),
        ("version: 1\n", "", "run.yaml:1: missing key 'version'"),
        ("version: 1", "version: 2", "run.yaml:1: version: expected 1, got 2"),
        ("version: 1", 'version: "1"', "run.yaml:1: version: expected a whole number, got '1'"),
        ("version: 1", "version: true", "run.yaml:1: version: expected a whole number, got true"),
        ("roles:", "rolse:", f"run.yaml:3: unknown key 'rolse'; {TOP} (+1 more)"),
        ("    backend: cpu\n", "", "run.yaml:4: missing key 'backend' in roles.a"),
        ("backend: cpu", "bakcend: cpu",
         f"run.yaml:6: unknown key 'bakcend' in roles.a; {OF_ROLE} (+1 more)"),
        ("backend: cpu", "backend: cpu\n    kard: h800",
         f"run.yaml:7: unknown key 'kard' in roles.a; {OF_ROLE}"),
        ("backend: cpu", "backend: cpu\n    backend: cuda",
         "run.yaml:7: key 'backend' stands twice, first on line 6"),
        ("  f:", "  a:", "run.yaml:7: key 'a' stands twice, first on line 4"),
        ("  f:", "  the f:", "run.yaml:7: role 'the f': use letters, digits, - and _"),
        ("backend: cpu", "backend: 3", "run.yaml:6: roles.a.backend: expected text, got 3"),
        ("backend: cpu", "backend: ''", "run.yaml:6: roles.a.backend: expected a name, got ''"),
        ("backend: cpu", "backend:", "run.yaml:6: roles.a.backend: expected text, got null"),
        ("backend: cpu", "backend: [cpu]",
         "run.yaml:6: roles.a.backend: expected text, got a list"),
        ("stages:\n      - ffn", "stages: ffn",
         "run.yaml:8: roles.f.stages: expected a list, got 'ffn'"),
        ("stages:\n      - ffn", "stages: []", "run.yaml:8: roles.f.stages: is empty"),
        ("- ffn", "- 7", "run.yaml:9: roles.f.stages.0: expected text, got 7"),
        ("- ffn", "- head[1]",
         "run.yaml:9: stage 'head[1]': only attention and ffn have layers"),
        ('"ffn[0,3]"', "ffn[0,3]", "run.yaml:5: not YAML: expected ',' or ']', but got '['; "
         'quote a stage with layers: "ffn[0,3]"'),
        ("max_batch: 8", "max_batch: true",
         "run.yaml:11: runtime.max_batch: expected a whole number, got true"),
        ("max_batch: 8", "max_batch: '8'",
         "run.yaml:11: runtime.max_batch: expected a whole number, got '8'"),
        ("max_batch: 8", "max_batch: 1e9",
         "run.yaml:11: runtime.max_batch: expected a whole number, got 1000000000.0"),
        ("max_batch: 8", "max_batch: 0", "run.yaml:11: runtime.max_batch: 0 is too small; from 1"),
        ("dtype: fp32", "dtype: fp31",
         "run.yaml:11: runtime.dtype: expected model, fp32, bf16 or fp64, got 'fp31'"),
        ("dtype: fp32", "kv_blocks: 0",
         "run.yaml:11: runtime.kv_blocks: expected auto or a whole number from 1, got 0"),
        ("dtype: fp32", "batch_invariant: yes",
         "run.yaml:11: runtime.batch_invariant: expected true or false, got 'yes'"),
        ("dtype: fp32", "shadow_sample: 2",
         "run.yaml:11: runtime.shadow_sample: 2 is too large; up to 1"),
        ("runtime: {dtype: fp32, max_batch: 8}", "runtime:",
         "run.yaml:11: runtime: expected keys and values, got null"),
        ("runtime: {", "transport: {kind: shn}\nruntime: {",
         "run.yaml:11: transport.kind: 'shn' is unknown; known: inproc, nixl, shm, tcp"),
        ("runtime: {", "transport: {deadline_s: 0}\nruntime: {",
         "run.yaml:11: transport.deadline_s: 0 is too small; more than 0"),
        ("runtime: {", "transport: {deadline_s: 1e999}\nruntime: {",
         "run.yaml:11: transport.deadline_s: expected a finite number, got Infinity"),
        ("runtime: {", "transport: {a2f_dtype: fp16}\nruntime: {",
         "run.yaml:11: transport.a2f_dtype: expected auto, fp32, bf16, fp8 or int8, got 'fp16'"),
        ("backend: cpu", "backend: cpu\n    devices: [0, 1]",
         "run.yaml:7: roles.a.devices: expected 1, got 2 (instances x tp + spares)"),
        ("backend: cpu", "backend: cpu\n    devices: [-1]",
         "run.yaml:7: roles.a.devices.0: -1 is too small; from 0"),
        ("model: step3", "model: models/none",
         "run.yaml:2: model: no folder 'models/none'; a path is relative to the config's folder"),
        ("model: step3", "model: &m step3",
         "run.yaml:2: anchors and aliases (& and *) are not allowed"),
        ("model: step3", "model: !!str step3", "run.yaml:2: tags (!) are not allowed"),
        ("model: step3", "model: [", "run.yaml:4: not YAML: expected ',' or ']', but got ':'"),
        ("model: step3", "? [a]\n: step3",
         "run.yaml:2: a key is one word, not a list or mapping (+1 more)"),
        ("model: step3", "<<: {}", f"run.yaml:2: unknown key '<<'; {TOP} (+1 more)"),
    ],
)  # fmt: skip
def test_message_names_the_line_the_value_and_what_is_known(read, old, new, want):
    assert RUN.count(old) == 1
    assert message(read, RUN.replace(old, new)) == want


@pytest.mark.parametrize(
    ("old", "new", "want"),
    [
        ("dtype: fp32", "microbatches: 2",
         "run.yaml:11: runtime.microbatches: 2 refused; allowed: 1 with runtime.processes: one; "
         "set that to per-role"),
        ("dtype: fp32", "fallback: true",
         "run.yaml:11: runtime.fallback: true is not available yet; use false"),
        ("backend: cpu", "backend: cpu\n    instances: 2",
         "run.yaml:7: roles.a.instances: 2 refused; allowed: 1 with runtime.processes: one; "
         "set that to per-role"),
        ("backend: cpu", "backend: cpu\n    tp: 8",
         "run.yaml:7: roles.a.tp: 8 refused; allowed: 1 with runtime.processes: one; set that to "
         "per-role"),
        ("backend: cpu", "backend: cpu\n    spares: 1",
         "run.yaml:7: roles.a.spares: 1 refused; allowed: 0 with runtime.processes: one; "
         "set that to per-role"),
        ("backend: cpu", "backend: cpu\n    hosts: [b]",
         "run.yaml:7: roles.a.hosts: a list refused; leave it out with runtime.processes: one; "
         "set that to per-role"),
        ("backend: cpu", "backend: cpu\n    weights: fp8",
         "run.yaml:7: roles.a.weights: 'fp8' is not available yet; use 'auto' or 'fp32' or 'bf16' "
         "or 'int8'"),
    ],
)  # fmt: skip
def test_value_that_needs_later_work_is_refused(read, old, new, want):
    assert message(read, RUN.replace(old, new)) == want


@pytest.mark.parametrize(
    ("backend", "keys", "want"),
    [
        ("reference", "ep: 2\n    instances: 3",
         "run.yaml:12: roles.f.instances: 3 is no multiple of ep, which is 2"),
        ("cpu", "instances: 2\n    ep: 2",
         "run.yaml:8: roles.a.ep: 2 is not available yet with stages other than ffn; give those "
         "another role"),
    ],
)  # fmt: skip
def test_only_whole_sets_of_a_role_of_ffn_alone_share_their_stages(read, backend, keys, want):
    text = RUN.replace(f"backend: {backend}\n", f"backend: {backend}\n    {keys}\n")
    assert message(read, text, "runtime.processes=per-role") == want


def test_ranks_share_heads_or_ffn_and_nothing_else(read):
    text = RUN.replace("vision, attention", "attention").replace("- ffn", "- ffn\n      - vision")
    assert read(text, "runtime.processes=per-role", "roles.a.tp=2").roles["a"].tp == 2
    assert message(read, text, "runtime.processes=per-role", "roles.f.tp=2") == (
        "--set roles.f.tp=2: roles.f.tp: 2 is not available yet with stages other than ffn and "
        "without attention; give those another role"
    )


@pytest.mark.parametrize(
    ("text", "want"),
    [
        ("", "run.yaml:1: expected keys and values at the top, got no keys"),
        ("# nothing\n", "run.yaml:1: expected keys and values at the top, got no keys"),
        ("\n- 1\n", "run.yaml:2: expected keys and values at the top, got a list"),
        ("a: 1\n---\nb: 2\n", "run.yaml:2: not YAML: but found another document"),
        ("a: b: c\n", "run.yaml:1: not YAML: mapping values are not allowed here"),
        ('a: 1\nb: "\\ud800"\n', "run.yaml:2: half of a surrogate pair is no character"),
        (
            "a: 1\n\tb: 2\n",
            "run.yaml:2: not YAML: found character '\\t' that cannot start any token",
        ),
        (b"a: 1\nb: \xff\n", "run.yaml:2: not UTF-8 text: byte 0xff"),
        ("a: 1\nb: \x07\n", "run.yaml:2: character '\\x07' is not allowed in YAML"),
        ('a: 1\nb: "\\UFFFFFFFF"\n', "run.yaml:2: not YAML: "),
        ("a: " + "[" * 33, "run.yaml:1: nested deeper than 32 levels"),
        ("#" * (LIMIT_BYTES + 1), "run.yaml: larger than 1048576 bytes, the limit for a config"),
    ],
    ids=lambda value: repr(value[:20]),
)
def test_what_is_no_config_at_all_is_refused(read, text, want):
    assert message(read, text).startswith(want)


def test_first_of_several_errors_is_told_by_line_with_the_number_of_others(read):
    text = RUN.replace("- ffn", "- fnn").replace("max_batch: 8", "max_batch: 0")
    assert message(read, text.replace("version: 1", "version: 3")) == (
        "run.yaml:1: version: expected 1, got 3 (+2 more)"
    )


@pytest.mark.parametrize("name", ["none.yaml", ".", "x" * 300, "a\0b"])
def test_file_that_cannot_be_read_says_so(name):
    with pytest.raises(ConfigError, match="cannot be read: "):
        Config.read(name)


def test_model_is_a_folder_beside_the_file_or_the_name_of_a_family(read, tmp_path):
    assert read(RUN).model_path is None
    (tmp_path / "step3").mkdir()
    assert read(RUN).model_path == Path("step3")
    assert read(RUN.replace("step3", str(tmp_path))).model_path == tmp_path
    (tmp_path / "run.yaml").write_text(RUN)
    assert Config.read(tmp_path / "run.yaml").model_path == tmp_path / "step3"


def test_words_that_old_yaml_takes_for_booleans_and_dates_are_text(read):
    config = read(RUN.replace("  f:", "  on:") + "predicted: {no: off, day: 2026-01-02, n: 010}\n")
    assert list(config.roles) == ["a", "on"]
    assert config.predicted == {"no": "off", "day": "2026-01-02", "n": 10}


APART = ("runtime.processes=per-role", "transport.kind=tcp")


@pytest.mark.parametrize(
    ("overrides", "want"),
    [
        (("roles.f.hosts=[x:1, y:2]",),
         "roles.f.hosts: expected instances + spares = 1, got 2 addresses"),
        (("roles.f.hosts=[]",), "--set roles.f.hosts=[]: roles.f.hosts: is empty"),
        (("roles.f.hosts=[x:1]", "transport.kind=inproc"),
         "roles.f.hosts: inproc reaches no other process; use tcp, or shm here"),
    ],
)  # fmt: skip
def test_roles_that_stand_need_an_address_each_and_a_transport_that_reaches_them(
    read, overrides, want
):
    with pytest.raises(ConfigError) as refused:
        read(RUN, *APART, *overrides)
    assert want in str(refused.value)


def test_hosts_may_list_spares_and_threads_need_none(read):
    hosts = ("roles.f.spares=1", "roles.f.hosts=[x:1, y:2]")
    assert read(RUN, *APART, *hosts).roles["f"].hosts == ("x:1", "y:2")
    assert read(RUN, APART[0], "transport.kind=inproc").roles["f"].hosts is None


def test_override_replaces_a_value_and_answers_for_it(read):
    config = read(RUN, "roles.f.backend=cpu", "runtime.max_batch=2", "transport.deadline_s=1e1")
    assert (config.roles["f"].backend, config.runtime.max_batch) == ("cpu", 2)
    assert config.transport.deadline_s == 10.0
    assert config.where("roles.f.backend") == "--set roles.f.backend=cpu"
    assert config.where("roles.f.stages.0") == "run.yaml:9"


def test_override_mends_what_is_wrong_in_the_file(read):
    assert read(RUN.replace("- ffn", "- fnn"), "roles.f.stages=[ffn]").roles["f"].stages == ("ffn",)


def test_override_reaches_into_options(read):
    assert read(RUN, "roles.a.options.tile.rows=16").roles["a"].options == {"tile": {"rows": 16}}


@pytest.mark.parametrize(
    ("override", "want"),
    [
        ("roles.f.bakcend=cpu", f"unknown key 'bakcend' in roles.f; {OF_ROLE}"),
        ("roles.g.backend=cpu", "unknown role 'g'; roles: a, f"),
        ("rolse.f.backend=cpu", f"unknown key 'rolse'; {TOP}"),
        ("model.path=x", "unknown key 'path': model holds a value, not keys"),
        ("roles.f.stages.0=ffn", "unknown key '0': roles.f.stages holds a value, not keys"),
        ("roles.f.backend", "expected key=value, as in roles.f.backend=cpu"),
        ("=cpu", "expected key=value, as in roles.f.backend=cpu"),
        ("roles..backend=cpu", "expected key=value, as in roles.f.backend=cpu"),
        ("roles.f.backend=", "roles.f.backend: expected text, got null"),
        ("roles.f.stages=[fnn]",
         "unknown stage 'fnn'; stages: embed, vision, attention, ffn, head"),
        ("runtime.dtype={", "not YAML: expected the node content, but found '<stream end>'"),
        ("runtime.dtype=*a", "anchors and aliases (& and *) are not allowed"),
        ("roles.f.options={a: 1, a: 2}", "key 'a' stands twice, first on line 1"),
        ("runtime.max_batch=true", "runtime.max_batch: expected a whole number, got true"),
    ],
)  # fmt: skip
def test_bad_override_is_named_as_it_was_typed(read, override, want):
    assert message(read, RUN, override) == f"--set {override}: {want}"


def test_values_from_a_program_obey_the_same_rules(tmp_path):
    role = {"stages": ["embed", "attention", "ffn", "head"], "backend": "cpu"}
    config = Config.from_dict({"version": 1, "model": "step3", "roles": {"a": role}}, tmp_path)
    assert config.roles["a"].stages == tuple(role["stages"])
    assert config.where("roles.a") == "config"
    with pytest.raises(ConfigError, match=r"^config: missing key 'version' \(\+2 more\)$"):
        Config.from_dict({}, tmp_path)
    with pytest.raises(ConfigError, match=r"^config: "):
        Config.from_dict({1: 2, "roles": {None: {}}}, tmp_path)


def test_a_later_stage_of_checking_can_name_the_line(read):
    error = read(RUN).error("roles.f.weights", "'fp8' on ascend-910b: no FP8 arithmetic")
    assert str(error) == "run.yaml:7: roles.f.weights: 'fp8' on ascend-910b: no FP8 arithmetic"


def test_stage_conflict_names_the_line_of_the_entry(read):
    stages = ["embed", "attention[0]", "ffn[0]", "head"]
    config = read(RUN.replace(', "ffn[0,3]"', ", ffn"))
    with pytest.raises(ConfigError, match=r"^run.yaml:9: ffn\[0\] in two roles: 'a' and 'f'"):
        config.assign(stages)


SNIPPETS = [b":", b"-", b"[", b"]", b"{", b"}", b"'", b'"', b"\n", b" ", b"\t", b"#", b"&a ", b"*a",
            b"!!int ", b"\\", b"%YAML 1.2\n", b"---\n", b"...", b"? ", b"|\n", b">", b",", b"\xff",
            b"\x00", b"\xe2\x80\xa8", b"\xef\xbb\xbf", b"true", b"null", b".inf", b"1e400",
            b"9" * 5000, b"ffn[0-999]", b"ffn[3-1]", b'"\\ud800"', b'"\\UFFFFFFFF"', b"<<: ",
            b"[key]: "]  # fmt: skip


def test_no_damage_to_a_file_raises_anything_but_one_line_of_config_error(read):
    rng = np.random.default_rng(1)
    source = (RUN + ALL_DEFAULTS.split("\n", 3)[3]).encode()
    refused = 0
    for _ in range(600):
        text = bytearray(source)
        for _ in range(int(rng.integers(1, 4))):
            at, size = int(rng.integers(len(text))), int(rng.integers(12))
            words = [
                *SNIPPETS,
                bytes(text[size : 3 * size]),
                bytes(rng.integers(0, 256, 2).tolist()),
            ]
            text[at : at + size] = words[int(rng.integers(len(words)))]
        try:
            read(bytes(text))
        except ConfigError as error:
            refused += 1
            assert str(error).startswith("run.yaml")
            assert str(error).isprintable(), text
            assert len(str(error)) < 400, text
    assert refused > 400
