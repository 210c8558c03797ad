"""What the lowered kernels compute, held to the reference by the conformance suite itself."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from opencompiler import FOLDER, KERNELS, Launched, OnCpu, launches

from step3_hetero.backends.ascend.device import AscendDevice
from step3_hetero.conformance.case import Case
from step3_hetero.conformance.exam import CaseResult, examine
from step3_hetero.conformance.forms import OpTrial
from step3_hetero.conformance.suite import select
from step3_hetero.registry import get_backend

SPLIT = 256
"""Keys of a part where contexts are cut."""


def case(heads: int, contexts: Sequence[int], draw: str = "normal") -> Case:
    """Return decoding sequences with these contexts, one more row being padding."""
    blocks = sum(-(-n // 128) for n in contexts) + 2
    dims = {"heads": heads, "kv_heads": 1, "head_dim": 256, "queries": (1,) * len(contexts),
            "contexts": tuple(contexts), "blocks": blocks, "padding": 1}  # fmt: skip
    return Case("attention", "bfloat16", dims, {"scale": 0.0625}, draw)


CASES = (
    case(64, (1, 127, 128, 129, 700)),
    case(64, (513, 256, 257, 40), "focused"),
    case(64, (300, 5), "large"),
    case(64, (4096,)),
    case(32, (130, 1, 600)),
    case(16, (130, 1, 600)),
)
FAULTY = case(64, (1, 129, 700))
"""The case that seeded defects have to fail."""

DEFECTS = {
    "scale left out": ("tl.dot(rows, tl.trans(k)) * scale", "tl.dot(rows, tl.trans(k))"),
    "mask dropped": (
        'tl.where((first + key)[None, :] < high, scores, float("-inf"))',
        "scores",
    ),
    "mask one key late": ("(first + key)[None, :] < high,", "(first + key)[None, :] <= high,"),
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


def kernels_of(cases: Sequence[Case]) -> list[Launched]:
    """Return which kernels these cases need, whole and in parts."""
    heads = sorted({c.size("heads") for c in cases})
    return [one for h in heads for split in (False, True) for one in launches(h, split=split)]


def results(
    launch: OnCpu, cases: Sequence[Case], splits: Sequence[int] = (0, SPLIT)
) -> Iterator[tuple[int, CaseResult]]:
    """Examine cases on a device that decodes by the launcher, with each way to cut contexts."""
    backend = get_backend("ascend")
    launch.compile(kernels_of(cases))
    for split in splits:
        device = AscendDevice(backend.devices()[0], 0, kv_split=split, triton=launch)
        for one in cases:
            yield split, examine(backend, device, OpTrial(one))


def stages(launch: OnCpu) -> Iterator[CaseResult]:
    """Examine Step-3's real attention stage, with decoding sequences in its batch."""
    backend = get_backend("ascend")
    device = AscendDevice(backend.devices()[0], 0, triton=launch)
    for trial in select(full=True):
        if trial.id.startswith("attention_stage[step3-") and trial.dtype == "bfloat16":
            yield examine(backend, device, trial)


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
