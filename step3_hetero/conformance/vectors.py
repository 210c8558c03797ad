"""Golden vectors: cases recorded on one machine, verified on another that it cannot meet."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load, save

from step3_hetero.backend import Backend, Device
from step3_hetero.conformance.case import Inputs
from step3_hetero.conformance.cases import trials
from step3_hetero.conformance.certificate import write_whole_bytes
from step3_hetero.conformance.draws import dtype_of
from step3_hetero.conformance.exam import CaseResult, Exam, Finding, examine
from step3_hetero.conformance.trial import Expected, Results, Trial, expected_of
from step3_hetero.conformance.whole_model import ModelCase
from step3_hetero.errors import ConfigError
from step3_hetero.specs import HostArray

VERSION = 1
LARGEST_BYTES = 4 << 30
"""A file beyond this is refused before it is read."""

PARTS = ("want", "rounded0", "rounded1", "cache_want", "cache0", "cache1", "near", "got")
"""What is kept of a case: the exact results, the reference's own, the recording device's."""


@dataclass(frozen=True)
class Recorded:
    """One case as it was recorded."""

    expected: Expected
    got: Results
    inputs: Mapping[str, str]


def record(backend: Backend, device: Device, chosen: Sequence[Trial]) -> Iterator[tuple[str, Any]]:
    """Yield, case by case, its id and what is to be kept: arrays by name, digests of the inputs.

    A case that the device does not claim, or fails, is left out.
    """
    for trial in chosen:
        result = examine(backend, device, trial)
        if result.status == "passed":
            inputs, expected = expected_of(trial)
            got = Exam(backend, device, trial).got
            yield trial.id, (_parts(expected, got), _digests(inputs))


def write(path: Path, backend: Backend, device: Device, kept: Mapping[str, Any]) -> None:
    """Write the recorded cases whole or not at all."""
    arrays, cases = {}, {}
    for number, (case, (parts, digests)) in enumerate(kept.items()):
        names = {}
        for name, x in parts.items():
            arrays[f"{number}/{name}"] = _plain(x)
            names[name] = x.dtype.name
        cases[case] = {"number": number, "arrays": names, "inputs": digests}
    manifest = {
        "version": VERSION,
        "backend": backend.name,
        "library": backend.version(),
        "device": device.info.description,
        "cases": cases,
    }
    manifest["digest"] = _content(arrays, manifest)
    write_whole_bytes(path, _serialised(arrays, manifest))


def read(path: Path) -> tuple[dict[str, Any], dict[str, Recorded]]:
    """Return a file's manifest and its cases.

    Raises:
        ConfigError: it is damaged, cut off, tampered with, too large, or of another version.
    """
    raw = _bytes(path)
    try:
        manifest = json.loads(_header(raw)["__metadata__"]["manifest"])
        arrays = load(raw)
        cases = {case: _recorded(entry, arrays) for case, entry in manifest["cases"].items()}
        said = {key: value for key, value in manifest.items() if key != "digest"}
        intact = manifest["digest"] == _content(arrays, said)
        intact = intact and _serialised(arrays, manifest) == raw
    except (SafetensorError, ValueError, KeyError, TypeError, AttributeError) as cause:
        raise ConfigError(f"{path}: damaged or cut off: {cause}") from cause
    if not intact:
        raise ConfigError(f"{path}: its content does not match its digest; record it again")
    if manifest["version"] != VERSION:
        raise ConfigError(f"{path}: version {manifest['version']}, this reads {VERSION}")
    return manifest, cases


def verify(backend: Backend, device: Device, cases: Mapping[str, Recorded]) -> Iterator[CaseResult]:
    """Run every recorded case here and hold it against what was recorded there.

    Raises:
        ConfigError: a case is unknown to this suite.
    """
    for case, recorded in cases.items():
        trial = trials().get(case)
        if trial is None or isinstance(trial, ModelCase):
            raise ConfigError(f"{case!r} is no case of this suite; record and verify with the same")
        inputs = trial.inputs()
        drawn = _digests(inputs)
        if drawn != recorded.inputs:
            other = ", ".join(n for n in drawn if drawn[n] != recorded.inputs.get(n))
            said = f"inputs drawn here differ from those recorded: {other}"
            yield CaseResult(case, trial.op, trial.dtype, "failed", (Finding("inputs", said),))
            continue
        yield examine(backend, device, trial, given=(inputs, recorded.expected))


def _parts(expected: Expected, got: Results) -> dict[str, HostArray]:
    groups: Sequence[Mapping[str, HostArray]] = (
        expected.want, *expected.rounded, expected.cache_want, *expected.cache_rounded,
        expected.near, got,
    )  # fmt: skip
    return {f"{part}.{n}": x for part, group in zip(PARTS, groups, strict=True)
            for n, x in group.items()}  # fmt: skip


def _recorded(entry: Mapping[str, Any], arrays: Mapping[str, HostArray]) -> Recorded:
    groups: dict[str, Results] = {part: {} for part in PARTS}
    for name, dtype in entry["arrays"].items():
        part, _, output = name.partition(".")
        x = arrays[f"{entry['number']}/{name}"]
        groups[part][output] = x.astype(bool) if dtype == "bool" else x.view(dtype_of(dtype))
    g = groups
    expected = Expected(
        g["want"], (g["rounded0"], g["rounded1"]), g["cache_want"], (g["cache0"], g["cache1"]),
        g["near"],
    )  # fmt: skip
    return Recorded(expected, g["got"], entry["inputs"])


def _plain(x: HostArray) -> HostArray:
    """Return the array's bytes under a dtype that every reader knows."""
    carriers = {"bfloat16": np.uint16, "float8_e4m3fn": np.uint8, "bool": np.uint8}
    carrier = carriers.get(x.dtype.name)
    whole = np.ascontiguousarray(x)
    return whole if carrier is None else whole.view(carrier)


def _digests(inputs: Inputs) -> dict[str, str]:
    """Return a SHA-256 of each input's values."""
    named = dict(inputs.arrays)
    for name, tensor in inputs.weights.items():
        named[f"weight {name}"] = tensor.data
        if tensor.scale_inv is not None:
            named[f"scale {name}"] = tensor.scale_inv
    if inputs.history is not None:
        named |= {"keys": inputs.history[0], "values": inputs.history[1]}
    return {n: sha256(np.ascontiguousarray(x).view(np.uint8).tobytes() if x.size else b"")
            .hexdigest() for n, x in named.items()}  # fmt: skip


def _serialised(arrays: Mapping[str, HostArray], manifest: Mapping[str, Any]) -> bytes:
    """Return the file's bytes: one content has one form, so no byte is without meaning."""
    return save(dict(arrays), {"manifest": json.dumps(manifest, sort_keys=True)})


def _content(arrays: Mapping[str, HostArray], manifest: Mapping[str, Any]) -> str:
    """Return a SHA-256 over all that is said and all that is kept."""
    seen = sha256(json.dumps(manifest, sort_keys=True).encode())
    for name in sorted(arrays):
        x = arrays[name]
        seen.update(f"{name}:{x.dtype}:{x.shape}".encode())
        seen.update(np.ascontiguousarray(x).tobytes())
    return seen.hexdigest()


def _bytes(path: Path) -> bytes:
    try:
        size = path.stat().st_size
        if size > LARGEST_BYTES:
            raise ConfigError(f"{path}: {size:,} bytes refused; allowed: {LARGEST_BYTES:,}")
        return path.read_bytes()
    except OSError as cause:
        raise ConfigError(f"{path}: cannot be read: {cause.strerror}") from cause


def _header(raw: bytes) -> Any:
    length = int.from_bytes(raw[:8], "little")
    if not 0 < length <= len(raw) - 8:
        raise ValueError(f"a header of {length} bytes in {len(raw)}")
    return json.loads(raw[8 : 8 + length])
