"""cpu's fused stages against the same stages composed of its kernels, padded and not."""

import zlib

import numpy as np
import pytest

from step3_hetero.backend import BatchMeta
from step3_hetero.composed import PerRow, compose
from step3_hetero.graph import build_graph
from step3_hetero.model.config import ModelConfig, TextConfig
from step3_hetero.runtime.loader import stage_weights
from step3_hetero.specs import CacheSpec, HostTensor, Limits

LIMITS = Limits(64, 4, 4)
MODEL = ModelConfig(
    text=TextConfig(
        hidden_size=40,
        num_hidden_layers=2,
        intermediate_size=56,
        num_attention_heads=3,
        num_attention_groups=1,
        head_dim=24,
        share_q_dim=20,
        moe_layers=(1,),
        moe_num_experts=5,
        moe_top_k=2,
        moe_intermediate_size=32,
        share_expert_dim=48,
        norm_expert_weight=False,
        rms_norm_eps=1e-3,
        rope_theta=1e4,
        max_positions=512,
        vocab_size=64,
        bos_token_id=None,
        eos_token_ids=(),
    ),
    vision=None,
    image_token_id=None,
    projector_stride=2,
    projector_bias=None,
    dtype="float32",
    fp8_blocks=False,
    name="stages",
)


class Drawn:
    """Weights drawn by name."""

    def __init__(self, graph):
        self.shapes = {
            t: p.shapes[key] for s in graph.stages for p in s.params for key, t in p.tensors.items()
        }

    def tensor(self, name):
        rng = np.random.default_rng(zlib.crc32(name.encode()))
        shape = self.shapes[name]
        values = (
            rng.standard_normal(shape) * shape[-1] ** -0.5
            if len(shape) > 1
            else 1 + rng.random(shape)
        )
        return HostTensor(name, values.astype(np.float32))


def whole_block(block):
    positions = np.arange(128, dtype=np.int32)
    ends = np.array([0, 128], np.int32)
    return BatchMeta(
        positions, positions + 128 * block, ends, ends[1:], np.array([[block]], np.int32)
    )


def run(device, stage, cache, build, meta, inputs):
    built = build(device, stage, cache)
    built.plan(meta)
    outputs = built.run({n: device.from_host(a) for n, a in inputs.items()})
    return {n: device.to_host(a) for n, a in outputs.items()}


def fused(device, stage, cache):
    weights = stage_weights(
        device, stage, Drawn(build_graph(MODEL, dtype=stage.spec.dtype)), "auto"
    )
    return device.build(stage.spec, weights, cache, LIMITS)


def composed(device, stage, cache):
    weights = stage_weights(
        device, stage, Drawn(build_graph(MODEL, dtype=stage.spec.dtype)), "auto"
    )
    return compose(device, stage.spec, weights, cache, LIMITS)


def drawn_inputs(stage, tokens, rng):
    sizes = {"hidden": 40, "top_k": 2, "tokens": tokens}
    inputs = {}
    for port in stage.takes:
        shape = [sizes[d] for d in port.dims]
        if port.dtype == "int32":
            inputs[port.name] = rng.integers(0, 5, shape).astype(np.int32)
        else:
            inputs[port.name] = rng.random(shape).astype(np.float32)
    return inputs


@pytest.mark.parametrize("name", ["attention[0]", "attention[1]", "ffn[0]", "ffn[1]"])
@pytest.mark.parametrize("padding", [0, 3])
@pytest.mark.parametrize("tokens", [0, 1, 9])
def test_fused_stage_gives_what_the_composed_one_gives(name, padding, tokens, cpu, make_meta):
    stage = build_graph(MODEL, dtype="float32").by_name[name]
    rng = np.random.default_rng(1)
    lengths = [] if tokens == 0 else [1] * (tokens > 1) + [tokens - (tokens > 1)]
    meta = make_meta(lengths, [n + 100 for n in lengths], blocks=4, rng=rng, padding=padding)
    inputs = drawn_inputs(stage, meta.tokens, rng)
    one, other = (
        run(cpu, stage, cpu.open_cache(CacheSpec(1, 24, 4, "float32")), build, meta, inputs)
        for build in (fused, composed)
    )
    assert one.keys() == other.keys() == {t.name for t in stage.gives}
    for key in one:
        np.testing.assert_allclose(one[key], other[key], rtol=2e-5, atol=2e-6)


def test_a_stage_writes_into_the_buffers_it_is_given(cpu, make_meta):
    stage = build_graph(MODEL, dtype="float32").by_name["ffn[0]"]
    built = fused(cpu, stage, None)
    inputs = {"u": cpu.from_host(np.ones((4, 40), np.float32))}
    buffer = {"y": cpu.empty((4, 40), "float32")}
    returned = built.run(inputs, buffer)
    assert returned is buffer
    np.testing.assert_array_equal(cpu.to_host(buffer["y"]), cpu.to_host(built.run(inputs)["y"]))


def test_padding_does_not_change_the_rows_before_it(cpu, reference, make_meta):
    stage = build_graph(MODEL, dtype="float32").by_name["attention[1]"]
    for device in (cpu, reference):
        results = []
        for padding in (0, 5):
            rng = np.random.default_rng(2)
            meta = make_meta([6], [6], blocks=4, rng=rng, padding=padding)
            inputs = drawn_inputs(stage, 6, np.random.default_rng(3))
            padded = {n: np.concatenate([a, a[:padding]]) for n, a in inputs.items()}
            cache = device.open_cache(CacheSpec(1, 24, 4, "float32"))
            results.append(run(device, stage, cache, fused, meta, padded))
            written = cache.read(range(4))[0]
            assert np.count_nonzero(written.any(-1)) == 6
        for key in results[0]:
            np.testing.assert_allclose(results[0][key], results[1][key][:6], rtol=1e-5, atol=1e-6)


def test_invariant_stages_run_row_by_row_in_any_backend(cpu, reference):
    graph = build_graph(MODEL, dtype="float32", batch_invariant=True)
    for device in (cpu, reference):
        assert isinstance(fused(device, graph.by_name["ffn[1]"], None), PerRow)


def test_copied_blocks_hold_what_their_sources_hold(cpu, reference):
    rng = np.random.default_rng(4)
    k = rng.standard_normal((128, 1, 24)).astype(np.float32)
    for device in (cpu, reference):
        cache = device.open_cache(CacheSpec(1, 24, 4, "float32"))
        batch = device.batch(whole_block(2))
        cache.write(device.from_host(k), device.from_host(-k), batch)
        cache.copy_blocks([(2, 0)])
        keys, values = cache.read([0, 2])
        np.testing.assert_array_equal(keys[0], k)
        np.testing.assert_array_equal(values[0], -k)
