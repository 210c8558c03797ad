"""Which role runs which stage."""

import pytest

from step3_hetero.config import Selector, assign_stages, parse_selector
from step3_hetero.errors import ConfigError

TEXT = ["embed", *(f"{kind}[{n}]" for n in range(4) for kind in ("attention", "ffn")), "head"]
VISION = ["vision", *TEXT]
REST = ["embed", "attention", "head"]


def message(function, *args):
    with pytest.raises(ConfigError) as failed:
        function(*args)
    return str(failed.value)


@pytest.mark.parametrize(
    ("text", "want"),
    [
        ("embed", Selector("embed")),
        ("ffn", Selector("ffn")),
        ("ffn[0-3,60]", Selector("ffn", (0, 1, 2, 3, 60))),
        (" attention [ 2 , 4 - 5 ] ", Selector("attention", (2, 4, 5))),
        ("ffn[7-7]", Selector("ffn", (7,))),
    ],
)
def test_selector_is_a_stage_with_or_without_layers(text, want):
    assert parse_selector(text) == want


STAGES = "stages: embed, vision, attention, ffn, head"


@pytest.mark.parametrize(
    ("text", "want"),
    [
        ("fnn", f"unknown stage 'fnn'; {STAGES}"),
        ("", f"unknown stage ''; {STAGES}"),
        ("FFN", f"unknown stage 'FFN'; {STAGES}"),
        ("ffn[0]x", f"unknown stage 'ffn[0]x'; {STAGES}"),
        ("ffn[", f"unknown stage 'ffn['; {STAGES}"),
        ("head[0]", "stage 'head[0]': only attention and ffn have layers"),
        ("ffn[]", "stage 'ffn[]': '' is no layer; write [0-3,60]"),
        ("ffn[a]", "stage 'ffn[a]': 'a' is no layer; write [0-3,60]"),
        ("ffn[-1]", "stage 'ffn[-1]': '-1' is no layer; write [0-3,60]"),
        ("ffn[0,]", "stage 'ffn[0,]': '' is no layer; write [0-3,60]"),
        ("ffn[1000]", "stage 'ffn[1000]': '1000' is no layer; write [0-3,60]"),
        ("ffn[0][1]", "stage 'ffn[0][1]': '0][1' is no layer; write [0-3,60]"),
        ("ffn[\u0663]", "stage 'ffn[\u0663]': '\u0663' is no layer; write [0-3,60]"),
        ("ffn[3-1]", "stage 'ffn[3-1]': layers run upwards, 1-3"),
        ("ffn[0-3,2]", "stage 'ffn[0-3,2]': layer 2 stands twice"),
    ],
)
def test_selector_that_means_nothing_is_refused(text, want):
    assert message(parse_selector, text) == want


def test_role_that_names_a_layer_wins_over_the_rest():
    assigned = assign_stages({"a": [*REST, "ffn[0,3]"], "f": ["ffn"]}, TEXT)
    assert list(assigned) == TEXT
    assert [stage for stage, role in assigned.items() if role == "f"] == ["ffn[1]", "ffn[2]"]


def test_layers_count_for_attention_too():
    roles = {"a": ["embed", "attention[0-1]"], "b": ["attention", "ffn", "head"]}
    assigned = assign_stages(roles, TEXT)
    assert [assigned[f"attention[{n}]"] for n in range(4)] == ["a", "a", "b", "b"]


def test_role_may_say_both_the_kind_and_a_layer():
    assert assign_stages({"a": [*REST, "ffn", "ffn[0]"]}, TEXT)["ffn[0]"] == "a"


def test_vision_on_a_text_model_means_nothing():
    roles = {"v": ["vision"], "a": [*REST, "ffn"]}
    assert set(assign_stages(roles, TEXT).values()) == {"a"}
    assert assign_stages(roles, VISION)["vision"] == "v"


@pytest.mark.parametrize(
    ("roles", "want"),
    [
        ({"a": [*REST, "ffn"], "f": ["ffn"]},
         "roles.f.stages.0: ffn[0-3] in two roles: 'a' and 'f'; keep one, or name layers in one of "
         "them"),
        ({"a": [*REST, "ffn[0-2]"], "f": ["ffn", "ffn[2]"]},
         "roles.f.stages.1: ffn[2] in two roles: 'a' and 'f'; each layer belongs to one"),
        ({"a": [*REST, "ffn"], "f": ["head", "ffn[0]"]},
         "roles.f.stages.0: head in two roles: 'a' and 'f'; each stage belongs to one"),
        ({"a": REST}, "roles: no role runs ffn[0-3]"),
        ({"a": ["embed", "attention[0,2]", "ffn"]}, "roles: no role runs attention[1,3], head"),
        ({"a": [*REST, "ffn[0-60]"]},
         "roles.a.stages.3: no ffn[4]; the model has 4 layers: 0-3"),
        ({"a": [*REST, "ffn[0-3]"], "f": ["ffn"]},
         "roles.f.stages: role 'f' runs nothing: other roles name its layers"),
    ],
)  # fmt: skip
def test_stage_in_two_roles_or_none_is_refused(roles, want):
    assert message(assign_stages, roles, TEXT) == want


def test_vision_of_an_image_model_needs_a_role():
    assert message(assign_stages, {"a": [*REST, "ffn"]}, VISION) == "roles: no role runs vision"


def test_where_gives_the_place_that_messages_start_with():
    roles = {"a": [*REST, "ffn"], "f": ["ffn"]}
    lines = {"roles.f.stages.0": "run.yaml:9"}
    assert message(assign_stages, roles, TEXT, lines.get).startswith("run.yaml:9: ffn[0-3] in two")
