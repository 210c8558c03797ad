"""Ranks of an attention instance on the stand-in: their heads together are the stage."""

import numpy as np
import pytest
from afd.in_step import Meeting
from afd.test_tp_heads import MOE, given, ranks_of, run, staged
from oracle.random_checkpoint import write_checkpoint

from step3_hetero.backends.torch_common.graphs import GraphedStage
from step3_hetero.model.checkpoint import Checkpoint
from step3_hetero.model.config import ModelConfig

SIZES = dict(hidden_size=64, num_hidden_layers=2, moe_layers_enum="1", head_dim=32,
             num_attention_heads=8, share_q_dim=48)  # fmt: skip


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("groups", [1, 2])
def test_ranks_agree_to_the_bit_and_are_the_stage(backend, tmp_path, dtype, groups):
    folder = write_checkpoint(tmp_path, num_attention_groups=groups, **SIZES)
    model = ModelConfig.read(folder)
    checkpoint = Checkpoint.open(folder, model)
    whole, nodes = ranks_of(model, dtype, MOE, 2)
    batches, meeting = given(whole), Meeting(2)
    want = run(whole, checkpoint, batches, backend.open(0))

    def work(rank):
        device = backend.open(0)
        return run(nodes[rank], checkpoint, batches, device, meeting.reduce(rank, device))

    first, second = meeting.each(work)
    assert meeting.sums == len(batches)
    unit = 2.0**-8 if dtype == "bfloat16" else 2.0**-22
    for mine, theirs, whole_s in zip(first, second, want, strict=True):
        assert all(mine[key].tobytes() == theirs[key].tobytes() for key in mine)
        for key in ("x", "u"):
            got, known = (x[key].astype(np.float64) for x in (mine, whole_s))
            assert np.abs(got - known).max() <= 4 * unit * np.abs(known).max()


@pytest.mark.parametrize("reduce", [None, lambda x: x])
def test_a_stage_that_waits_for_other_ranks_is_never_captured(backend, tmp_path, reduce):
    folder = write_checkpoint(tmp_path, **SIZES)
    model = ModelConfig.read(folder)
    whole, _ = ranks_of(model, "bfloat16", MOE, 1)
    device = backend.open(0)
    device.graphs = True  # the stand-in captures nothing, and refuses the option
    stage = staged(whole, Checkpoint.open(folder, model), device, reduce)
    assert isinstance(stage, GraphedStage) == (reduce is None)
