"""docs/ops.md: which op works where, in which dtype, proven how. Made from the certificates alone.

``python -m step3_hetero.conformance.ops_page`` writes it; ``--check`` says whether it is stale.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

from step3_hetero.conformance.cases import trials
from step3_hetero.conformance.certificate import CaseRecord, Certificate, write_whole
from step3_hetero.conformance.digests import digests
from step3_hetero.registry import get_backend

CERTIFICATES = Path("docs/certificates")
PAGE = Path("docs/ops.md")

HEAD = """# Ops by backend

Made from the certificates in `docs/certificates` by
`python -m step3_hetero.conformance.ops_page`; do not edit. A number is the worst squared error of
all cases as a part of what is allowed: 1 is the bound, `exact` is equal to the bit. What is allowed
is what the reference's own rounding explains, see [conformance.md](conformance.md). `reference`
defines every op and is judged by the oracles in `tests/oracle`.
"""


COLUMN_SAYS = {
    "host stand-in": " (our reading of the documents)",
    "interpreted": " (interpreted)",
}
"""What the head of a column adds where no hardware of the backend's own has run."""


def page(certificates: Sequence[Certificate]) -> str:
    """Return the text of the page."""
    columns = [(c, d) for c in certificates for d in ("float32", "bfloat16")]
    lines = [HEAD, _devices(certificates), ""]
    heads = (f"{c.backend} {d}{COLUMN_SAYS.get(c.device.tier, '')}" for c, d in columns)
    lines.append("| op | " + " | ".join(heads) + " |")
    lines.append("|---" * (len(columns) + 1) + "|")
    for op in dict.fromkeys(t.op for t in trials().values()):
        cells = [_cell([r for r in c.cases if (r.op, r.dtype) == (op, d)]) for c, d in columns]
        lines.append(f"| {op} | " + " | ".join(cells) + " |")
    lines += ["", *_notes(certificates)]
    return "\n".join(lines).rstrip() + "\n"


def _devices(certificates: Iterable[Certificate]) -> str:
    rows = [
        "| backend | device | proven on | date | cases | standing |",
        "|---|---|---|---|---|---|",
    ]
    for c in certificates:
        counts = ", ".join(f"{n} {status}" for status, n in sorted(c.counts.items()))
        proven = "its own hardware" if c.device.tier == "device" else c.device.tier
        cells = (f"{c.backend} ({c.package}; {c.library})", c.device.description, proven, c.date,
                 f"{c.scope}: {counts}", standing(c))  # fmt: skip
        rows.append(f"| {' | '.join(cells)} |")
    rows += [
        f"| {name} | none | never run on hardware | | | no certificate |"
        for name in _uncertified(certificates)
    ]
    return "\n".join(rows)


def _ours() -> set[str]:
    """Return the backends of this repository, whatever else is installed."""
    from importlib.metadata import distribution

    entries = distribution("step3-hetero").entry_points
    return {e.name for e in entries if e.group == "step3_hetero.backends"}


def _uncertified(certificates: Iterable[Certificate]) -> list[str]:
    """Return our own backends that have no certificate."""
    return sorted(_ours() - {c.backend for c in certificates} - {"reference"})


def standing(certificate: Certificate) -> str:
    """Say whether a certificate still speaks of the code that is here."""
    verdict = "passed" if certificate.passed else "failed"
    if certificate.backend not in _ours():
        return f"{verdict} at {certificate.date}; its code is not in this repository"
    now = digests(get_backend(certificate.backend))
    changed = [name for name, digest in certificate.digests.items() if now.get(name) != digest]
    if not changed:
        return verdict
    return f"{verdict} at {certificate.date}, changed since: {', '.join(changed)}"


def _cell(records: Sequence[CaseRecord]) -> str:
    """Return one cell: the worst figure, or why there is none."""
    statuses = {r.status for r in records}
    for status in ("crashed", "timeout", "failed"):
        if status in statuses:
            return f"**{status}** ({sum(r.status == status for r in records)})"
    tried = [r for r in records if r.status in ("passed", "known gap")]
    if not tried:
        return "not claimed" if records else "–"
    worst = max(r.worst for r in tried)
    gaps = sum(r.status == "known gap" for r in tried)
    figure = "exact" if worst == 0 else f"{worst:.2f}"
    return figure + (f", {gaps} known gaps" if gaps else "")


def _notes(certificates: Iterable[Certificate]) -> Iterable[str]:
    for c in certificates:
        if c.borrows:
            yield f"- `{c.backend}` borrows kernels of {', '.join(c.borrows)}."
        if c.held:
            held = ", ".join(f"{method} ({n} cases)" for method, n in c.held.items())
            yield f"- `{c.backend}` holds weights as: {held}."
        if c.claimed_untested:
            yield f"- `{c.backend}` claims, and no case tried: {', '.join(c.claimed_untested)}."
        for r in c.cases:
            if r.status == "known gap":
                yield f"- `{r.id}` on {c.backend}: {r.reason}"


def main(arguments: Sequence[str]) -> int:
    """Write the page, or with ``--check`` say whether it is what it should be."""
    found = [Certificate.read(path) for path in sorted(CERTIFICATES.glob("*.certificate.json"))]
    text = page(found)
    if "--check" not in arguments:
        write_whole(PAGE, text)
        return 0
    if PAGE.is_file() and PAGE.read_text(encoding="utf-8") == text:
        return 0
    print(f"{PAGE} is stale; run: python -m step3_hetero.conformance.ops_page", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
