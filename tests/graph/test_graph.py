"""The stage graph: cut as designed, complete, and refused when it does not fit together."""

from dataclasses import replace

import pytest

from step3_hetero.errors import EdgeMismatch
from step3_hetero.graph import Edge, build_graph
from step3_hetero.graph.graph import check_graph
from step3_hetero.model.config import step3
from step3_hetero.model.layout import tensor_shapes
from step3_hetero.specs import FfnSpec, TensorSpec


@pytest.fixture(scope="module")
def graph():
    return build_graph(step3(), dtype="bfloat16")


def carried(graph, source, target):
    return [
        t.name for e in graph.edges if (e.source, e.target) == (source, target) for t in e.tensors
    ]


def test_attention_sends_u_and_routing_to_a_moe_layer_and_u_alone_to_a_dense_one(graph):
    assert carried(graph, "attention[4]", "ffn[4]") == ["u", "weights", "ids"]
    assert carried(graph, "attention[60]", "ffn[60]") == ["u"]


def test_the_residual_goes_from_attention_to_attention_and_never_through_an_ffn(graph):
    assert carried(graph, "attention[7]", "attention[8]") == ["x"]
    assert carried(graph, "attention[60]", "head") == ["x"]
    assert all(
        "x" not in carried(graph, e.source, e.target) for e in graph.edges if "ffn" in e.source
    )


def test_the_ffn_gives_y_to_the_next_attention_and_the_last_one_to_the_head(graph):
    assert carried(graph, "ffn[7]", "attention[8]") == ["y"]
    assert carried(graph, "ffn[60]", "head") == ["y"]


def test_the_first_attention_adds_nothing_and_the_others_add_y(graph):
    adds = [s.spec.adds for s in graph.stages if s.kind == "attention"]
    assert adds == [False] + [True] * 60


def test_every_published_tensor_belongs_to_exactly_one_stage(graph):
    held = [t for s in graph.stages for p in s.params for t in p.tensors.values()]
    assert sorted(held) == sorted(tensor_shapes(step3()))
    assert sum(s.elements for s in graph.stages) == 320_969_912_832


def test_norm_and_router_belong_to_attention_experts_to_the_ffn(graph):
    names = {p.name for p in graph.by_name["attention[4]"].params}
    assert {"input_norm", "post_norm", "router"} <= names
    ffn = {p.name: p.shard for p in graph.by_name["ffn[4]"].params}
    assert ffn == {"experts": "experts", "shared_gate_up": "columns", "shared_down": "rows"}


def test_alike_layers_are_one_group(graph):
    sizes = {group[0].name: len(group) for group in graph.groups()}
    assert (sizes["attention[4]"], sizes["ffn[4]"], sizes["ffn[0]"]) == (56, 56, 4)
    assert sizes["ffn[60]"] == 1


def test_router_logits_stay_wide_unless_asked_otherwise():
    def kept(choice):
        graph = build_graph(step3(), dtype="bfloat16", router_logits=choice)
        return graph.by_name["attention[4]"].spec.router.logits_dtype

    assert (kept("fp32"), kept("model")) == ("float32", "bfloat16")


def test_an_edge_of_the_wrong_dtype_is_refused_with_both_ends(graph):
    wrong = TensorSpec("u", ("tokens", "hidden"), "float32")
    edges = tuple(
        replace(e, tensors=(wrong, *e.tensors[1:])) if e.target == "ffn[2]" else e
        for e in graph.edges
    )
    with pytest.raises(EdgeMismatch, match=r"edge attention\[2\] -> ffn\[2\], tensor 'u'.*float32"):
        check_graph(replace(graph, edges=edges))


def test_a_port_that_nothing_feeds_is_refused(graph):
    edges = tuple(e for e in graph.edges if (e.source, e.kind) != ("ffn[5]", "F2A"))
    with pytest.raises(EdgeMismatch, match=r"attention\[6\]: tensor 'y' is fed by 0 edges"):
        check_graph(replace(graph, edges=edges))


def test_an_edge_that_runs_backwards_or_nowhere_is_refused(graph):
    back = Edge("ffn[5]", "attention[5]", "F2A", graph.by_name["ffn[5]"].gives)
    with pytest.raises(EdgeMismatch, match="runs backwards"):
        check_graph(replace(graph, edges=(*graph.edges, back)))
    lost = replace(back, target="ffn[99]")
    with pytest.raises(EdgeMismatch, match=r"no stage 'ffn\[99\]'"):
        check_graph(replace(graph, edges=(*graph.edges, lost)))


def test_specs_of_alike_layers_are_equal_so_that_their_code_can_be_shared(graph):
    specs = {s.spec for s in graph.stages if isinstance(s.spec, FfnSpec)}
    assert len(specs) == 2
