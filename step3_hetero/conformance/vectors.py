"""Golden vectors: cases recorded on one machine, verified on another that it cannot meet.

A file holds the inputs' digests, small inputs by value, exact results, the reference's own, and
what the recording device gave. Its digest covers every byte: the file is hashed with zeros in the
digest's place.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load, save

from step3_hetero.backend import Backend, Device
from step3_hetero.conformance.cases import trials
from step3_hetero.conformance.certificate import write_whole_bytes
from step3_hetero.conformance.draws import dtype_of
from step3_hetero.conformance.exam import CaseResult, Exam, Finding, examine
from step3_hetero.conformance.given import named_inputs, with_values
from step3_hetero.conformance.sketch import distance, sketch_of
from step3_hetero.conformance.trial import Expected, Results, Trial, expected_of
from step3_hetero.conformance.whole_model import ModelCase
from step3_hetero.errors import ConfigError
from step3_hetero.specs import HostArray

VERSION = 2
LARGEST_BYTES = 4 << 30
"""A file beyond this is refused before it is read."""

KEPT_BYTES = 64 << 10
"""An input no larger than this is kept by value; a larger one by its seed and digest."""

PARTS = ("want", "rounded0", "rounded1", "cache_want", "cache0", "cache1", "near", "slack", "got")
"""What is kept of a case: the exact results, the reference's own, the recording device's."""

NO_DIGEST = "0" * 64


@dataclass(frozen=True)
class Recorded:
    """One case as it was recorded.

    ``inputs`` are digests by name: of what is drawn for the case, and of the weights behind a
    stage; ``values`` are those inputs that are kept whole. ``numpy`` drew them.
    """

    expected: Expected
    got: Results
    inputs: Mapping[str, str]
    values: Mapping[str, HostArray]
    numpy: str = np.__version__


@dataclass(frozen=True)
class Kept:
    """What is to be written of a case."""

    parts: Mapping[str, HostArray]
    values: Mapping[str, HostArray]
    digests: Mapping[str, str]


def record(
    backend: Backend, device: Device, chosen: Sequence[Trial]
) -> Iterator[tuple[str, Kept | str]]:
    """Yield, case by case, its id and what is to be kept, or why it is left out."""
    for trial in chosen:
        result = examine(backend, device, trial)
        if result.status != "passed":
            said = "; ".join(f"{f.check}: {f.message}" for f in result.findings) or result.reason
            yield trial.id, f"{result.status}: {said}"
            continue
        inputs, expected = expected_of(trial)
        got = Exam(backend, device, trial).got
        drawn = named_inputs(trial, inputs)
        values = {n: x for n, x in drawn.items() if x.nbytes <= KEPT_BYTES}
        yield trial.id, Kept(_parts(expected, got), values, _digests(drawn))


def write(path: Path, backend: Backend, device: Device, kept: Mapping[str, Kept]) -> None:
    """Write the recorded cases whole or not at all.

    Raises:
        ConfigError: there are none.
    """
    if not kept:
        raise ConfigError(f"{path}: no case to record; nothing is written")
    arrays: dict[str, HostArray] = {}
    cases: dict[str, Any] = {}
    for number, (case, one) in enumerate(kept.items()):
        whole = {**one.parts, **{f"input.{n}": x for n, x in one.values.items()}}
        arrays |= {f"{number}/{name}": _plain(x) for name, x in whole.items()}
        dtypes = {name: x.dtype.name for name, x in whole.items()}
        cases[case] = {"number": number, "arrays": dtypes, "inputs": dict(one.digests)}
    manifest = {
        "version": VERSION,
        "backend": backend.name,
        "library": backend.version(),
        "device": device.info.description,
        "numpy": np.__version__,
        "cases": cases,
        "digest": NO_DIGEST,
    }
    raw = save(arrays, {"manifest": json.dumps(manifest, sort_keys=True)})
    write_whole_bytes(path, raw.replace(NO_DIGEST.encode(), sha256(raw).hexdigest().encode(), 1))


def read(path: Path) -> tuple[dict[str, Any], dict[str, Recorded]]:
    """Return a file's manifest and its cases.

    Raises:
        ConfigError: it is damaged, cut off, tampered with, too large, empty, of another version, or
            holds a case that this suite has not.
    """
    raw = _bytes(path)
    try:
        about = _header(raw).get("__metadata__") or {}
        if "manifest" not in about:
            raise ConfigError(
                f"{path}: no vector file; step3-hetero conformance record writes them"
            )
        manifest = json.loads(about["manifest"])
        if not _intact(raw, manifest["digest"]):
            raise ConfigError(f"{path}: its bytes do not match its digest; record it again")
        if manifest["version"] != VERSION:
            version = manifest["version"]
            raise ConfigError(f"{path}: version {version!r}, this reads {VERSION}")
        arrays = load(raw)
        cases = {
            case: _recorded(entry, arrays, str(manifest["numpy"]))
            for case, entry in manifest["cases"].items()
        }
    except (SafetensorError, ValueError, KeyError, TypeError, AttributeError) as cause:
        raise ConfigError(f"{path}: damaged or cut off: {cause}; copy it again") from cause
    if not cases:
        raise ConfigError(f"{path}: holds no case; record it again")
    for case in cases:
        if case not in trials() or isinstance(trials()[case], ModelCase):
            raise ConfigError(
                f"{path}: {case!r} is no case of this suite; record and verify with one version"
            )
    return manifest, cases


@lru_cache(maxsize=1)
def read_cases(path: Path) -> dict[str, Recorded]:
    """Return the cases of a file, read once in each worker."""
    return read(path)[1]


def verify(backend: Backend, device: Device, case: str, recorded: Recorded) -> CaseResult:
    """Run one recorded case here and hold it against what was recorded there.

    Inputs kept by value are taken from the file; the rest is drawn, and has to be the same.
    """
    trial = trials()[case]
    assert not isinstance(trial, ModelCase)
    inputs = with_values(trial.inputs(), recorded.values)
    drawn = _digests(named_inputs(trial, inputs))
    if drawn != dict(recorded.inputs):
        names = drawn.keys() | recorded.inputs.keys()
        other = ", ".join(sorted(n for n in names if drawn.get(n) != recorded.inputs.get(n)))
        said = (
            f"inputs drawn here (NumPy {np.__version__}) differ from those recorded (NumPy "
            f"{recorded.numpy}): {other}"
        )
        finding = Finding("inputs", said)
        return CaseResult(case, trial.op, trial.dtype, "failed", (finding,), float("inf"))
    return examine(backend, device, trial, given=(inputs, recorded.expected))


def apart(result: CaseResult, recorded: Recorded) -> float:
    """Return about how far this result is from the recording device's: the largest output's squared
    distance over the squared size of the exact result."""
    want = recorded.expected.want
    found = [
        distance(result.sketch[n], sketch_of(f"{result.id} {n}", recorded.got[n], want[n]))
        for n in result.sketch.keys() & recorded.got.keys()
    ]
    return max(found, default=0.0)


def _parts(expected: Expected, got: Results) -> dict[str, HostArray]:
    groups: Sequence[Mapping[str, HostArray]] = (
        expected.want, *expected.rounded, expected.cache_want, *expected.cache_rounded,
        expected.near, expected.slack, got,
    )  # fmt: skip
    return {f"{part}.{n}": x for part, group in zip(PARTS, groups, strict=True)
            for n, x in group.items()}  # fmt: skip


def _recorded(entry: Mapping[str, Any], arrays: Mapping[str, HostArray], numpy: str) -> Recorded:
    groups: dict[str, Results] = {part: {} for part in (*PARTS, "input")}
    for name, dtype in entry["arrays"].items():
        part, _, output = name.partition(".")
        x = arrays[f"{entry['number']}/{name}"]
        groups[part][output] = x.astype(bool) if dtype == "bool" else x.view(dtype_of(dtype))
    g = groups
    expected = Expected(
        g["want"], (g["rounded0"], g["rounded1"]), g["cache_want"], (g["cache0"], g["cache1"]),
        g["near"], g["slack"],
    )  # fmt: skip
    return Recorded(expected, g["got"], entry["inputs"], g["input"], numpy)


def _plain(x: HostArray) -> HostArray:
    """Return the array's bytes under a dtype that every reader knows."""
    carriers = {"bfloat16": np.uint16, "float8_e4m3fn": np.uint8, "bool": np.uint8}
    carrier = carriers.get(x.dtype.name)
    whole = np.ascontiguousarray(x)
    return whole if carrier is None else whole.view(carrier)


def _digests(named: Mapping[str, HostArray]) -> dict[str, str]:
    """Return a SHA-256 of each array's dtype, shape and values."""
    found = {}
    for name, x in named.items():
        seen = sha256(f"{x.dtype.name}:{x.shape}".encode())
        seen.update(np.ascontiguousarray(x).view(np.uint8).data if x.size else b"")
        found[name] = seen.hexdigest()
    return found


def _intact(raw: bytes, digest: object) -> bool:
    said = str(digest).encode()
    if len(said) != len(NO_DIGEST) or raw.count(said) != 1:
        return False
    return sha256(raw.replace(said, NO_DIGEST.encode(), 1)).hexdigest().encode() == said


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
