"""The least that makes a backend one of Step-3's: every op of a text stage, at its real sizes."""

from __future__ import annotations

from functools import cache

from step3_hetero.backend import Backend, DeviceInfo
from step3_hetero.conformance.case import DTYPES
from step3_hetero.conformance.exam import refusal
from step3_hetero.graph import build_graph
from step3_hetero.model.config import step3
from step3_hetero.specs import OpSpec

FOR_IMAGES = ("merge_rows", "concat")
"""Ops of the embedding that only a prompt with images needs."""


def missing_text_ops(backend: Backend, info: DeviceInfo) -> list[str]:
    """Return the ops of Step-3's text stages that a device refuses, in the dtype it refuses fewest.

    One dtype has to do for all: a norm in float32 and experts in bfloat16 make no layer.
    """
    refused = [
        [spec.op for spec in text_ops(dtype) if refusal(backend, info, spec) is not None]
        for dtype in DTYPES
    ]
    fewest = min(refused, key=len)
    return list(dict.fromkeys(fewest))


@cache
def text_ops(dtype: str) -> tuple[OpSpec, ...]:
    """Return every op that Step-3's embedding, layers and head are made of."""
    stages = build_graph(step3(), dtype=dtype).stages
    specs = {stage.spec for stage in stages if stage.kind != "vision"}
    ops = (op for spec in specs for op in spec.ops("auto") if op.op not in FOR_IMAGES)
    asked = {str(op): op for op in ops}
    return tuple(asked[name] for name in sorted(asked))
