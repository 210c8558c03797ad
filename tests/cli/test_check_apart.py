"""What `check` and `role` say of roles in processes of their own."""

import re
from dataclasses import replace

import pytest


def test_check_says_that_every_member_of_a_set_is_sent_an_edge(succeed, digits):
    cut = ("runtime.processes=per-role", "roles.f.instances=4", "roles.f.ep=2", "roles.f.tp=2")
    asked = ("check", digits, *(part for key in cut for part in ("--set", key)))
    for edge in succeed(*asked, "--json").json["crossing"]:
        once = {"A2F": 816, "F2A": 768}[edge["kind"]]
        assert (edge["bytes_per_token"], edge["members"]) == (once, 4)
        assert edge["sent_bytes_per_token"] == 4 * once
    text = succeed(*asked).out
    assert re.search(r"A2F +a +f +2 +816 B +4 +3\.3 kB", text)
    assert re.search(r"F2A +f +a +2 +768 B +4 +3\.1 kB", text)


def test_check_counts_the_first_of_attentions_ranks_alone(succeed, digits):
    ranks = ("--set", "runtime.processes=per-role", "--set", "roles.a.tp=2")
    for edge in succeed("check", digits, *ranks, "--json").json["crossing"]:
        assert (edge["members"], edge["sent_bytes_per_token"]) == (1, edge["bytes_per_token"])


def test_check_lists_what_crosses_between_processes_on_one_backend(succeed, digits):
    cut = ("runtime.processes=per-role", "roles.f.backend=cpu", "transport.kind=tcp",
           "transport.a2f_dtype=int8", "transport.f2a_dtype=bf16")  # fmt: skip
    asked = ("check", digits, *(part for key in cut for part in ("--set", key)))
    found = succeed(*asked, "--json").json
    routed = 3 * 4 + 3 * 4  # weights, ids
    assert found["transport"] == "tcp"
    assert {c["kind"]: (c["source"], c["target"], c["dtype"], c["bytes_per_token"])
            for c in found["crossing"]} == {
        "A2F": ("a", "f", "int8", 2 * (96 + 4 + routed)),  # codes, one scale
        "F2A": ("f", "a", "bf16", 2 * 96 * 2),
    }  # fmt: skip
    text = succeed(*asked).out
    assert "edges between processes, over tcp" in text
    assert re.search(r"A2F +a +f +2 +248 B +1 +248 B +int8", text)


def test_check_of_one_role_says_that_nothing_crosses_between_processes(succeed, digits, tmp_path):
    model = digits.parents[1] / "models" / "tiny-step3-digits"
    stages = "[embed, vision, attention, ffn, head]"
    alone = tmp_path / "alone.yaml"
    alone.write_text(
        f"version: 1\nmodel: {model}\nroles: {{a: {{stages: {stages}, backend: cpu}}}}\n"
        "runtime: {processes: per-role}\n"
    )
    assert "no edge crosses between processes" in succeed("check", alone).out


def test_check_refuses_a_wire_dtype_that_the_one_backend_of_two_processes_lacks(
    refuse, digits, monkeypatch
):
    from step3_hetero.registry import get_backend

    info = get_backend("cpu").reference_info(None)
    dtypes = replace(info.dtypes, wire=("float32",))
    monkeypatch.setattr(
        type(get_backend("cpu")), "reference_info", lambda *_: replace(info, dtypes=dtypes)
    )
    cut = ("runtime.processes=per-role", "roles.f.backend=cpu", "transport.a2f_dtype=int8")
    error = refuse("check", digits, *(part for key in cut for part in ("--set", key)))
    assert "transport.a2f_dtype: 'int8' with role 'a'" in error and "allowed: fp32" in error


@pytest.mark.parametrize(
    ("kind", "said"), [("tcp", "expected host:port"), ("shm", "expected @name")]
)
def test_check_refuses_what_is_no_address_of_the_transport(refuse, digits, kind, said):
    keys = ("runtime.processes=per-role", "roles.f.hosts=[nonsense]", f"transport.kind={kind}")
    asked = [part for key in keys for part in ("--set", key)]
    error = refuse("check", digits, *asked)
    assert re.search(rf"roles\.f\.hosts: address 'nonsense' refused; {said}", error)


def test_role_of_a_config_for_one_process_is_refused(refuse, digits):
    error = refuse("role", digits, "--name", "f")
    assert "runtime.processes: one has no roles to start; set it to per-role" in error


def test_check_lists_what_processes_on_one_device_send_each_other(succeed, digits):
    one = ("check", digits, "--set", "roles.f.backend=cpu")
    assert "no edge crosses between devices\n" in succeed(*one).out
    apart = ("--set", "runtime.processes=per-role", "--set", "transport.kind=tcp")
    assert "edges between processes, over tcp" in succeed(*one, *apart).out


@pytest.mark.parametrize(("blocks", "said"), [(1, "1 block"), (2, "2 blocks")])
def test_check_counts_blocks(succeed, digits, blocks, said):
    out = succeed("check", digits, "--set", f"runtime.kv_blocks={blocks}").out
    assert f"KV cache: {said} of 128 tokens in every layer\n" in out
