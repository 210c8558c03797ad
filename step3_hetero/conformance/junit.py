"""Results as a JUnit report, for a vendor's own CI."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ElementTree
from collections.abc import Sequence
from pathlib import Path

from step3_hetero.conformance.certificate import write_whole
from step3_hetero.conformance.exam import CaseResult

NOT_XML = re.compile("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")
"""Characters that XML 1.0 (section 2.2) cannot hold, escaped or not."""


def write_junit(path: Path, name: str, results: Sequence[CaseResult]) -> None:
    """Write one test case for each result, whole or not at all."""
    bad = {"failed", "crashed", "timeout"}
    suite = ElementTree.Element(
        "testsuite",
        name=_printable(name),
        tests=str(len(results)),
        failures=str(sum(r.status in bad for r in results)),
        skipped=str(sum(r.status in ("unclaimed", "known gap") for r in results)),
        time=f"{sum(r.seconds for r in results):.3f}",
    )
    for result in results:
        case = ElementTree.SubElement(
            suite, "testcase", classname=result.op, name=result.id, time=f"{result.seconds:.3f}"
        )
        found = "; ".join(f"{f.check}: {f.message}" for f in result.findings)
        known = result.reason if result.status == "known gap" or not found else ""
        said = _printable("; ".join(filter(None, (known, found))))
        if result.status in bad:
            ElementTree.SubElement(case, "failure", type=result.status, message=said)
        elif result.status != "passed":
            ElementTree.SubElement(case, "skipped", message=f"{result.status}: {said}")
    write_whole(path, ElementTree.tostring(suite, encoding="unicode") + "\n")


def _printable(text: str) -> str:
    """Return a text with what XML cannot hold written as Python would write it.

    >>> _printable("\\x1b[31mred")
    '\\\\x1b[31mred'
    """
    return NOT_XML.sub(lambda found: ascii(found[0])[1:-1], text)
