"""The key ``emulate``: what it may hold, and one line with its place for everything else."""

from dataclasses import replace
from pathlib import Path

import pytest

from step3_hetero.config import Config, Emulate
from step3_hetero.emulate.asked import links_from
from step3_hetero.emulate.link import Link
from step3_hetero.errors import ConfigError, PlacementError, Step3HeteroError, UnsupportedOp
from step3_hetero.placement.catalogue import Catalogue
from step3_hetero.registry import get_backend
from step3_hetero.runtime.resolving import open_devices, resolve

TINY = Path(__file__).resolve().parents[2] / "models" / "tiny-step3-digits"

RUN = f"""\
version: 1
model: {TINY}
roles:
  a:
    stages: [embed, vision, attention, head, "ffn[0,3]"]
    backend: cpu
    emulate: {{card: h800, memory: 0.001, latency_s: 0.1}}
  f:
    stages: [ffn]
    backend: reference
    emulate:
      card: ascend-910b
      memory: 0.001
runtime: {{dtype: bf16, kv_blocks: 10}}
transport: {{a2f_dtype: bf16}}
"""

CARDS = ", ".join(Catalogue.read().names())


@pytest.fixture
def read(tmp_path, monkeypatch):
    """Write run.yaml with some text changed, and read it from the folder it lies in."""
    monkeypatch.chdir(tmp_path)

    def read(*changes):
        text = RUN
        for old, new in changes:
            assert text.count(old) == 1
            text = text.replace(old, new)
        Path("run.yaml").write_text(text)
        return Config.read("run.yaml")

    return read


@pytest.fixture(autouse=True)
def no_vendor_stands_in(monkeypatch):
    """Interpreted kernels and a stand-in driver stay for as long as the process of some test."""
    for name in ("cuda", "ascend"):
        backend = type(get_backend(name))
        claims = backend.reference_info

        def on_cards(self, card, claims=claims):
            return replace(claims(self, card), tier="device", memory_domain="")

        monkeypatch.setattr(backend, "reference_info", on_cards)


def said(read, *changes, error=ConfigError):
    with pytest.raises(Step3HeteroError) as failed:
        resolve(read(*changes))
    assert type(failed.value) is error
    return str(failed.value)


def test_a_name_is_short_for_a_mapping(read):
    short = read(("{card: h800, memory: 0.001, latency_s: 0.1}", "h800"))
    assert short.roles["a"].emulate == Emulate(card="h800")
    assert read().roles["f"].emulate == Emulate(card="ascend-910b", memory=0.001)


F_CARD = "      card: ascend-910b\n"
A_KEY = "run.yaml:7: roles.a.emulate"


@pytest.mark.parametrize(
    ("old", "new", "want"),
    [
        ("{card: h800, memory: 0.001, latency_s: 0.1}", "h80",
         f"{A_KEY}: unknown card 'h80'; did you mean h800?; cards: {CARDS}"),
        (F_CARD, "      card: 910\n",
         "run.yaml:12: roles.f.emulate.card: expected text, got 910"),
        (F_CARD, "      card: npu\n",
         f"run.yaml:11: roles.f.emulate: unknown card 'npu'; cards: {CARDS}"),
        ("{card: h800, memory: 0.001, latency_s: 0.1}", "[h800]",
         f"{A_KEY}: expected a card's name, as h20, or keys and values, got a list"),
        ("{card: h800, memory: 0.001, latency_s: 0.1}", "''",
         f"{A_KEY}.card: expected a name, got ''"),
        (F_CARD, "", "run.yaml:11: missing key 'card' in roles.f.emulate"),
        (F_CARD, F_CARD + "      loss: 0.1\n",
         "run.yaml:13: unknown key 'loss' in roles.f.emulate; keys: card, memory, slow, latency_s, "
         "bytes_per_s, copy_bytes_per_s, corrupt_every, cut_every"),
        ("      memory: 0.001", "      cut_every: 0",
         "run.yaml:13: roles.f.emulate.cut_every: 0 is too small; from 1"),
        ("      memory: 0.001", "      corrupt_every: 9",
         "run.yaml:13: roles.f.emulate.corrupt_every: 9 refused: there are no frames with "
         "runtime.processes: one; use per-role"),
        ("      memory: 0.001", "      memory: -0.001",
         "run.yaml:13: roles.f.emulate.memory: -0.001 is too small; more than 0"),
        ("      memory: 0.001", "      memory: 2",
         "run.yaml:13: roles.f.emulate.memory: 2 is too large; up to 1"),
        ("      memory: 0.001", "      slow: -2",
         "run.yaml:13: roles.f.emulate.slow: -2 is too small; from 1"),
        ("      memory: 0.001", "      latency_s: -1",
         "run.yaml:13: roles.f.emulate.latency_s: -1 is too small; from 0"),
        ("      memory: 0.001", "      bytes_per_s: 0",
         "run.yaml:13: roles.f.emulate.bytes_per_s: 0 is too small; more than 0"),
        ("backend: cpu", "backend: cuda",
         f"{A_KEY}: 'h800' on backend 'cuda', which drives cards of its own; backends on the host: "
         "cpu, reference"),
        ("backend: reference", "backend: ascend",
         "run.yaml:11: roles.f.emulate: 'ascend-910b' on backend 'ascend', which drives cards of "
         "its own; backends on the host: cpu, reference"),
        ("backend: cpu", "backend: cpu\n    card: h20",
         "run.yaml:7: roles.a.card: 'h20' beside emulate: h800; leave one of the two out"),
        ("backend: reference", "backend: reference\n    weights: fp8",
         "run.yaml:11: roles.f.weights: 'fp8' on ascend-910b: no FP8 arithmetic; allowed: fp32, "
         "bf16, int8"),
        (F_CARD, "      card: ascend-910b1\n    weights: int8\n",
         "run.yaml:13: roles.f.weights: 'int8' on ascend-910b1: no INT8 arithmetic; allowed: fp32, "
         "bf16"),
        ("a2f_dtype: bf16", "a2f_dtype: fp8",
         "run.yaml:15: transport.a2f_dtype: 'fp8' with role 'f' on ascend-910b emulated on "
         "reference:0, which casts to none; allowed: fp32, bf16, int8"),
        ("a2f_dtype: bf16", "f2a_dtype: fp8",
         "run.yaml:15: transport.f2a_dtype: 'fp8' with role 'f' on ascend-910b emulated on "
         "reference:0, which casts to none; allowed: fp32, bf16, int8"),
        ("latency_s: 0.1}", "latency_s: 1.0}",
         f"{A_KEY}.latency_s: a and f are 1 s apart, there and back 2 s; allowed: less than "
         "transport.deadline_s, which is 2"),
    ],
)  # fmt: skip
def test_message_names_the_line_the_value_and_what_is_allowed(read, old, new, want):
    if "weights: int8" in new:  # a mapping's keys end before the role's go on
        old, new = F_CARD + "      memory: 0.001\n", new
    assert said(read, (old, new)) == want


@pytest.mark.parametrize(
    ("old", "new", "want"),
    [
        ("dtype: bf16,", "dtype: fp64,",
         "run.yaml:6: roles.a: cpu on h800 emulated on cpu:0 cannot run head: add[float64,"),
        ("kv_blocks: 10", "kv_blocks: 10, kv_dtype: fp8",
         "run.yaml:6: roles.a: cpu on ascend-910b emulated on cpu:0 cannot run attention[3]: "),
        ("backend: cpu", "backend: cpu\n    weights: fp8",
         "run.yaml:6: roles.a: cpu on h800 emulated on cpu:0 cannot run "),
    ],
)  # fmt: skip
def test_what_card_or_host_cannot_run_is_refused_before_anything_is_opened(read, old, new, want):
    changes = [(old, new)]
    if "fp8" in new and "kv" in new:
        changes.append(("h800", "ascend-910b"))
    assert said(read, *changes, error=UnsupportedOp).startswith(want)


def test_fp8_on_the_wire_passes_between_cards_that_have_it(read):
    assert resolve(read(("a2f_dtype: bf16", "a2f_dtype: fp8"), (F_CARD, "      card: h20\n")))


def test_memory_of_the_card_is_enforced_by_check(read):
    line = said(read, ("      memory: 0.001", "      memory: 1.0e-05"), error=PlacementError)
    # By hand: 2 layers, 2 bytes, 3 matrices of 96 columns, 8 experts of 64 rows and one of 64.
    assert line == (
        "run.yaml:11: does not fit: roles f on ascend-910b emulated on reference:0: 663,552 bytes "
        "of weights and 0 of KV cache (10 blocks) into 640,000 bytes; raise "
        "roles.f.emulate.memory, lower runtime.kv_blocks or spread the stages over more devices"
    )
    line = said(read, ("kv_blocks: 10", "kv_blocks: 2000"), error=PlacementError)
    assert line.startswith("run.yaml:7: does not fit: roles a on h800 emulated on cpu:0: ")
    assert "(2000 blocks) into 80,000,000 bytes; raise roles.a.emulate.memory" in line


def test_blocks_fill_the_cards_memory_and_not_the_hosts(read):
    few = resolve(read(("kv_blocks: 10", "kv_blocks: auto")))
    more = resolve(
        read(("kv_blocks: 10", "kv_blocks: auto"), ("h800, memory: 0.001", "h800, memory: 0.004"))
    )
    assert few.placement.kv_blocks < more.placement.kv_blocks
    (role, _) = few.placement.roles.values()
    # By hand: two fifths of what the weights leave of 80 MB, over the bytes of a block.
    assert (
        few.placement.kv_blocks == int((80e6 - role.weight_bytes) * 0.4) // role.kv_bytes_per_block
    )


def test_two_cards_on_one_host_are_two_devices(read):
    both = read(("backend: reference", "backend: cpu"))
    assert len({d.info.name for d in open_devices(resolve(both)).values()}) == 2
    same = [("backend: reference", "backend: cpu"), (F_CARD + "      memory: 0.001\n",
            "      {card: h800, memory: 0.001, latency_s: 0.1}\n")]  # fmt: skip
    assert not list(resolve(read(*same)).placement.crossing())
    apart = [*same, ("stages: [ffn]", "stages: [ffn]\n    devices: [1]")]
    assert [d.info.name for d in open_devices(resolve(read(*apart))).values()] == [
        "h800 emulated on cpu:0", "h800:1 emulated on cpu:0",
    ]  # fmt: skip


def test_one_card_cannot_be_told_in_two_ways(read):
    line = said(read, ("backend: reference", "backend: cpu"), (F_CARD, "      card: h800\n"))
    assert line == (
        "run.yaml:11: roles.f.emulate: differs from that of role 'a' on the same card; write the "
        "same in both, or give one another number with roles.f.devices"
    )


def test_links_are_those_of_both_ends(read):
    config = read(("      memory: 0.001", "      bytes_per_s: 1e6"))
    assert links_from(config, "a") == {"f": Link(0.1, 1e6)} == {"f": links_from(config, "f")["a"]}
    plain = read(("{card: h800, memory: 0.001, latency_s: 0.1}", "h800"))
    assert links_from(plain, "a") == {}
