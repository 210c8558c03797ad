"""The JUnit report."""

import xml.etree.ElementTree as ElementTree

from step3_hetero.conformance.exam import CaseResult, Finding
from step3_hetero.conformance.junit import write_junit


def test_a_message_with_control_characters_makes_a_report_that_can_be_read(tmp_path):
    said = "\x1b[31mred\x00 \ud800 \ufffe tab\t done"
    result = CaseResult("add[x]", "add", "float32", "failed", (Finding("runs", said),))
    write_junit(tmp_path / "j.xml", "n\x07", [result])
    failure = ElementTree.parse(tmp_path / "j.xml").find("testcase/failure")
    message = failure.get("message")
    assert message.startswith(r"runs: \x1b[31mred\x00 \ud800 \ufffe tab")


def test_a_known_gap_keeps_reason_and_finding(tmp_path):
    result = CaseResult("add[x]", "add", "float32", "known gap", (Finding("rows", "far"),),
                        worst=9.0, reason="driver bug")  # fmt: skip
    write_junit(tmp_path / "j.xml", "n", [result])
    skipped = ElementTree.parse(tmp_path / "j.xml").find("testcase/skipped").get("message")
    assert "driver bug" in skipped
    assert "rows: far" in skipped
