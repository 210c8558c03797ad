"""Two certificates beside each other: where vendors differ, although both pass."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from step3_hetero.conformance.certificate import CaseRecord, Certificate
from step3_hetero.conformance.sketch import distance


@dataclass(frozen=True)
class Difference:
    """One case that two devices do not answer alike.

    ``apart`` estimates the squared distance of the two results over the squared size of the exact
    one (from eight random projections, within a factor of about two); ``allowed`` is the larger
    bound of the two.
    """

    id: str
    output: str
    status: tuple[str, str]
    apart: float
    allowed: float

    @property
    def share(self) -> float:
        """Return the distance as a part of what either may err."""
        return self.apart / self.allowed if self.allowed else 0.0

    def to_json(self) -> dict[str, Any]:
        """Return what ``--json`` prints."""
        return {**asdict(self), "share": self.share}


@dataclass(frozen=True)
class Comparison:
    """What two certificates say of the same cases."""

    shared: int
    only: tuple[tuple[str, ...], tuple[str, ...]]
    status: tuple[Difference, ...]
    results: tuple[Difference, ...]
    other_cases: bool


def compare(one: Certificate, other: Certificate) -> Comparison:
    """Hold two certificates side by side; the largest differences first."""
    ours, theirs = ({c.id: c for c in cert.cases} for cert in (one, other))
    shared = [(c, theirs[i]) for i, c in ours.items() if i in theirs]
    status = [_status(a, b) for a, b in shared if a.status != b.status]
    results = [d for a, b in shared if a.status == b.status == "passed" for d in _results(a, b)]
    return Comparison(
        len(shared),
        (tuple(ours.keys() - theirs.keys()), tuple(theirs.keys() - ours.keys())),
        tuple(status),
        tuple(sorted(results, key=lambda d: -d.share)),
        one.digests["cases"] != other.digests["cases"],
    )


def _status(a: CaseRecord, b: CaseRecord) -> Difference:
    return Difference(a.id, "", (a.status, b.status), 0.0, max(a.bound, b.bound))


def _results(a: CaseRecord, b: CaseRecord) -> list[Difference]:
    return [
        Difference(a.id, name, (a.status, b.status), distance(a.sketch[name], b.sketch[name]),
                   max(a.bound, b.bound))
        for name in a.sketch.keys() & b.sketch.keys()
        if a.sketch[name] != b.sketch[name]
    ]  # fmt: skip
