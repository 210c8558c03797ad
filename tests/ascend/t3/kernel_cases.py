"""What the lowered kernels compute, held to the reference by the conformance suite itself."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from opencompiler import FOLDER, KERNELS, OnCpu, launches

from step3_hetero.backends.ascend import decode
from step3_hetero.backends.ascend.device import AscendDevice
from step3_hetero.conformance.case import Case
from step3_hetero.conformance.exam import CaseResult, examine
from step3_hetero.conformance.forms import OpTrial
from step3_hetero.conformance.suite import select
from step3_hetero.conformance.trial import Trial
from step3_hetero.registry import get_backend

SPLIT = 256
"""Keys of a part where contexts are cut."""


def case(heads: int, contexts: Sequence[int], draw: str = "normal") -> OpTrial:
    """Return decoding sequences with these contexts, one more row being padding."""
    blocks = sum(-(-n // 128) for n in contexts) + 2
    dims = {"heads": heads, "kv_heads": 1, "head_dim": 256, "queries": (1,) * len(contexts),
            "contexts": tuple(contexts), "blocks": blocks, "padding": 1}  # fmt: skip
    return OpTrial(Case("attention", "bfloat16", dims, {"scale": 0.0625}, draw))


MFA = "attention[heads=64,kv_heads=1,head_dim=256 queries=1+ bfloat16"
"""Step-3's heads in the conformance suite, decoding sequences among them."""

CASES = (
    case(64, (1, 127, 128, 129, 700)),
    case(64, (513, 256, 257, 40), "focused"),
    case(64, (300, 5), "large"),
    case(64, (4096,)),
    case(32, (130, 1, 600)),
    case(16, (130, 1, 600)),
    *select([MFA, "!kv=", "!65536"], full=True),
)
LONG = tuple(select([f"{MFA} 65536", "!kv="], full=True))
FAULTY = (case(64, (1, 129, 700)),)
"""The case that seeded defects have to fail."""

DEFECTS = {
    "scale left out": ("tl.dot(rows, tl.trans(k)) * scale", "tl.dot(rows, tl.trans(k))"),
    "mask dropped": (
        'tl.where((first + key)[None, :] < high, scores, float("-inf"))',
        "scores",
    ),
    "mask one key late": ("(first + key)[None, :] < high,", "(first + key)[None, :] <= high,"),
    "values beyond the context read": (
        "tl.load(values + at, mask=there, other=0.0)",
        "tl.load(values + at)",
    ),
    "earlier keys not shrunk": ("total * shrink[:, None] + tl.dot(", "total + tl.dot("),
    "block table ignored": (
        "tl.load(tables + seq * table_stride + first // PAGE)",
        "first // PAGE",
    ),
    "sums left out of the parts' weights": ("top + tl.log(weight)", "top"),
    "parts merged without their weights": ("share = tl.exp(known - higher)", "share = 1.0"),
}
"""Seeded defects: what is replaced in the kernels' source, by what. The last two are in the merge
of parts and show only there."""

MERGE = tuple(DEFECTS)[-2:]


def results(
    launch: OnCpu, cases: Sequence[Trial], split: int = 0, heads: Sequence[int] = (64,)
) -> Iterator[CaseResult]:
    """Examine cases on a device that decodes by the launcher, contexts cut by ``split``."""
    backend = get_backend("ascend")
    launch.compile([one for h in heads for cut in (False, True) for one in launches(h, split=cut)])
    device = AscendDevice(backend.devices()[0], 0, kv_split=split, triton=launch)
    for one in cases:
        yield examine(backend, device, one)


def all_results(launch: OnCpu) -> Iterator[tuple[str, CaseResult]]:
    """Examine every case, whole and in parts, and the attention stage at Step-3's size."""
    for split in (0, SPLIT):
        for result in results(launch, CASES, split, (64, 32, 16)):
            yield f"parts of {split}", result
    for result in results(launch, LONG, 16 * SPLIT):
        yield f"parts of {16 * SPLIT}", result
    stage = select(["attention_stage[step3- bfloat16", "!kv="], full=True)
    for result in results(launch, stage):
        yield "stage", result


def reads_beyond(launch: OnCpu) -> bool:
    """Say whether a result changes with what lies in the cache beyond the contexts: NaN or zero."""
    launch.compile(launches(64, split=False))
    draw = torch.Generator().manual_seed(0)
    contexts = torch.tensor([5, 130], dtype=torch.int32)
    table = torch.tensor([[4, 0], [1, 3]], dtype=torch.int32)
    q, k, v = (
        torch.randn(*shape, generator=draw).bfloat16()
        for shape in ((2, 64, 256), (5, 128, 1, 256), (5, 128, 1, 256))
    )
    seen = torch.zeros(5, 128, 1, 1, dtype=torch.bool)
    seen[4, :5] = seen[1] = seen[3, :2] = True
    results = []
    for beyond in (0.0, float("nan")):
        given = [x.to("npu") for x in (q, k.where(seen, beyond), v.where(seen, beyond))]
        out = decode.attend(launch, *given, table.to("npu"), contexts.to("npu"), scale=0.0625)
        results.append(out.cpu())
    return not torch.equal(*results)


def mutant(name: str) -> OnCpu:
    """Return a launcher of the kernels with a seeded defect."""
    before, after = DEFECTS[name]
    source = KERNELS.read_text(encoding="utf-8")
    if source.count(before) != 1:
        raise ValueError(f"defect {name!r}: {before!r} stands {source.count(before)} times")
    file = FOLDER / "defects" / Path(name.replace(" ", "_").replace("'", "") + ".py")
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(source.replace(before, after), encoding="utf-8")
    return OnCpu(file)
