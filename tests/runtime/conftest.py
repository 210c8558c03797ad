"""Random Step-3 checkpoints of odd shapes, and engines over them."""

from pathlib import Path

import numpy as np
import pytest
from oracle.forward import load as load_oracle
from oracle.forward import text_forward
from oracle.random_checkpoint import write_checkpoint

from step3_hetero.api import load, open_prompter
from step3_hetero.evals.digits import SINGLE, HeldOut, draw_digit
from step3_hetero.model.config import ModelConfig
from step3_hetero.runtime.engine import Engine
from step3_hetero.runtime.request import Request, SamplingParams

TINY = Path(__file__).resolve().parents[2] / "models" / "tiny-step3-digits"

ODD = {
    "hidden_size": 64,
    "num_hidden_layers": 4,
    "intermediate_size": 112,
    "num_attention_heads": 5,
    "head_dim": 48,
    "share_q_dim": 40,
    "moe_layers_enum": "1,3",
    "moe_num_experts": 5,
    "moe_top_k": 3,
    "moe_intermediate_size": 80,
    "share_expert_dim": 80,
    "norm_expert_weight": True,
    "rms_norm_eps": 0.05,
    "vocab_size": 130,
    "max_position_embedding": 640,
}
"""Nothing here is a power of two that a kernel could be lucky with."""

PLACEMENTS = [
    ("cpu", "cpu"),
    ("reference", "reference"),
    ("cpu", "reference"),
    ("reference", "cpu"),
]


@pytest.fixture(scope="session")
def odd(tmp_path_factory):
    return write_checkpoint(tmp_path_factory.mktemp("odd") / "model", shards=2, **ODD)


@pytest.fixture(scope="session")
def small(tmp_path_factory):
    """Write a random text model of two layers."""
    folder = tmp_path_factory.mktemp("small") / "model"
    return write_checkpoint(folder, num_hidden_layers=2, moe_layers_enum="1", vocab_size=130)


@pytest.fixture(scope="session")
def oracle(odd):
    config, weights = load_oracle(odd)
    return lambda ids: text_forward(config, weights, np.array(ids))


def config_of(model, attention="cpu", ffn="cpu", **runtime):
    stages = ["embed", "vision", "attention", "head"]
    return {
        "version": 1,
        "model": str(model),
        "roles": {
            "a": {"stages": stages, "backend": attention},
            "f": {"stages": ["ffn"], "backend": ffn},
        },
        "runtime": {"dtype": "fp32", **runtime},
    }


@pytest.fixture
def engine_of(odd):
    """Return an engine over the odd checkpoint, or over ``model``."""
    opened = []

    def make(attention="cpu", ffn="cpu", *, model=None, **runtime):
        engine = load(config_of(model or odd, attention, ffn, **runtime))
        opened.append(engine)
        return engine

    yield make
    for engine in opened:
        engine.close()


@pytest.fixture
def prompt():
    """Return ``n`` token ids that are never the model's end."""
    return lambda n, seed=0: np.random.default_rng(seed).integers(3, 128, n).tolist()


@pytest.fixture
def log_softmax():
    def apply(logits):
        wide = logits.astype(np.float64)
        wide = wide - wide.max(-1, keepdims=True)
        return wide - np.log(np.exp(wide).sum(-1, keepdims=True))

    return apply


@pytest.fixture
def shadow_report():
    """Return a function: ask four digits under a config with a shadow check; what it has seen."""

    def report(config):
        held = HeldOut.read(TINY)
        short = SamplingParams(max_tokens=6)
        asked = [Request(SINGLE, short, [draw_digit(pixels)]) for pixels in held.images[:4]]
        with load(config) as engine:
            engine.generate_all(asked)
            (shadow,) = engine.executor.observers
            return shadow.report()

    return report


@pytest.fixture
def checked():
    """Return a function: an engine of the digits model's size over an executor of the test's."""
    model = ModelConfig.read(TINY)
    prompter = open_prompter(model, TINY)

    def make(executor, *, max_batch=8, prefill_chunk=512, prefix_reuse=True, max_waiting=None):
        return Engine(
            model, executor, prompter,
            max_batch=max_batch, prefill_chunk=prefill_chunk,
            prefix_reuse=prefix_reuse, max_waiting=max_waiting,
        )  # fmt: skip

    return make
