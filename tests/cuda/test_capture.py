"""Where and how a CUDA graph is captured, told by a stand-in for torch's; and what it may not hold.

What it cannot tell: whether a card captures what is launched.
"""

from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from step3_hetero.backends.cuda import graphs, jobs
from step3_hetero.backends.cuda.attention import CudaCache
from step3_hetero.backends.cuda.jobs import META
from step3_hetero.backends.cuda.launch import recording
from step3_hetero.backends.cuda.linear import Codes, Integers, LinearWeights
from step3_hetero.backends.cuda.sampling import without
from step3_hetero.backends.cuda.stages import CudaAttention, CudaFfn
from step3_hetero.specs import AttentionSpec, CacheSpec, FfnSpec, RouterSpec

SECOND = torch.device("cuda", 1)


class Card:
    """Notes what is asked of torch.cuda, in order; the first card is the current one."""

    def __init__(self):
        self.said = []
        self.current = torch.device("cuda", 0)

    def torch(self):
        card = self

        class Stream:
            def __init__(self, place=None, name="side"):
                self.place = place or card.current
                self.name = f"{name} of {self.place}"

            def wait_stream(self, other):
                card.said.append(f"{self.name} waits for {other.name}")

        @contextmanager
        def device(place):
            before, card.current = card.current, place
            yield
            card.current = before

        @contextmanager
        def entered(stream):
            card.said.append(f"on {stream.name}")
            yield

        @contextmanager
        def graph(graph, *, stream=None, capture_error_mode="global"):
            where = "torch's own stream" if stream is None else stream.name
            card.said.append(f"captured on {where}, {capture_error_mode}, current {card.current}")
            yield

        cuda = SimpleNamespace(
            Stream=Stream, stream=entered, device=device, graph=graph, CUDAGraph=object,
            current_stream=lambda place=None: Stream(place, "current"),
        )  # fmt: skip
        return SimpleNamespace(cuda=cuda)


@pytest.fixture
def card(monkeypatch):
    made = Card()
    monkeypatch.setattr(graphs, "torch", made.torch())
    return made


def test_work_is_captured_on_the_device_that_holds_it(card):
    capture, runs = graphs.OnCard(SECOND), []
    for _ in range(2):
        card.said.clear()
        _, results = capture(lambda: runs.append(card.current) or {"y": len(runs)})
        assert card.said == [
            "side of cuda:1 waits for current of cuda:1",
            "on side of cuda:1",
            "current of cuda:1 waits for side of cuda:1",
            "captured on side of cuda:1, thread_local, current cuda:1",
        ]
    assert set(runs) == {SECOND} and len(runs) == 2 * (graphs.WARM_UPS + 1)
    assert results == {"y": len(runs)}
    assert card.current == torch.device("cuda", 0)


class NoHost(TorchDispatchMode):
    """Refuses what a capture cannot hold: arrays of the host beside a card's, numbers read back."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        met = [x for x in tree_leaves((args, kwargs, made)) if isinstance(x, torch.Tensor)]
        if any(x.device.type == "cpu" for x in met) or isinstance(made, bool | int | float):
            raise AssertionError(f"{func} meets the host")
        return made


def new(*shape, dtype=torch.bfloat16):
    return torch.empty(shape, dtype=dtype, device=META)


def dense(out, columns, dtype=torch.bfloat16):
    return LinearWeights(new(out, columns, dtype=dtype), (), None, dtype, 90, {}, "", 0)


def in_fp8(out, columns):
    codes, scales = new(out, columns, dtype=torch.uint8), new(out // 128, columns // 128)
    return LinearWeights(None, [Codes(codes, scales)], None, torch.bfloat16, 90, {}, "", 0)


def in_int8(out, columns):
    part = Integers((out, columns), META)
    return LinearWeights(None, [part], None, torch.bfloat16, 90, {}, "", 0)


def attention_stage(linear, kv):
    router = RouterSpec(48, 3, True, "float32")
    spec = AttentionSpec("bfloat16", 256, 64, 1, 128, 128, 1e-5, 5e5, 1024, True, router)
    weights = {
        "qkv": linear(384, 256), "wq": linear(64 * 128, 128), "o_proj": linear(256, 64 * 128),
        "router": dense(48, 256, torch.float32), "input_norm": new(256), "post_norm": new(256),
        "inter_norm": new(128),
    }  # fmt: skip
    return CudaAttention(None, spec, weights, CudaCache(CacheSpec(1, 128, 8, kv), META, 90))


@pytest.mark.parametrize("linear", [dense, in_fp8, in_int8])
@pytest.mark.parametrize("kv", ["bfloat16", "float8_e4m3fn", "int8"])
def test_a_decode_step_of_attention_stays_on_the_card(linear, kv):
    stage = attention_stage(linear, kv)
    stage.batch = graphs.DecodeBatch(4, 8, META)
    inputs = {"x": new(4, 256), "y": new(4, 256)}
    with recording(90) as launches:
        stage.run(inputs)  # as a warm-up does: tiles and angles are made here
        before = len(launches)
        with NoHost():
            stage.run(inputs)
    assert len(launches) == 2 * before > 0


@pytest.mark.parametrize("held", ["plain", "e4m3", "int8", "e4m3 x e4m3"])
def test_a_decode_step_of_experts_stays_on_the_card(held):
    spec = FfnSpec("bfloat16", 7168, 5120, 48, 3, 5120)
    linear = {"plain": dense, "int8": in_int8}.get(held, in_fp8)
    weights = {
        "shared_gate_up": linear(2 * 5120, 7168), "shared_down": linear(7168, 5120),
        "experts": jobs.stack(90, torch.bfloat16, held),
    }  # fmt: skip
    inputs = {"u": new(4, 7168), "weights": new(4, 3), "ids": new(4, 3, dtype=torch.int32)}
    with recording(90) as launches, NoHost():
        CudaFfn(spec, weights).run(inputs)
    assert launches


def test_a_banned_token_is_not_sent_to_the_card():
    """Copied there as an array it would hold the host until all that is queued is done."""
    with FakeTensorMode():
        logits = torch.empty(4, 128815, device="cuda")
        with NoHost():
            assert without(logits, 7).shape == logits.shape
            with pytest.raises(AssertionError, match="meets the host"):
                torch.full((1,), 7).to(logits.device)
