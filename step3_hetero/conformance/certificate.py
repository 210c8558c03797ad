"""The certificate of one device: a JSON file with a published schema."""

from __future__ import annotations

import json
import math
import os
import platform
import tempfile
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, PlainSerializer, ValidationError

from step3_hetero.backend import Backend, DeviceInfo, Tier
from step3_hetero.conformance.cases import trials
from step3_hetero.conformance.digests import digests
from step3_hetero.conformance.exam import CaseResult, Status, refusal
from step3_hetero.conformance.text_layer import missing_text_ops
from step3_hetero.errors import ConfigError
from step3_hetero.specs import OpSpec

VERSION = 1
"""Raised whenever a field changes its meaning or goes."""

LARGEST_BYTES = 64 << 20
"""A certificate beyond this is none."""

UNJUDGED = ("float16", "float64")
"""Dtypes that no case has; a backend that claims them claims what nothing here can test."""


def _number(value: Any) -> Any:
    return math.inf if value == "inf" else value


Figure = Annotated[
    float,
    BeforeValidator(_number),
    PlainSerializer(lambda x: x if math.isfinite(x) else "inf", return_type=Any),
]
"""A number; ``"inf"`` for an infinite one, which JSON cannot write."""


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class FindingRecord(_Record):
    """What one check held against a case."""

    check: str
    message: str


class CaseRecord(_Record):
    """One case: its status, and its worst row's error and bound, both squared and relative."""

    id: str
    op: str
    dtype: str
    status: Status
    worst: Figure = 0.0
    error: Figure = 0.0
    bound: Figure = 0.0
    near_ties: int = 0
    seconds: float = 0.0
    reason: str = ""
    findings: tuple[FindingRecord, ...] = ()
    sketch: dict[str, tuple[float, ...]] = {}
    held: str = ""


class DeviceRecord(_Record):
    """The device, and what ran the backend's code."""

    name: str
    description: str
    tier: Tier
    driver: str
    memory_bytes: int
    batch_invariant: bool


class Certificate(_Record):
    """What one run of the suite found."""

    version: Literal[1] = 1
    backend: str
    package: str
    library: str
    borrows: tuple[str, ...]
    device: DeviceRecord
    suite: str
    date: str
    machine: str
    python: str
    numpy: str
    scope: Literal["quick", "full", "selected"]
    digests: dict[str, str]
    text_layer: bool
    missing: tuple[str, ...]
    claimed_untested: tuple[str, ...]
    counts: dict[str, int]
    cases: tuple[CaseRecord, ...]

    @property
    def held(self) -> dict[str, int]:
        """Return how weights were held, requantised ones included, and in how many cases."""
        return dict(sorted(Counter(c.held for c in self.cases if c.held).items()))

    @property
    def passed(self) -> bool:
        """Say whether nothing failed and the ops of a text layer are claimed."""
        return self.text_layer and not any(
            self.counts.get(s, 0) for s in ("failed", "crashed", "timeout")
        )

    def write(self, path: Path) -> None:
        """Write the file whole or not at all."""
        text = json.dumps(self.model_dump(mode="json"), indent=1, ensure_ascii=False) + "\n"
        write_whole(path, text)

    @classmethod
    def read(cls, path: Path) -> Certificate:
        """Read a certificate.

        Raises:
            ConfigError: it cannot be read, is too large, or breaks the schema.
        """
        try:
            size = path.stat().st_size
            if size > LARGEST_BYTES:
                raise ConfigError(f"{path}: {size:,} bytes refused; allowed: {LARGEST_BYTES:,}")
            return cls.model_validate_json(path.read_bytes())
        except OSError as cause:
            raise ConfigError(f"{path}: cannot be read: {cause.strerror}") from cause
        except ValidationError as cause:
            first = cause.errors()[0]
            place = ".".join(map(str, first["loc"])) or "the file"
            raise ConfigError(
                f"{path}: no certificate: {place}: {first['msg']}; "
                "step3-hetero conformance run --json FILE writes one"
            ) from cause


def certify(
    backend: Backend,
    info: DeviceInfo,
    results: Sequence[CaseResult],
    scope: Literal["quick", "full", "selected"],
) -> Certificate:
    """Put the results of a run into a certificate."""
    missing = missing_text_ops(backend, info)
    return Certificate(
        backend=backend.name,
        package=_package(backend),
        library=backend.version(),
        borrows=backend.borrows,
        device=DeviceRecord(
            name=info.name,
            description=info.description,
            tier=info.tier,
            driver=info.driver,
            memory_bytes=info.memory_bytes,
            batch_invariant=info.batch_invariant,
        ),
        suite=f"step3-hetero {_version('step3-hetero')}",
        date=datetime.now(UTC).date().isoformat(),
        machine=f"{platform.system()} {platform.machine()}",
        python=platform.python_version(),
        numpy=_numpy(),
        scope=scope,
        digests=digests(backend),
        text_layer=not missing,
        missing=tuple(missing),
        claimed_untested=tuple(claimed_untested(backend, info, results)),
        counts=dict(Counter(r.status for r in results)),
        cases=tuple(_record(r) for r in results),
    )


def claimed_untested(
    backend: Backend, info: DeviceInfo, results: Sequence[CaseResult]
) -> list[str]:
    """Return the ops and dtypes that a device claims and that no case of this run has tried."""
    tried = {(r.op, r.dtype) for r in results if r.status != "unclaimed"}
    found = []
    for (op, dtype), spec in _askable().items():
        if (op, dtype) not in tried and refusal(backend, info, spec) is None:
            found.append(f"{op} {dtype}")
    return found


def _askable() -> dict[tuple[str, str], OpSpec]:
    """Return a spec for each op and dtype: those the suite has, and those that it cannot judge."""
    found: dict[tuple[str, str], OpSpec] = {}
    for trial in trials().values():
        for spec in trial.specs():
            if spec.op == trial.op:
                found.setdefault((spec.op, spec.dtype), spec)
                for dtype in UNJUDGED:
                    found.setdefault((spec.op, dtype), replace(spec, dtype=dtype, kv_format=None))
    return found


def _record(result: CaseResult) -> CaseRecord:
    return CaseRecord(
        id=result.id,
        op=result.op,
        dtype=result.dtype,
        status=result.status,
        worst=_rounded(result.worst),
        error=_rounded(result.error),
        bound=_rounded(result.bound),
        near_ties=result.near_ties,
        seconds=round(result.seconds, 3),
        reason=result.reason,
        findings=tuple(FindingRecord(check=f.check, message=f.message) for f in result.findings),
        sketch={name: tuple(map(_rounded, values)) for name, values in result.sketch.items()},
        held=result.held,
    )


def _rounded(x: float) -> float:
    return float(f"{x:.4g}")


def _numpy() -> str:
    """Return the versions of NumPy and of its BLAS, which judge by the reference."""
    import numpy as np

    built = np.show_config(mode="dicts")
    blas = built.get("Build Dependencies", {}).get("blas", {}) if isinstance(built, dict) else {}
    return f"{np.__version__} ({blas.get('name', 'BLAS')} {blas.get('version', 'unknown')})"


def _package(backend: Backend) -> str:
    module = type(backend).__module__.partition(".")[0].replace("_", "-")
    return f"{module} {_version(module)}"


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed as a package"


def schema_text() -> str:
    """Return the JSON schema of a certificate, as it is published."""
    return json.dumps(Certificate.model_json_schema(mode="serialization"), indent=2) + "\n"


def write_whole(path: Path, text: str) -> None:
    """Write a text file whole or not at all."""
    write_whole_bytes(path, text.encode())


def write_whole_bytes(path: Path, content: bytes) -> None:
    """Write a file whole or not at all.

    Raises:
        ConfigError: its folder is missing or not ours to write in.
    """
    try:
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    except OSError as cause:
        raise ConfigError(f"{path}: cannot be written: {cause.strerror}") from cause
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
        Path(temporary).chmod(0o644)
        Path(temporary).replace(path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
