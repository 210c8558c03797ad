"""The heads of an attention instance's ranks: together they are the stage, each reads its own."""

from itertools import pairwise

import numpy as np
import pytest
from afd.in_step import Meeting
from oracle.random_checkpoint import write_checkpoint

from step3_hetero.backend import BatchMeta
from step3_hetero.conformance.tolerance import judge
from step3_hetero.errors import CheckpointError, ConfigError, PlacementError, UnsupportedOp
from step3_hetero.graph import build_graph
from step3_hetero.graph.sharding import role_stages
from step3_hetero.model.checkpoint import Checkpoint
from step3_hetero.model.config import ModelConfig, step3
from step3_hetero.registry import get_backend
from step3_hetero.runtime.loader import open_cache, stage_weights
from step3_hetero.runtime.resolving import process_of, read_config, resolve
from step3_hetero.specs import Cut, Limits

HIDDEN, TOKENS, BLOCKS = 64, 5, 2
SIZES = dict(hidden_size=HIDDEN, num_hidden_layers=2, moe_layers_enum="1", head_dim=32,
             num_attention_heads=8, share_q_dim=48)  # fmt: skip
GROUPS = {"mfa": 1, "gqa": 2, "mha": 8}
"""KV heads under eight query heads."""
STORED = {"fp32": "float32", "bf16": "bfloat16", "fp8": "bfloat16"}
FIRST, MOE = "attention[0]", "attention[1]"
PROMPT = BatchMeta(
    np.arange(TOKENS, dtype=np.int32), np.arange(TOKENS, dtype=np.int32),
    np.array([0, TOKENS], np.int32), np.array([TOKENS], np.int32), np.zeros((1, 1), np.int32),
)  # fmt: skip
NEXT = BatchMeta(
    np.array([TOKENS], np.int32), np.array([TOKENS], np.int32), np.array([0, 1], np.int32),
    np.array([TOKENS + 1], np.int32), np.zeros((1, 1), np.int32),
)  # fmt: skip


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """Return, by stored dtype and number of KV heads, a checkpoint and its model."""
    found = {}
    for dtype in STORED:
        for name, groups in GROUPS.items():
            sizes = SIZES | {"num_attention_groups": groups}
            folder = write_checkpoint(tmp_path_factory.mktemp(f"{dtype}-{name}"), dtype=dtype,
                                      **sizes)  # fmt: skip
            model = ModelConfig.read(folder)
            found[dtype, name] = Checkpoint.open(folder, model), model
    return found


def ranks_of(model, dtype, name, tp, **more):
    """Return a whole stage and what each rank holds of it."""
    whole = build_graph(model, dtype=dtype, **more).by_name[name]
    return whole, [role_stages([whole], model, n, 1, tp)[0] for n in range(tp)]


def given(whole, seed=0):
    """Return the inputs of a prompt and of the token after it."""
    rng = np.random.default_rng(seed)
    rows = [(PROMPT, TOKENS), (NEXT, 1)]
    return [(m, {t.name: rng.standard_normal((n, HIDDEN)) for t in whole.takes}) for m, n in rows]


def staged(node, checkpoint, device, reduce=None):
    """Return a stage of attention with weights and a cache."""
    weights = stage_weights(device, node, checkpoint, "auto")
    split = {"reduce": reduce} if reduce else {}
    cache = open_cache(device, node, BLOCKS)
    return device.build(node.spec, weights, cache, Limits(TOKENS, 2, 1), **split)


def run(node, checkpoint, batches, device, reduce=None):
    """Return a stage's outputs for one batch after another."""
    stage, found = staged(node, checkpoint, device, reduce), []
    for meta, inputs in batches:
        stage.plan(meta)
        on_device = {n: device.from_host(x, node.spec.dtype) for n, x in inputs.items()}
        found.append({n: device.to_host(x) for n, x in stage.run(on_device).items()})
    return found


def together(nodes, checkpoint, batches, opened):
    """Return every rank's outputs; ``opened`` makes a rank's device."""
    meeting = Meeting(len(nodes))

    def work(rank):
        device = opened()
        return run(nodes[rank], checkpoint, batches, device, meeting.reduce(rank, device))

    found = meeting.each(work)
    assert meeting.sums > 0
    return found


def reference(**options):
    return lambda: get_backend("reference").open(0, options)


SPLITS = [
    (stored, heads, tp)
    for stored in STORED
    for heads in GROUPS
    for tp in (2, 4, 8)
    if stored != "fp8" or (tp == 2 and heads != "gqa")  # 8 heads of 32 are two blocks of 128
]


@pytest.mark.parametrize("name", [FIRST, MOE])
@pytest.mark.parametrize(("stored", "heads", "tp"), SPLITS)
def test_exact_ranks_are_the_exact_stage(checkpoints, stored, heads, tp, name):
    checkpoint, model = checkpoints[stored, heads]
    whole, nodes = ranks_of(model, "float64", name, tp)
    batches = given(whole)
    want = run(whole, checkpoint, batches, reference()())
    for got in together(nodes, checkpoint, batches, reference()):
        for mine, exact in zip(got, want, strict=True):
            assert mine.keys() == exact.keys()
            for key, x in exact.items():
                # float64 sums of at most 256 terms behind a softmax and two norms
                assert np.abs(mine[key] - x).max() <= 1e5 * 2.0**-53 * np.abs(x).max()
                assert np.abs(x).max() > 0.01


@pytest.mark.parametrize("backend", ["reference", "cpu", "cuda"])
@pytest.mark.parametrize(("stored", "heads", "tp"), SPLITS)
def test_ranks_agree_to_the_bit_and_err_no_more_than_rounding_explains(
    checkpoints, backend, stored, heads, tp
):
    opened = devices(backend)
    checkpoint, model = checkpoints[stored, heads]
    dtype = STORED[stored]
    whole, nodes = ranks_of(model, dtype, MOE, tp)
    exactly = ranks_of(model, "float64", MOE, tp)[0]
    batches = [(m, {n: x.astype(dtype).astype(np.float64) for n, x in inputs.items()})
               for m, inputs in given(whole)]  # fmt: skip
    want = run(exactly, checkpoint, batches, reference()())
    rounded = [together(nodes, checkpoint, batches, reference(summation=s))[0]
               for s in ("blocked", "in-order")]  # fmt: skip
    first, *others = together(nodes, checkpoint, batches, opened)
    for other in others:
        for mine, theirs in zip(first, other, strict=True):
            assert all(mine[key].tobytes() == theirs[key].tobytes() for key in mine)
    for step, got in enumerate(first):
        for key in ("x", "u"):
            judged = judge(got[key], want[step][key], [r[step][key] for r in rounded])
            assert (judged.row_error <= judged.row_bound).all()
            assert (judged.element_error <= judged.element_bound).all()


def devices(backend):
    if backend == "reference":
        return reference()
    pytest.importorskip("torch")
    if backend == "cuda":
        pytest.importorskip("triton")
    options = {"interpret": True} if backend == "cuda" else {}
    return lambda: get_backend(backend).open(0, options)


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_row_by_row_gives_a_row_the_bits_that_it_has_alone(checkpoints, backend):
    opened = devices(backend)
    checkpoint, model = checkpoints["fp32", "gqa"]
    whole, nodes = ranks_of(model, "float32", MOE, 2, batch_invariant=True)
    (prompt, inputs), _ = given(whole)
    alone = [
        (prompt.token(row), {n: x[row : row + 1] for n, x in inputs.items()})
        for row in range(TOKENS)
    ]
    at_once = together(nodes, checkpoint, [(prompt, inputs)], opened)[0][0]
    by_row = together(nodes, checkpoint, alone, opened)[0]
    for key, x in at_once.items():
        assert x.tobytes() == np.concatenate([rows[key] for rows in by_row]).tobytes()


@pytest.mark.parametrize(("heads", "tp", "kv"), [("mfa", 4, 1), ("gqa", 2, 1), ("gqa", 4, 1),
                                                 ("mha", 2, 4)])  # fmt: skip
def test_ranks_hold_every_query_head_once_and_the_kv_heads_that_it_reads(
    checkpoints, heads, tp, kv
):
    checkpoint, model = checkpoints["fp32", heads]
    whole, nodes = ranks_of(model, "float32", MOE, tp)
    params = [{p.name: p for p in node.params} for node in [whole, *nodes]]
    for name in ("wq", "o_proj"):
        assert params[0][name].elements == sum(p[name].elements for p in params[1:])
    for node, held in zip(nodes, params[1:], strict=True):
        assert (node.spec.heads, node.spec.kv_heads) == (8 // tp, kv)
        assert held["qkv"].shapes["q_proj"] == params[0]["qkv"].shapes["q_proj"]
        assert held["qkv"].shapes["k_proj"] == held["qkv"].shapes["v_proj"] == (32 * kv, HIDDEN)
        assert node.spec.cache(1).nbytes * GROUPS[heads] == whole.spec.cache(1).nbytes * kv
        for name in ("input_norm", "inter_norm", "post_norm", "router"):
            assert held[name] == params[0][name]
    bounds = [node.params[3].cuts["wq"][0] for node in nodes]
    assert [b.start for b in bounds[:1]] == [0] and bounds[-1].stop == 256
    assert all(a.stop == b.start for a, b in pairwise(bounds))
    device = get_backend("reference").open(0)
    for node, held in zip(nodes, params[1:], strict=True):
        loaded = stage_weights(device, node, checkpoint, "auto")
        assert loaded["o_proj"].nbytes == 4 * held["o_proj"].elements


def test_step3_s_ranks_share_its_one_kv_head():
    node = build_graph(step3(), dtype="bfloat16").by_name["attention[4]"]
    last = role_stages([node], step3(), 7, 1, 8)[0]
    assert (last.spec.heads, last.spec.kv_heads, last.spec.q_rank) == (8, 1, 2048)
    cuts = {p.name: p.cuts for p in last.params if p.cuts}
    assert cuts["wq"] == {"wq": (Cut(-2, 14336, 16384),)}
    assert cuts["o_proj"] == {"o_proj": (Cut(-1, 14336, 16384),)}
    assert cuts["qkv"] == {name: (Cut(-2, 0, 256),) for name in ("k_proj", "v_proj")}


def test_rank_0_holds_every_other_stage_and_the_others_their_heads_alone(checkpoints):
    model = checkpoints["fp32", "mfa"][1]
    stages = build_graph(model, dtype="float32").stages
    leader, follower, second = (role_stages(stages, model, n, 1, 2) for n in (0, 1, 2))
    assert [s.name for s in leader] == [s.name for s in stages] == [s.name for s in second]
    assert [s.name for s in follower] == [FIRST, MOE]
    assert all(mine == whole for mine, whole in zip(leader, stages, strict=True)
               if whole.kind != "attention")  # fmt: skip
    assert leader == second and leader[1] != follower[0]


def test_what_another_rank_holds_is_never_read(tmp_path):
    folder = write_checkpoint(tmp_path, **SIZES)
    model = ModelConfig.read(folder)
    place = Checkpoint.open(folder, model).places["model.layers.1.self_attn.o_proj.weight"]
    with next(folder.glob("*.safetensors")).open("r+b") as file:
        file.seek(place.entry.begin)
        file.write(np.float32(np.nan).tobytes())
    checkpoint, device = Checkpoint.open(folder, model), get_backend("reference").open(0)
    mine, other = ranks_of(model, "float32", MOE, 2)[1]
    assert stage_weights(device, other, checkpoint, "auto")
    with pytest.raises(CheckpointError, match=r"o_proj.weight\[\.\.\., 0:128\]\[0, 0\]"):
        stage_weights(device, mine, checkpoint, "auto")


@pytest.mark.parametrize(
    ("stored", "heads", "tp", "said"),
    [("fp32", "mfa", 3, r"3 refused: attention\[0\] has 8 query and 1 KV heads of 32; allowed: "
                        r"1, 2, 4, 8"),
     ("fp32", "gqa", 16, r"16 refused: .* 8 query and 2 KV heads of 32; allowed: 1, 2, 4, 8"),
     ("fp8", "gqa", 2, r"2 refused: .* of 32, cut at multiples of 128 columns; allowed: 1"),
     ("fp8", "mfa", 4, r"4 refused: .* of 32, cut at multiples of 128 columns; allowed: 1, 2")],
)  # fmt: skip
def test_degree_that_parts_a_head_or_a_scale_is_refused(checkpoints, stored, heads, tp, said):
    with pytest.raises(PlacementError, match=said):
        ranks_of(checkpoints[stored, heads][1], "float32", FIRST, tp)


def values(checkpoint, backend, tp):
    a = {"stages": ["embed", "attention", "head"], "backend": backend, "tp": tp}
    return {"version": 1, "model": str(checkpoint.folder), "runtime": {"processes": "per-role"},
            "roles": {"a": a, "f": {"stages": ["ffn"], "backend": "reference"}}}  # fmt: skip


def test_placement_counts_what_each_rank_holds(checkpoints):
    pytest.importorskip("torch")
    checkpoint, _ = checkpoints["fp32", "gqa"]
    one, two = (resolve(read_config(values(checkpoint, "cpu", tp), {})) for tp in (1, 2))
    whole, split = (r.placement.roles["a"] for r in (one, two))
    assert split.kv_bytes_per_block * 2 == whole.kv_bytes_per_block
    layer = 4 * (8 * 32 * (48 + HIDDEN) + 2 * 2 * 32 * HIDDEN)  # wq, o_proj, k, v in float32
    assert whole.weight_bytes - split.weight_bytes == 2 * layer // 2
    follower = process_of(two, "a", 1)
    assert follower.placement.roles["a"].stages == (FIRST, MOE)
    others = sum(4 * s.elements for s in one.graph.stages if s.kind in ("embed", "head"))
    assert split.heads_split.weight_bytes == split.weight_bytes - others
    assert (split.heads_split.heads, split.heads_split.kv_heads) == (4, 1)


def test_config_with_a_degree_that_cannot_be_is_refused_by_its_line(checkpoints):
    pytest.importorskip("torch")
    checkpoint, _ = checkpoints["fp32", "mfa"]
    with pytest.raises(ConfigError, match=r"roles\.a\.tp: 3 refused: attention\[0\] has 8 query"):
        resolve(read_config(values(checkpoint, "cpu", 3), {}))
    with pytest.raises(
        UnsupportedOp, match=r"roles\.a\.tp: 2 refused: reference on reference:0 cannot split "
        r"attention: it brings no collectives; allowed: 1"):  # fmt: skip
        resolve(read_config(values(checkpoint, "reference", 2), {}))


@pytest.mark.parametrize("reduce", [None, lambda x: x])
def test_a_stage_that_waits_for_other_ranks_is_never_captured(checkpoints, reduce):
    pytest.importorskip("triton")
    from step3_hetero.backends.cuda.graphs import GraphedStage

    checkpoint, model = checkpoints["fp32", "mfa"]
    device = devices("cuda")()
    device.options["graphs"] = True  # the interpreter captures nothing, and refuses the option
    stage = staged(ranks_of(model, "float32", MOE, 1)[0], checkpoint, device, reduce)
    assert isinstance(stage.inner, GraphedStage) == (reduce is None)
