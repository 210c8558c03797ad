"""The shares of a set: together they are the stage, and each one reads and computes its own."""

from types import SimpleNamespace

import ml_dtypes
import numpy as np
import pytest
from oracle.random_checkpoint import write_checkpoint

from step3_hetero.afd.partials import added, own_experts
from step3_hetero.afd.wire import Wire
from step3_hetero.conformance.tolerance import judge
from step3_hetero.errors import (
    CheckpointError,
    ConfigError,
    EdgeMismatch,
    PlacementError,
    UnsupportedOp,
)
from step3_hetero.graph import build_graph
from step3_hetero.graph.sharding import process_stage
from step3_hetero.model.checkpoint import Checkpoint
from step3_hetero.model.config import ModelConfig
from step3_hetero.registry import get_backend
from step3_hetero.runtime.loader import stage_weights
from step3_hetero.runtime.resolving import read_config, resolve
from step3_hetero.specs import Cut, HostTensor, Limits, TensorSpec

EXPERTS, TOP_K, HIDDEN, ROWS = 5, 3, 64, 9
SIZES = dict(hidden_size=HIDDEN, num_hidden_layers=2, moe_layers_enum="1", moe_num_experts=EXPERTS,
             moe_intermediate_size=256, intermediate_size=384, share_expert_dim=320)  # fmt: skip
STORED = {"fp32": "float32", "bf16": "bfloat16", "fp8": "bfloat16"}
DENSE, MOE = "ffn[0]", "ffn[1]"


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """Return a checkpoint in each format, and its model."""
    found = {}
    for dtype in STORED:
        folder = write_checkpoint(tmp_path_factory.mktemp(dtype), dtype=dtype, **SIZES)
        model = ModelConfig.read(folder)
        found[dtype] = Checkpoint.open(folder, model), model
    return found


def stages_of(model, dtype, name, ep, tp=1):
    """Return a whole stage and its shares."""
    whole = build_graph(model, dtype=dtype).by_name[name]
    return whole, [process_stage(whole, model, n, ep, tp) for n in range(ep * tp)]


def inputs(dtype, seed=0):
    """Return a MoE stage's inputs; row 0 goes to experts 0 to 2 alone, the last row nowhere."""
    rng = np.random.default_rng(seed)
    ids = np.argsort(rng.random((ROWS, EXPERTS)), axis=1)[:, :TOP_K].astype(np.int32)
    ids[0], ids[-1] = [2, 0, 1], -1
    u = rng.standard_normal((ROWS, HIDDEN)).astype(dtype)
    return {"u": u, "weights": rng.random((ROWS, TOP_K)).astype(dtype), "ids": ids}


def run(node, checkpoint, given, backend="reference", **options):
    """Return y of one stage, ids as its member takes them."""
    device = get_backend(backend).open(0, options)
    weights = stage_weights(device, node, checkpoint, "auto")
    stage = device.build(node.spec, weights, None, Limits(ROWS, 1, 1))
    taken = own_experts(node, {t.name: given[t.name] for t in node.takes})
    dtype = node.spec.dtype
    on_device = {n: device.from_host(x, "int32" if n == "ids" else dtype) for n, x in taken.items()}
    return device.to_host(stage.run(on_device)["y"])


SPLITS = [
    (stored, ep, tp, name)
    for stored in STORED
    for ep, tp in ((2, 1), (3, 1), (EXPERTS, 1), (1, 2), (2, 3))
    for name in (DENSE, MOE)
    if stored != "fp8" or ep * tp <= 3  # 320 and 384 columns are three blocks of 128
]


@pytest.mark.parametrize(("stored", "ep", "tp", "name"), SPLITS)
def test_exact_shares_add_up_to_the_exact_stage(checkpoints, stored, ep, tp, name):
    checkpoint, model = checkpoints[stored]
    whole, shares = stages_of(model, "float64", name, ep, tp)
    given = inputs(np.float64)
    want = run(whole, checkpoint, given)
    total = sum(run(share, checkpoint, given) for share in shares)
    # float64 sums of at most 1,000 terms, none larger than ten times the largest result
    assert np.abs(total - want).max() <= 1e4 * 2.0**-53 * np.abs(want).max()
    assert np.abs(want).max() > 0.1


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize(("stored", "ep", "tp", "name"), SPLITS)
def test_share_errs_no_more_than_rounding_explains(checkpoints, backend, stored, ep, tp, name):
    if backend == "cpu":
        pytest.importorskip("torch")
    checkpoint, model = checkpoints[stored]
    given = inputs(STORED[stored])
    exact = {n: x if n == "ids" else x.astype(np.float64) for n, x in given.items()}
    rounding, exactly = (
        stages_of(model, dtype, name, ep, tp)[1] for dtype in (STORED[stored], "float64")
    )
    for share, exact_share in zip(rounding, exactly, strict=True):
        want = run(exact_share, checkpoint, exact)
        rounded = [run(share, checkpoint, given, summation=s) for s in ("blocked", "in-order")]
        judged = judge(run(share, checkpoint, given, backend), want, rounded)
        assert (judged.row_error <= judged.row_bound).all()
        assert (judged.element_error <= judged.element_bound).all()


@pytest.mark.parametrize("stored", STORED)
def test_shares_hold_every_weight_once(checkpoints, stored):
    checkpoint, model = checkpoints[stored]
    for name in (DENSE, MOE):
        whole, shares = stages_of(model, STORED[stored], name, 3)
        assert sum(s.elements for s in shares) == whole.elements
        device = get_backend("reference").open(0)
        held = [stage_weights(device, s, checkpoint, "auto") for s in [whole, *shares]]
        nbytes = [sum(w.nbytes for w in weights.values()) for weights in held]
        assert nbytes[0] == sum(nbytes[1:])
    assert [(s.share.first, s.spec.experts) for s in shares] == [(0, 2), (2, 2), (4, 1)]


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_row_without_an_expert_here_gets_exact_zeros_from_the_routed_part(checkpoints, backend):
    if backend == "cpu":
        pytest.importorskip("torch")
    checkpoint, model = checkpoints["fp32"]
    share = stages_of(model, "float32", MOE, 3)[1][2]  # expert 4 alone
    device, given = get_backend(backend).open(0), inputs(np.float32)
    stack = stage_weights(device, share, checkpoint, "auto")["experts"]
    taken = own_experts(share, given)
    for rows in (slice(None), slice(0, 1)):  # the kernels treat a single row apart
        u, weights, ids = (device.from_host(taken[n][rows]) for n in ("u", "weights", "ids"))
        y = device.to_host(device.kernel("experts")(u, weights, ids, stack))
        foreign = ~(given["ids"][rows] == 4).any(axis=1)
        assert foreign.any() and (y[foreign] == 0).all() and (y[~foreign] != 0).any(axis=1).all()


def test_what_another_member_holds_is_never_read(tmp_path):
    folder = write_checkpoint(tmp_path, **SIZES)
    model = ModelConfig.read(folder)
    name = "model.layers.1.moe.gate_proj.weight"
    place = Checkpoint.open(folder, model).places[name]
    with next(folder.glob("*.safetensors")).open("r+b") as file:
        file.seek(place.entry.begin)
        file.write(np.float32(np.nan).tobytes())
    checkpoint, device = Checkpoint.open(folder, model), get_backend("reference").open(0)
    mine, other = stages_of(model, "float32", MOE, 2)[1]
    assert stage_weights(device, other, checkpoint, "auto")
    with pytest.raises(CheckpointError, match=r"gate_proj.weight\[\.\.\., 0:3, :, :\]\[0, 0, 0\]"):
        stage_weights(device, mine, checkpoint, "auto")


def test_cut_within_a_scale_block_is_refused_and_scales_follow_their_rows():
    data = np.arange(300 * 128).reshape(300, 128).astype(ml_dtypes.float8_e4m3fn)
    tensor = HostTensor("w", data, np.array([[1.0], [2.0], [3.0]], np.float32))
    part = tensor.cut([Cut(-2, 128, 300)])
    assert part.shape == (172, 128) and part.scale_inv.tolist() == [[2.0], [3.0]]
    with pytest.raises(CheckpointError, match=r"w\[\.\.\., 64:128, :\].*multiples of 128"):
        tensor.cut([Cut(-2, 64, 128)])
    with pytest.raises(CheckpointError, match="multiples of 128"):
        tensor.cut([Cut(-1, 0, 64)])


@pytest.mark.parametrize(
    ("stored", "name", "ep", "said"),
    [("fp32", MOE, 6, "6 refused: ffn.1. has 5 experts to split; allowed: to 5"),
     ("fp8", DENSE, 4, "4 refused: ffn.0. has 3 pieces of 128 columns to split; allowed: to 3")],
)  # fmt: skip
def test_set_larger_than_what_there_is_to_split_is_refused(checkpoints, stored, name, ep, said):
    _, model = checkpoints[stored]
    with pytest.raises(PlacementError, match=said):
        stages_of(model, "float32", name, ep)


def test_config_with_too_large_a_set_is_refused_by_its_line(checkpoints):
    checkpoint, _ = checkpoints["fp32"]
    values = {"version": 1, "model": str(checkpoint.folder), "runtime": {"processes": "per-role"},
              "roles": {"a": {"stages": ["embed", "attention", "head"], "backend": "reference"},
                        "f": {"stages": ["ffn"], "backend": "reference"}}}  # fmt: skip
    f = values["roles"]["f"]
    f |= {"instances": 6, "ep": 6}
    with pytest.raises(ConfigError, match=r"roles\.f\.ep: 6 refused: ffn\[1\] has 5 experts"):
        resolve(read_config(values, {}))
    whole = resolve(read_config(values | {"roles": values["roles"] | {"f": f | {"ep": 1}}}, {}))
    halved = resolve(read_config(values | {"roles": values["roles"] | {"f": f | {"ep": 2}}}, {}))
    sizes = [r.placement.roles["f"].weight_bytes for r in (whole, halved)]
    assert 0.5 < sizes[1] / sizes[0] < 0.6  # three of five experts, half of the columns


@pytest.mark.parametrize("ids", [[[0, 5]], [[-2, 0]], [[0.0, 1.0]], [[2**31 - 1, 0]]])
@pytest.mark.parametrize("ep", [1, 2])
def test_id_that_is_no_expert_is_refused(checkpoints, ids, ep):
    node = stages_of(checkpoints["fp32"][1], "float32", MOE, ep)[1][0]
    ids = np.array(ids, np.float32 if isinstance(ids[0][0], float) else np.int32)
    with pytest.raises(
        EdgeMismatch, match=r"ffn\[1\]: ids .* refused; allowed: int32 from -1 to 4"
    ):
        own_experts(node, {"ids": ids})


def test_partial_sums_are_added_wide_in_the_order_of_members_and_rounded_once():
    device = get_backend("reference").open(0)
    specs = {"y": TensorSpec("y", ("tokens", "hidden"), "bfloat16")}
    parts = [np.array([[x, 1.0]], ml_dtypes.bfloat16) for x in (256.0, 1.0, 1.0)]
    sums = added(device, Wire(), [{"y": p} for p in parts], specs)["y"]
    assert sums.dtype == ml_dtypes.bfloat16
    assert sums.tolist() == [[258.0, 3.0]]  # each 1 alone would be lost beside 256
    wide = {"y": TensorSpec("y", ("tokens", "hidden"), "float32")}
    order = [np.array([[x]], np.float32) for x in (1e8, -1e8, 1.0)]
    assert added(device, Wire(), [{"y": p} for p in order], wide)["y"] == 1.0
    assert added(device, Wire(), [{"y": p} for p in reversed(order)], wide)["y"] == 0.0


@pytest.mark.parametrize(
    "other", [{}, {"y": np.zeros((2, 3), np.float32)}, {"z": np.zeros((1, 3), np.float32)}]
)
def test_partial_sums_that_do_not_fit_together_are_refused(other):
    device = get_backend("reference").open(0)
    specs = {"y": TensorSpec("y", ("tokens", "hidden"), "float32")}
    first = {"y": np.zeros((1, 3), np.float32)}
    with pytest.raises(EdgeMismatch, match="do not fit; allowed: y, alike"):
        added(device, Wire(), [first, other], specs)


def test_stage_that_is_no_ffn_stays_whole(checkpoints):
    graph = build_graph(checkpoints["fp32"][1], dtype="float32")
    for name in ("embed", "attention[1]", "head"):
        assert process_stage(graph.by_name[name], checkpoints["fp32"][1], 1, 2, 2).params == (
            graph.by_name[name].params
        )
    assert own_experts(SimpleNamespace(spec=graph.by_name["head"].spec), {}) == {}


def test_device_that_cannot_add_up_partial_sums_is_refused_before_anything_is_opened(
    checkpoints, monkeypatch
):
    f = {"stages": ["ffn"], "backend": "reference", "instances": 2, "ep": 2}
    a = {"stages": ["embed", "attention", "head"], "backend": "cpu"}
    values = {"version": 1, "model": str(checkpoints["bf16"][0].folder),
              "runtime": {"processes": "per-role"}, "roles": {"a": a, "f": f}}  # fmt: skip
    kind = type(get_backend("cpu"))
    able = kind.supports

    def narrow(self, info, spec):
        wide_sum = spec.op == "add" and spec.dtype == "float32"
        return "no such sums" if wide_sum else able(self, info, spec)

    monkeypatch.setattr(kind, "supports", narrow)
    with pytest.raises(
        UnsupportedOp, match=r"roles\.f: cpu of role 'a' cannot add up.*no such sum"
    ):
        resolve(read_config(values, {}))
    f |= {"instances": 1, "ep": 1}
    resolve(read_config(values, {}))
