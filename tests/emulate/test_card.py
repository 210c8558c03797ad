"""What an emulated card has and refuses: the catalogue's dtypes, a part of its memory."""

import pytest

from emulate.cards import card
from step3_hetero.emulate.card import dtypes_of, listed
from step3_hetero.placement.catalogue import Catalogue
from step3_hetero.registry import get_backend
from step3_hetero.specs import OpSpec

FP8, INT8 = "float8_e4m3fn", "int8"


@pytest.mark.parametrize("name", Catalogue.read().names())
def test_every_card_of_the_catalogue_can_be_emulated(name):
    found = listed(name)
    dtypes = dtypes_of(found)
    assert {"float32", "bfloat16"} <= set(dtypes.computed) & set(dtypes.stored) & set(dtypes.wire)
    assert (FP8 in dtypes.computed) == (FP8 in dtypes.wire) == ("fp8" in found.flops_per_s)
    assert (INT8 in dtypes.computed) == ("int8" in found.flops_per_s)
    assert card(name).info(get_backend("cpu").reference_info(None)).memory_bytes > 0


def test_a800_stores_fp8_and_the_910b_does_not():
    assert FP8 in dtypes_of(listed("a800")).stored
    assert FP8 not in dtypes_of(listed("ascend-910b")).stored


def test_device_says_what_it_emulates_and_on_what():
    host = get_backend("cpu").reference_info(None)
    info = card("h20", memory=0.001).info(host)
    assert info.name == "h20 emulated on cpu:0"
    assert info.tier == "emulated"
    assert info.memory_bytes == 96_000_000
    assert (info.bandwidth_bytes_per_s, dict(info.flops_per_s)) == (None, {})
    assert card("h20", 1).info(host).name == "h20:1 emulated on cpu:0"
    assert card("h20", 1).info(host).memory_domain != info.memory_domain


def test_dtypes_are_those_that_card_and_host_both_have():
    dtypes = card("h800").info(get_backend("reference").reference_info(None)).dtypes
    assert dtypes.computed == ("float32", "bfloat16")  # FP8 is the card's alone, fp64 the host's
    wire = card("ascend-910b").info(get_backend("cpu").reference_info(None)).dtypes.wire
    assert wire == ("float32", "bfloat16", INT8)


@pytest.mark.parametrize(
    ("name", "spec", "reason"),
    [
        ("h800", OpSpec("add", "float64"), "no arithmetic in float64; computes in float32, bf"),
        ("ascend-910b", OpSpec("linear", "bfloat16", weight_format=FP8),
         "no arithmetic with weights in float8_e4m3fn; allowed: float32, bfloat16, int8"),
        ("ascend-910b1", OpSpec("linear", "bfloat16", weight_format=INT8),
         "no arithmetic with weights in int8; allowed: float32, bfloat16"),
        ("ascend-910b", OpSpec("attention", "bfloat16", kv_format=FP8),
         "no KV cache in float8_e4m3fn; allowed: float32, bfloat16, int8"),
    ],
)  # fmt: skip
def test_what_a_card_lacks_is_refused_by_name(name, spec, reason):
    assert card(name).refuses(spec).startswith(reason)


@pytest.mark.parametrize(
    ("name", "spec"),
    [
        ("h800", OpSpec("linear", "bfloat16", weight_format=FP8)),
        ("a800", OpSpec("attention", "bfloat16", kv_format=FP8)),
        ("ascend-910b", OpSpec("experts", "bfloat16", weight_format=INT8)),
        ("ascend-910b", OpSpec("attention", "bfloat16", kv_format=INT8)),
    ],
)
def test_what_a_card_has_is_not(name, spec):
    assert card(name).refuses(spec) is None
