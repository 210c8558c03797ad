"""A worker's call with tensors that are none of its stage: refused in a sentence, then served."""

import ml_dtypes
import numpy as np
import pytest
from oracle.random_checkpoint import write_checkpoint

from step3_hetero.afd.asked import rows_asked
from step3_hetero.afd.link import Message
from step3_hetero.afd.messages import Kind
from step3_hetero.afd.wire import Wire
from step3_hetero.afd.worker import Worker
from step3_hetero.errors import EdgeMismatch
from step3_hetero.graph import GraphStage, build_graph
from step3_hetero.model.checkpoint import Checkpoint
from step3_hetero.model.config import ModelConfig
from step3_hetero.registry import get_backend
from step3_hetero.runtime.executor import LoadedStage
from step3_hetero.runtime.loader import stage_weights
from step3_hetero.specs import Limits, VisionSpec

ROWS, HIDDEN, EXPERTS, TOP_K = 3, 192, 5, 3
SIZES = dict(hidden_size=HIDDEN, num_hidden_layers=2, moe_layers_enum="1", moe_num_experts=EXPERTS,
             moe_intermediate_size=32, intermediate_size=32, share_expert_dim=32)  # fmt: skip


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
    """Return a dense and a MoE stage, ready to run."""
    folder = write_checkpoint(tmp_path_factory.mktemp("model"), dtype="fp32", **SIZES)
    model = ModelConfig.read(folder)
    checkpoint, device = Checkpoint.open(folder, model), get_backend("reference").open(0)
    graph, found = build_graph(model, dtype="float32"), {}
    for name in ("ffn[0]", "ffn[1]"):
        node = graph.by_name[name]
        weights = stage_weights(device, node, checkpoint, "auto")
        stage = device.build(node.spec, weights, None, Limits(ROWS, 1, 1))
        found[name] = LoadedStage(node, stage, device, "f")
    return found


class Caller:
    """A link whose messages are given and which keeps what is sent."""

    def __init__(self, *messages):
        self.messages = list(messages)
        self.sent = []

    def receive(self, deadline_s):
        return self.messages.pop(0)

    def send(self, kind, seq, said, arrays=None, *, epoch=0):
        self.sent.append((kind, seq, said))


def call(seq, stage, arrays, **said):
    return Message(Kind.CALL, 0, seq, {"stage": stage, **said}, arrays)


def good(rows=ROWS, dtype=np.float32):
    ids = np.tile(np.arange(TOP_K, dtype=np.int32), (rows, 1))
    return {"u": np.ones((rows, HIDDEN), dtype), "weights": np.ones((rows, TOP_K), np.float32),
            "ids": ids}  # fmt: skip


def with_codes(scale):
    return {"u": np.ones((ROWS, HIDDEN), np.int8), "u.scale": scale}


SCALE = np.ones((ROWS, 2), np.float32)


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"u": np.float32(1)}, r"u float32 \(\) refused"),
        ({"u": np.ones(HIDDEN, np.float32)}, r"u float32 \(192,\) refused"),
        ({"u": np.ones((ROWS, 7), np.float32)}, r"u .*\(3, 7\) refused; allowed: .*tokens, 192"),
        ({"u": np.ones((ROWS, HIDDEN, 1), np.float32)}, "u .* refused"),
        ({"u": np.ones((ROWS, HIDDEN), np.int32)}, "u int32 .*; allowed: float32 or int8"),
        ({"weights": np.float32(1)}, "weights .* refused"),
        ({"weights": np.ones((ROWS, 1), np.float32)}, r"weights .*; allowed: float32 \(tokens, 3"),
        ({"weights": np.ones((ROWS, TOP_K), np.int8)}, "it takes u, weights, ids with weights.sca"),
        ({"ids": np.zeros((ROWS, TOP_K + 1), np.int32)}, "ids .* refused"),
        ({"ids": np.zeros((ROWS, TOP_K))}, "ids float64 .*; allowed: int32"),
        ({"ids": np.full((ROWS, TOP_K), EXPERTS, np.int32)}, "allowed: int32 from -1 to 4"),
        ({"weights": None}, "u, ids refused; it takes u, weights, ids"),
        ({"ids": None}, "it takes u, weights, ids"),
        ({"u": None}, "it takes u, weights, ids"),
        ({"u": None, "weights": None, "ids": None}, "no tensor refused"),
        ({"v": np.float32(1)}, "u, weights, ids, v refused"),
        ({"u.scale": SCALE}, "u.scale refused"),
        (with_codes(None), "it takes u, weights, ids with u.scale"),
        (with_codes(np.float32(1)), "u.scale .* refused"),
        (with_codes(SCALE[:, :1]), r"u.scale .*; allowed: float32 \(tokens, 2\)"),
        (with_codes(SCALE.astype(np.float64)), "u.scale float64 .* refused"),
        (with_codes(SCALE[:2]), "rows .* refused; allowed: alike, to 3"),
        ({"u": np.ones((2, HIDDEN), np.float32)}, "rows .* refused; allowed: alike, to 3"),
        (good(ROWS + 1), "rows .* refused; allowed: alike, to 3"),
    ],
)  # fmt: skip
def test_tensors_that_are_none_of_the_stage_are_refused_and_the_next_call_is_answered(
    loaded, changed, said
):
    bad = {n: x for n, x in (good() | changed).items() if x is not None}
    caller = Caller(call(5, "ffn[1]", bad), call(6, "ffn[1]", good()))
    worker = Worker(loaded, Wire("int8"), Wire(), ROWS)
    assert worker._from_caller(caller) and worker._from_caller(caller)
    (kind, seq, answer), (kind_after, seq_after, _) = caller.sent
    assert (kind, seq, kind_after, seq_after) == (Kind.FAILED, 5, Kind.ANSWER, 6)
    with pytest.raises(EdgeMismatch, match=said):
        raise EdgeMismatch(answer["why"])
    assert answer["why"].startswith("ffn[1]: ")


@pytest.mark.parametrize(
    ("stage", "wire", "arrays"),
    [
        ("ffn[0]", "", {"u": good()["u"]}),
        ("ffn[1]", "", good(0)),
        ("ffn[1]", "bfloat16", good(dtype=ml_dtypes.bfloat16)),
        ("ffn[1]", "int8", good() | with_codes(SCALE)),
    ],
    ids=["dense", "no rows", "cast", "codes"],
)
def test_tensors_as_a_caller_sends_them_are_answered(loaded, stage, wire, arrays):
    caller = Caller(call(5, stage, arrays))
    assert Worker(loaded, Wire(wire), Wire(), ROWS)._from_caller(caller)
    ((kind, _, said),) = caller.sent
    assert kind == Kind.ANSWER, said


def test_refusal_of_a_long_name_is_short(loaded):
    caller = Caller(call(5, "x" * 100_000, {}))
    assert Worker(loaded, Wire(), Wire(), ROWS)._from_caller(caller)
    assert len(caller.sent[0][2]["why"]) <= 2000


VISION = GraphStage(
    "vision", None, VisionSpec("float32", 3, 8, 1, 1, 8, 14, 56, 8, 8, 2, 1e-5), (), (), ()
)  # fmt: skip


@pytest.mark.parametrize(
    "pixels",
    [
        np.float32(1),
        np.ones((1, 56, 56), np.float32),
        np.ones((1, 56, 42, 3), np.float32),
        np.ones((1, 14, 14, 3), np.float32),
        np.ones((1, 56, 56, 4), np.float32),
        np.ones((1, 56, 56, 3)),
    ],
)
def test_pixels_that_are_no_images_are_refused(pixels):
    with pytest.raises(EdgeMismatch, match=r"vision: pixels .* refused; allowed: float32 \(images"):
        rows_asked(VISION, {"pixels": pixels}, Wire(), ROWS)
    assert rows_asked(VISION, {"pixels": np.ones((2, 42, 42, 3), np.float32)}, Wire(), ROWS) == 2
