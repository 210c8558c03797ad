"""A case's inputs as arrays by name, and back: all that its results depend on."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields, replace

import numpy as np

from step3_hetero.backend import BatchMeta
from step3_hetero.conformance.case import Inputs
from step3_hetero.conformance.stages import StageCase
from step3_hetero.conformance.trial import Trial
from step3_hetero.specs import HostArray, HostTensor

WHERE = tuple(f.name for f in fields(BatchMeta))
"""The arrays of a batch's whereabouts."""


def named_inputs(trial: Trial, inputs: Inputs) -> dict[str, HostArray]:
    """Return every array that a case's results depend on, by name; a stage's weights too."""
    named = dict(inputs.arrays)
    for name, tensor in inputs.weights.items():
        named |= _of_tensor(f"weight {name}", tensor)
    if inputs.history is not None:
        named |= {"keys": inputs.history[0], "values": inputs.history[1]}
    if inputs.meta is not None:
        named |= {f"batch {name}": getattr(inputs.meta, name) for name in WHERE}
    if isinstance(trial, StageCase):
        for tensor in trial.tensors():
            named |= _of_tensor(f"stage {tensor.name}", tensor)
    return named


def with_values(inputs: Inputs, values: Mapping[str, HostArray]) -> Inputs:
    """Return inputs with those arrays replaced that ``values`` holds; a stage's weights stay."""
    weights = {
        name: HostTensor(
            t.name,
            values.get(f"weight {name}", t.data),
            None if t.scale_inv is None else values.get(f"weight {name} scale", t.scale_inv),
        )
        for name, t in inputs.weights.items()
    }
    changed = Inputs(
        {name: values.get(name, x) for name, x in inputs.arrays.items()},
        weights,
        inputs.history,
        inputs.meta,
    )
    if inputs.history is not None:
        k, v = inputs.history
        changed = replace(changed, history=(values.get("keys", k), values.get("values", v)))
    if inputs.meta is not None:
        where = {name: values.get(f"batch {name}", getattr(inputs.meta, name)) for name in WHERE}
        changed = replace(changed, meta=BatchMeta(**where))
    return changed


def _of_tensor(name: str, tensor: HostTensor) -> dict[str, HostArray]:
    found = {name: np.asarray(tensor.data)}
    if tensor.scale_inv is not None:
        found[f"{name} scale"] = tensor.scale_inv
    return found
