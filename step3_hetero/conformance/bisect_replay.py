"""A stage's run as a file: what the shadow check leaves behind, for any backend to run again.

One safetensors file; its metadata are JSON under the key ``step3_hetero_replay``. Dtypes that the
format's readers disagree on (bfloat16) are stored as integers and named in the metadata.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np

from step3_hetero.backend import BatchMeta
from step3_hetero.conformance.bisect_stage import History, StageRun
from step3_hetero.conformance.draws import dtype_of
from step3_hetero.conformance.trial import Results
from step3_hetero.errors import ConfigError, ConformanceError
from step3_hetero.graph import GraphStage
from step3_hetero.specs import HostArray, StageSpec, TensorSource

KEY = "step3_hetero_replay"
VERSION = 1
META = ("positions", "slots", "query_starts", "context_lens", "block_tables")


@dataclass(frozen=True, eq=False)
class Replay:
    """One run of one stage, what it gave, and of which weights.

    ``digests`` has a SHA-256 for each weight of the stage; ``said`` is why it was kept.
    """

    stage: str
    spec: Mapping[str, Any]
    run: StageRun
    outputs: Results
    digests: Mapping[str, str]
    said: tuple[str, ...] = ()


def spec_json(spec: StageSpec) -> dict[str, Any]:
    """Return a stage's spec as JSON has it."""
    return {"kind": spec.kind, **asdict(spec)}


def weight_digests(node: GraphStage, source: TensorSource) -> dict[str, str]:
    """Return a SHA-256 over name, dtype, shape and bytes of each weight's tensors."""
    digests = {}
    for param in node.params:
        seen = sha256()
        for name in param.tensors.values():
            tensor = source.tensor(name)
            seen.update(f"{name}:{tensor.dtype}:{tensor.shape}".encode())
            for part in (tensor.data, tensor.scale_inv):
                if part is not None:
                    seen.update(np.ascontiguousarray(part).view(np.uint8).data)
        digests[param.name] = seen.hexdigest()
    return digests


def write_replay(replay: Replay, path: Path) -> None:
    """Write one file, whole or not at all.

    Raises:
        OSError: the folder cannot be written.
    """
    from safetensors.numpy import save

    arrays = _arrays(replay)
    told = {
        "version": VERSION,
        "stage": replay.stage,
        "spec": replay.spec,
        "digests": dict(replay.digests),
        "said": list(replay.said),
        "dtypes": {n: x.dtype.name for n, x in arrays.items()},
    }
    data = save({n: _storable(x) for n, x in arrays.items()}, {KEY: json.dumps(told)})
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        part.write_bytes(data)
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def read_replay(path: Path) -> Replay:
    """Read what ``write_replay`` wrote.

    Raises:
        ConfigError: the file cannot be read, is damaged, or is no replay of this version.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="np") as file:
            told = json.loads((file.metadata() or {})[KEY])
            stored = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        if told["version"] != VERSION:
            raise ConfigError(f"{path}: replay version {told['version']}, this reads {VERSION}")
        arrays = {n: x.view(dtype_of(told["dtypes"][n])) for n, x in stored.items()}
        return _replay(told, arrays)
    except OSError as cause:
        why = cause if path.exists() else "No such file or directory"
        raise ConfigError(f"{path}: cannot be read: {why}") from cause
    except (SafetensorError, KeyError, TypeError, ValueError) as cause:
        raise ConfigError(
            f"{path}: no replay file, or damaged: {cause}; the shadow check writes them"
        ) from cause


def check_replay(replay: Replay, node: GraphStage, source: TensorSource) -> None:
    """Refuse to run a replay on another model.

    Raises:
        ConformanceError: the stage's spec or a weight is not what was recorded.
    """
    spec = json.loads(json.dumps(spec_json(node.spec)))
    if spec != replay.spec:
        keys = [k for k in spec if spec[k] != replay.spec.get(k)]
        said = ", ".join(f"{k} {replay.spec.get(k)} -> {spec[k]}" for k in keys)
        raise ConformanceError(f"{node.name} is not the stage recorded: {said}")
    own = weight_digests(node, source)
    if changed := [n for n, d in own.items() if replay.digests.get(n) != d]:
        raise ConformanceError(
            f"{node.name}: weights {', '.join(changed)} are not those recorded; give the config of "
            "the same checkpoint"
        )


def _arrays(replay: Replay) -> dict[str, HostArray]:
    run = replay.run
    arrays = {f"input.{n}": x for n, x in run.inputs.items()}
    arrays |= {f"output.{n}": x for n, x in replay.outputs.items()}
    if run.meta is not None:
        arrays |= {f"meta.{n}": getattr(run.meta, n) for n in META}
    if run.history is not None:
        arrays |= {"history.k": run.history[0], "history.v": run.history[1]}
    return arrays


def _storable(x: HostArray) -> HostArray:
    native = x if x.dtype.kind in "iuf" and x.dtype.isbuiltin == 1 else x.view(np.uint16)
    return np.ascontiguousarray(native)


def _replay(told: Mapping[str, Any], arrays: Mapping[str, HostArray]) -> Replay:
    def part(prefix: str) -> dict[str, HostArray]:
        return {n.removeprefix(prefix): x for n, x in arrays.items() if n.startswith(prefix)}

    meta, history = part("meta."), part("history.")
    pair: History | None = (history["k"], history["v"]) if history else None
    run = StageRun(BatchMeta(**meta) if meta else None, part("input."), pair)
    return Replay(
        told["stage"], told["spec"], run, part("output."), told["digests"], tuple(told["said"])
    )
