"""What `check` and `role` say of roles in processes of their own."""

import re

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


def test_check_says_how_processes_on_one_device_are_parted(succeed, digits):
    """No edge is counted between roles on one device; with processes they send all the same."""
    one = ("check", digits, "--set", "roles.f.backend=cpu")
    assert "no edge crosses between devices\n" in succeed(*one).out
    apart = ("--set", "runtime.processes=per-role", "--set", "transport.kind=tcp")
    said = "no edge crosses between devices; roles are processes, and what they send each other"
    assert f"{said} goes by tcp\n" in succeed(*one, *apart).out


@pytest.mark.parametrize(("blocks", "said"), [(1, "1 block"), (2, "2 blocks")])
def test_check_counts_blocks(succeed, digits, blocks, said):
    out = succeed("check", digits, "--set", f"runtime.kv_blocks={blocks}").out
    assert f"KV cache: {said} of 128 tokens in every layer\n" in out
