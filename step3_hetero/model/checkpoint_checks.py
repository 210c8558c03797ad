"""Whether stored tensors are those of a model. Headers are enough for it: no weight is read."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from step3_hetero.errors import CheckpointError
from step3_hetero.model.config import ModelConfig
from step3_hetero.model.layout import (
    PROJECTOR_BIAS,
    SCALE_SUFFIX,
    Shapes,
    is_fp8_linear,
    scale_shape,
    tensor_shapes,
)
from step3_hetero.model.safetensors_file import DTYPES, STORED_AS, Entry
from step3_hetero.model.shards import Place, listed

FP8 = "F8_E4M3"


def check_tensors(
    folder: Path, places: Mapping[str, Place], config: ModelConfig
) -> tuple[ModelConfig, Shapes]:
    """Check names, shapes and dtypes; return the config, projector_bias decided, and the shapes.

    Raises:
        CheckpointError: the tensors are not those of ``config``.
    """
    if config.vision is not None and config.projector_bias is None:
        config = replace(config, projector_bias=PROJECTOR_BIAS in places)
    shapes = tensor_shapes(config)
    entries = {name: place.entry for name, place in places.items()}
    scales = {n: e for n, e in entries.items() if n.endswith(SCALE_SUFFIX)}
    weights = {n: e for n, e in entries.items() if n not in scales}
    _check_names(folder, weights, shapes)
    _refuse(folder, "tensors of another shape", _wrong_shapes(weights, shapes))
    _refuse(folder, "tensors of another dtype", _wrong_dtypes(weights, config))
    _refuse(folder, "scales that do not fit", _wrong_scales(weights, scales))
    return config, shapes


def _refuse(folder: Path, what: str, wrong: list[str]) -> None:
    if wrong:
        raise CheckpointError(f"{folder}: {len(wrong)} {what}: {listed(wrong)}")


def _check_names(folder: Path, weights: Mapping[str, Entry], shapes: Shapes) -> None:
    missing = [n for n in shapes if n not in weights]
    surplus = [n for n in weights if n not in shapes]
    said = [f"{len(missing)} tensors missing: {listed(missing)}"] if missing else []
    if surplus:
        said.append(f"{len(surplus)} tensors that the model does not have: {listed(surplus)}")
    if said:
        raise CheckpointError(f"{folder}: not the model of its config.json: {'; '.join(said)}")


def _wrong_shapes(weights: Mapping[str, Entry], shapes: Shapes) -> list[str]:
    return [
        f"{name} {weights[name].shape}, expected {shape}"
        for name, shape in shapes.items()
        if weights[name].shape != shape
    ]


def _wrong_dtypes(weights: Mapping[str, Entry], config: ModelConfig) -> list[str]:
    plain = STORED_AS[config.dtype]
    wrong = []
    for name, entry in weights.items():
        may_be_fp8 = config.fp8_blocks and is_fp8_linear(name)
        allowed = (plain, FP8) if may_be_fp8 else (plain,)
        if entry.stored not in allowed:
            why = _why(entry.stored, config)
            wrong.append(f"{name} {entry.stored}, expected {' or '.join(allowed)}{why}")
    return wrong


def _why(stored: str, config: ModelConfig) -> str:
    """Say what stands against a dtype, where it is not just another one."""
    if stored == "F16":
        return " (no backend computes in float16, and Step-3 is published in bfloat16: convert it)"
    if stored == FP8 and not config.fp8_blocks:
        return " (config.json has no quantization_config)"
    if stored in DTYPES:
        return ""
    return f" (readable: {', '.join(DTYPES)})"


def _wrong_scales(weights: Mapping[str, Entry], scales: Mapping[str, Entry]) -> list[str]:
    wrong = []
    for name, entry in weights.items():
        scale = scales.get(name + SCALE_SUFFIX)
        if entry.stored == FP8 and scale is None:
            wrong.append(f"{name}{SCALE_SUFFIX} is missing")
        elif scale is not None and entry.stored != FP8:
            wrong.append(f"{name}{SCALE_SUFFIX} belongs to a tensor that is {entry.stored}")
        elif scale is not None:
            wrong += _wrong_scale(name + SCALE_SUFFIX, scale, scale_shape(entry.shape))
    owners = {name + SCALE_SUFFIX for name in weights}
    return wrong + [f"{name} belongs to no tensor" for name in scales if name not in owners]


def _wrong_scale(name: str, scale: Entry, shape: tuple[int, ...]) -> list[str]:
    if (scale.stored, scale.shape) == ("F32", shape):
        return []
    return [f"{name} {scale.stored} {scale.shape}, expected F32 {shape}"]
