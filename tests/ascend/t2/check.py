"""What run.py starts beside the real torch_npu: signatures, kernels, a real-size layer in shapes.

``python check.py SCHEMAS`` prints one line for each thing that is wrong and exits 1 if any is.
"""

from __future__ import annotations

import inspect
import json
import sys
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch_npu
from torch._subclasses.fake_tensor import FakeTensorMode
from torch_npu.npu._npugraph_handlers.npugraph_handler import _NPU_GRAPH_OP_HANDLERS

from step3_hetero.backend import BatchMeta
from step3_hetero.backends.ascend import vendor
from step3_hetero.backends.ascend.attention import AscendCache
from step3_hetero.backends.ascend.collective import hccl
from step3_hetero.backends.ascend.linear import LinearWeights
from step3_hetero.backends.ascend.moe import ExpertWeights
from step3_hetero.registry import get_backend
from step3_hetero.specs import AttentionSpec, CacheSpec, FfnSpec, Limits, RouterSpec

USED = Path(__file__).parents[1] / "device" / "used.json"
HIDDEN, HEADS, HEAD_DIM, RANK, EXPERTS, INTER = 7168, 64, 256, 2048, 48, 5120
BF16 = torch.bfloat16


def signatures(recorded: dict[str, str]) -> Iterator[str]:
    """Yield the ops whose real signature is not the recorded one."""
    for name, signature in recorded.items():
        op = getattr(torch.ops.npu, name, None)
        want = str(torch._C.parse_schema(f"npu::{signature}"))
        got = "none" if op is None else str(op.default._schema)
        if got != want:
            yield f"{name}: recorded {want}\n    torch_npu has {got}"


def runtime(recorded: dict[str, list[str]]) -> Iterator[str]:
    """Yield what captures graphs and has other parameters, or does not know our attention."""
    for name, want in recorded.items():
        found = torch.npu
        for part in name.split("."):
            found = getattr(found, part, None)
        got = None if found is None else list(inspect.signature(found).parameters)
        if got != want:
            yield f"torch.npu.{name}: recorded {want}, torch_npu has {got}"
    handler = _NPU_GRAPH_OP_HANDLERS.get("npu_fused_infer_attention_score.default")
    specs = (
        [] if handler is None else handler.get_update_specs("npu_fused_infer_attention_score.out")
    )
    if "actual_seq_lengths_kv" not in [key for *_, key in specs]:
        yield "graphs: the fused attention's actual_seq_lengths_kv cannot be updated"


def collectives() -> Iterator[str]:
    """Yield what is wrong with HCCL's process group, made over the stand-in driver for one rank."""
    deadline = timedelta(seconds=7)
    group = hccl(torch.distributed.HashStore(), 0, 1, "127.0.0.1", deadline)
    if (group.rank(), group.size(), group.options._timeout) != (0, 1, deadline):
        yield f"hccl: rank {group.rank()} of {group.size()}, {group.options._timeout}"
    for name in ("allgather", "alltoall_base", "abort"):
        if not hasattr(group, name):
            yield f"hccl: its process group has no {name}"


def kernels(names: list[str]) -> Iterator[str]:
    """Yield torch's own ops that the backend was seen to use and that have no NPU kernel."""
    for name in names:
        base = name.partition(".")[0]
        forms = (name, f"{base}.out", base)
        if not any(_registered(f"aten::{form}") for form in forms):
            yield f"aten::{name} has no kernel of the NPU's"


def _registered(name: str) -> bool:
    try:
        return bool(torch._C._dispatch_has_kernel_for_dispatch_key(name, "PrivateUse1"))
    except RuntimeError:  # no such overload
        return False


def layer(device: Any) -> Iterator[str]:
    """Run a real-size MoE layer through the vendor's own shape functions, without a number."""
    for what, meta, kv in (("64 sequences decode", decoding(64, 8192), "bfloat16"),
                           ("64 sequences decode, INT8 cache", decoding(64, 8192), "int8"),
                           ("a prompt", prompt(512), "bfloat16"),
                           ("a prompt, INT8 cache", prompt(512), "int8")):  # fmt: skip
        tokens = meta.tokens
        cache = AscendCache(CacheSpec(1, HEAD_DIM, 4096, kv), device.device)
        attention = device.build(_attention_spec(), _attention_weights(), cache, LIMITS)
        attention.plan(meta)
        x, y = (_empty(tokens, HIDDEN) for _ in range(2))
        got = dict(attention.run({"x": x, "y": y}))
        for form in (None, torch.int8):
            ffn = device.build(_ffn_spec(), _ffn_weights(form), None, LIMITS)
            got |= ffn.run({"u": got["u"], "weights": got["weights"], "ids": got["ids"]})
            wanted = {"x": (tokens, HIDDEN), "u": (tokens, HIDDEN), "y": (tokens, HIDDEN),
                      "weights": (tokens, 3), "ids": (tokens, 3)}  # fmt: skip
            for name, shape in wanted.items():
                dtype = torch.int32 if name == "ids" else BF16
                if (tuple(got[name].shape), got[name].dtype) != (shape, dtype):
                    yield f"{what}: {name} is {got[name].dtype} {tuple(got[name].shape)}"
                if got[name].device.type != "npu":
                    yield f"{what}: {name} lies on {got[name].device}"


def calls() -> Iterator[str]:
    """Try the calls that the layer has none of: parts merged, INT8 products, formats."""
    rows = _empty(64, HEAD_DIM)
    sums = _empty(64, dtype=torch.float32)
    q, scale = vendor.quantise_rows(_empty(4, HIDDEN))
    product = vendor.quantised_product(
        q, _empty(HIDDEN, 96, dtype=torch.int8), _empty(96, dtype=torch.float32), scale
    )
    codes, scales = (
        _empty(8, 1, 128, HEAD_DIM, dtype=torch.int8),
        _empty(8, 1, 128, dtype=torch.float32),
    )
    table = _empty(4, 2, dtype=torch.int32)
    over_int8 = vendor.fused_attention(
        _empty(4, HEADS, 1, HEAD_DIM), codes, codes, kv_heads=1, scale=1.0, block_table=table,
        block_size=128, kv_lengths=[256] * 4, lse=True, scales=(scales, scales),
    )  # fmt: skip
    for name, got, want in (
        ("attention over INT8", over_int8[0], (4, HEADS, 1, HEAD_DIM)),
        ("its sums", over_int8[1], (4, HEADS, 1, 1)),
        ("merge_parts", vendor.merge_parts([sums, sums], [rows, rows]), (64, HEAD_DIM)),
        ("quantised_product", product, (4, 96)),
        ("rotate", vendor.rotate(_empty(1, 4, 64, 256), *[_empty(1, 4, 1, 256)] * 2),
         (1, 4, 64, 256)),
    ):  # fmt: skip
        if tuple(got.shape) != want:
            yield f"{name}: {tuple(got.shape)}, expected {want}"


LIMITS = Limits(576, 64, 512)


def decoding(seqs: int, context: int) -> BatchMeta:
    """Return a batch of sequences that add one token each."""
    blocks = -(-context // 128)
    table = np.arange(seqs * blocks, dtype=np.int32).reshape(seqs, blocks)
    last = np.full(seqs, context - 1, np.int32)
    slots = (table[:, -1] * 128 + (context - 1) % 128).astype(np.int32)
    starts = np.arange(seqs + 1, dtype=np.int32)
    return BatchMeta(last, slots, starts, last + 1, table)


def prompt(tokens: int) -> BatchMeta:
    """Return a batch of one prompt."""
    places = np.arange(tokens, dtype=np.int32)
    table = np.arange(-(-tokens // 128), dtype=np.int32)[None]
    ends = np.array([0, tokens], np.int32)
    return BatchMeta(places, places, ends, ends[1:], table)


def _empty(*shape: int, dtype: torch.dtype = BF16) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="npu")


def _attention_spec() -> AttentionSpec:
    router = RouterSpec(EXPERTS, 3, False, "float32")
    return AttentionSpec(
        "bfloat16", HIDDEN, HEADS, 1, HEAD_DIM, RANK, 1e-5, 5e5, 65536, True, router
    )


def _ffn_spec() -> FfnSpec:
    return FfnSpec("bfloat16", HIDDEN, INTER, EXPERTS, 3, INTER)


def _linear(columns: int, rows: int, dtype: torch.dtype = BF16) -> LinearWeights:
    if dtype == torch.int8:
        scale = _empty(rows, dtype=torch.float32)
        return LinearWeights(_empty(columns, rows, dtype=dtype), None, scale, (), {}, "", 0)
    return LinearWeights(_empty(rows, columns, dtype=dtype), None, None, (), {}, "", 0)


def _attention_weights() -> dict[str, Any]:
    return {
        "input_norm": _empty(HIDDEN),
        "inter_norm": _empty(RANK),
        "post_norm": _empty(HIDDEN),
        "qkv": _linear(HIDDEN, RANK + 2 * HEAD_DIM),
        "wq": _linear(RANK, HEADS * HEAD_DIM),
        "o_proj": _linear(HEADS * HEAD_DIM, HIDDEN),
        "router": _linear(HIDDEN, EXPERTS, torch.float32),
    }


def _ffn_weights(form: torch.dtype | None) -> dict[str, Any]:
    dtype = form or BF16
    scales = None
    if form is not None:
        scales = (_empty(EXPERTS, 2 * INTER, dtype=torch.float32),
                  _empty(EXPERTS, HIDDEN, dtype=torch.float32))  # fmt: skip
    stacks = (_empty(EXPERTS, HIDDEN, 2 * INTER, dtype=dtype),
              _empty(EXPERTS, INTER, HIDDEN, dtype=dtype))  # fmt: skip
    return {
        "experts": ExpertWeights(*stacks, scales, (), {}, "", 0),
        "shared_gate_up": _linear(HIDDEN, 2 * INTER, dtype),
        "shared_down": _linear(INTER, HIDDEN, dtype),
    }


def main(schemas: Path) -> int:
    """Print what is wrong and return the exit code."""
    recorded = json.loads(schemas.read_text(encoding="utf-8"))
    print(f"torch_npu {torch_npu.__version__} over a stand-in driver, torch {torch.__version__}")
    wrong = list(signatures(recorded["ops"]))
    print(f"signatures: {len(recorded['ops']) - len(wrong)} of {len(recorded['ops'])} equal")
    other = list(runtime(recorded["runtime"]))
    print(f"what captures graphs: {len(recorded['runtime'])} methods, {len(other)} wrong")
    groups = list(collectives())
    print(f"HCCL's process group: {'made' if not groups else 'WRONG'}")
    used = json.loads(USED.read_text(encoding="utf-8"))
    missing = list(kernels(used))
    print(f"torch's own ops in use: {len(used) - len(missing)} of {len(used)} have an NPU kernel")
    device = get_backend("ascend").open(0)
    with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
        shapes = [*layer(device), *calls()]
    print(f"a real-size MoE layer, bfloat16 and INT8, in shapes: {len(shapes)} wrong")
    found = (*wrong, *other, *groups, *missing, *shapes)
    for said in found:
        print(f"  {said}")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
