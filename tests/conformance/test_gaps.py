"""How a file of known gaps is read."""

import pytest

from step3_hetero.conformance.cases import trials
from step3_hetero.conformance.gaps import read_gaps
from step3_hetero.errors import ConfigError

CASE = next(iter(trials()))


@pytest.mark.parametrize("between", [" ", "\t", "  \t "])
def test_blanks_and_tabs_part_case_and_reason(between, tmp_path):
    (tmp_path / "g.txt").write_text(f"{CASE}{between}driver bug\n")
    assert read_gaps(tmp_path / "g.txt") == {CASE: "driver bug"}


@pytest.mark.parametrize("line", ["# note", "  # note", "\t#note", "", "   "])
def test_comments_and_empty_lines_say_nothing(line, tmp_path):
    (tmp_path / "g.txt").write_text(f"{line}\n{CASE}  slow\n")
    assert read_gaps(tmp_path / "g.txt") == {CASE: "slow"}


def test_a_file_that_is_not_utf8_is_refused_with_its_line(tmp_path):
    (tmp_path / "g.txt").write_bytes(b"# note\n\xff\n")
    with pytest.raises(ConfigError, match=r"g\.txt:2: not UTF-8"):
        read_gaps(tmp_path / "g.txt")


def test_no_id_of_the_suite_has_a_blank_in_it():
    assert not [case for case in trials() if len(case.split()) != 1]
