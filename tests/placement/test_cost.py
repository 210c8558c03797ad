"""Cost: the paper's printed cells, the roofline by hand, policies, and where cards come from."""

import pytest

from step3_hetero.errors import PlacementError
from step3_hetero.placement.catalogue import Catalogue
from step3_hetero.placement.cost import (
    Accelerator,
    Policy,
    accelerators,
    cost,
    paper_accelerators,
    split,
    unpriced,
)
from step3_hetero.placement.cost_table import CostTable
from step3_hetero.placement.cost_tables import cells, min_sparsity, paper_tables
from step3_hetero.placement.workload import paper_names, paper_workload, workload

TABLES = paper_tables()
BUILT_IN = Catalogue.read()
CARDS = ("H800", "H20", "A800", "910B")

# Table 6 and the AFD totals as printed: attention at 8K, at 32K, ffn; AFD at 8K and 32K.
PRINTED = {
    "DeepSeek-V3": (
        (".054 .128 .114 .113", ".197 .460 .409 .407", ".014 .036 .032 .032"), ".068 .211"
    ),
    "Qwen3-235B-A22B": (
        (".135 .054 .091 .101", ".527 .185 .338 .376", ".008 .021 .019 .019"), ".062 .193"
    ),
    "Step-3": (
        (".048 .040 .040 .043", ".176 .114 .120 .133", ".015 .040 .036 .035"), ".055 .129"
    ),
}  # fmt: skip


def printed(values):
    """Write costs as the paper prints them."""
    return " ".join(f"{value:.3f}".removeprefix("0") for value in values)


@pytest.mark.parametrize("model", PRINTED)
@pytest.mark.parametrize(
    ("at", "column"), list(enumerate(("attention_8k", "attention_32k", "ffn")))
)
def test_table_6_equals_every_printed_cell(model, at, column):
    row = TABLES["table6"][model][column]
    assert tuple(row) == CARDS
    assert printed(row.values()) == PRINTED[model][0][at]


@pytest.mark.parametrize("model", PRINTED)
def test_afd_totals_equal_the_printed_ones(model):
    afd = TABLES["afd"][model]
    assert printed([afd["8k"], afd["32k"]]) == PRINTED[model][1]


def test_table_7_equals_the_printed_one():
    assert printed(TABLES["table7"][card] for card in CARDS) == ".058 .007 .031 .034"


def test_measured_nic_rate_raises_the_sparsity_that_an_h800_needs():
    """40 GB/s for each of 8 NICs, where Table 7 has 50."""
    h800 = paper_accelerators()[0]
    assert printed([min_sparsity(h800, 8 * 40e9, 7168, 61)]) == ".073"


def test_table_5_is_price_over_rate():
    """H20: 0.80 dollars an hour over 3600 s, 296 TFLOP/s, 4000 GB/s; A800 computes in BF16."""
    assert TABLES["table5"]["H20"]["u_flop"] == pytest.approx(0.80 / 3600 / 296e12, rel=1e-12)
    assert TABLES["table5"]["H20"]["u_byte"] == pytest.approx(0.80 / 3600 / 4e12, rel=1e-12)
    assert TABLES["table5"]["A800"]["u_flop"] == pytest.approx(0.75 / 3600 / 312e12, rel=1e-12)
    assert TABLES["table5"]["H800"]["u_flop"] == pytest.approx(2.00 / 3600 / 1.98e15, rel=1e-12)


@pytest.mark.parametrize(
    ("card", "flop_per_byte"), [("H800", 591), ("H20", 74), ("A800", 156), ("910B", 175)]
)
def test_ridge_of_each_paper_card(card, flop_per_byte):
    """Table 4's column of FLOP per byte."""
    (found,) = accelerators([card], Policy(), BUILT_IN)
    assert round(found.flops_per_s / found.memory_bandwidth_bytes_per_s) == flop_per_byte


def test_tables_2_and_3_differ_in_what_grows_with_the_context():
    for model in paper_names():
        short, long = TABLES["table2"][model], TABLES["table3"][model]
        assert short["linear_flops"] == long["linear_flops"]
        assert short["ffn_flops"] == long["ffn_flops"]
        assert short["kv_bytes"] < long["kv_bytes"] <= 4 * short["kv_bytes"]


def test_shape_of_the_tables():
    assert set(TABLES) == {"table2", "table3", "table5", "table6", "table7", "afd"}
    assert len([name for name, _ in cells(TABLES) if name.startswith("table6/")]) == 108
    for table in ("table2", "table3", "table6", "afd"):
        assert tuple(TABLES[table]) == paper_names()
    for table in ("table5", "table7"):
        assert tuple(TABLES[table]) == CARDS


SIMPLE = Accelerator("simple", "catalogue", "bf16", 3.6, 1e9, 1e6)
"""1e-12 dollars a FLOP, 1e-9 a byte."""


def test_roofline_by_hand_where_memory_binds():
    """Qwen3-32B, one token of context: 64·2·8·128 = 131,072 bytes at 1e-9 dollars = 1.31072e-4;
    arithmetic 64·64·128·4 = 2,097,152 FLOPs at 1e-12 = 2.1e-6, less. Linear 12,079,595,520 and FFN
    50,331,648,000 FLOPs at 1e-12.
    """
    found = cost(paper_workload("Qwen3-32B"), SIMPLE, 1)
    assert found.bound == "memory"
    assert found.attention_usd == pytest.approx(1e6 * (1.31072e-4 + 1.207959552e-2), rel=1e-12)
    assert found.ffn_usd == pytest.approx(1e6 * 5.0331648e-2, rel=1e-12)
    assert found.total_usd == found.attention_usd + found.ffn_usd


def test_roofline_by_hand_where_arithmetic_binds():
    """A byte at 1e-12 dollars as well: Qwen3-32B's 2,097,152 FLOPs outweigh its 131,072 bytes."""
    fast = Accelerator("fast", "catalogue", "bf16", 3.6, 1e9, 1e9)
    found = cost(paper_workload("Qwen3-32B"), fast, 1)
    assert found.bound == "arithmetic"
    assert found.attention_usd == pytest.approx(1e6 * (2.097152e-6 + 1.207959552e-2), rel=1e-12)


def test_split_decides_on_unrounded_values():
    """Step-3 at 8K: H20 .0401 and A800 .0404 both print .040."""
    row = TABLES["table6"]["Step-3"]["attention_8k"]
    assert f"{row['H20']:.4f} {row['A800']:.4f}" == "0.0401 0.0404"
    for order in (paper_accelerators(), paper_accelerators()[::-1]):
        assert split(paper_workload("Step-3"), order, 8192).attention == "H20"


def test_split_takes_each_half_where_it_is_cheapest():
    found = split(paper_workload("Step-3"), paper_accelerators(), 32768)
    assert (found.attention, found.ffn) == ("H20", "H800")
    assert found.usd == TABLES["afd"]["Step-3"]["32k"]


def test_int8_policy_doubles_arithmetic_where_there_is_no_fp8():
    before = {a.name: a for a in paper_accelerators()}
    after = {a.name: a for a in paper_accelerators(Policy.parse("int8"))}
    assert [a.arithmetic for a in after.values()] == ["fp8", "fp8", "int8", "int8"]
    assert after["A800"].flops_per_s == 2 * before["A800"].flops_per_s == 624e12
    assert after["910B"].flops_per_s == 2 * before["910B"].flops_per_s == 560e12
    assert after["H800"] == before["H800"]


def test_int8_policy_moves_the_optimum():
    step3 = paper_workload("Step-3")
    places = [
        split(step3, paper_accelerators(Policy.parse(policy)), 8192).attention
        for policy in ("paper", "int8")
    ]
    assert places == ["H20", "A800"]


def test_policies_join():
    found = Policy.parse("INT8, mla-512")
    assert (found.int8, found.mla_value_dim, found.catalogue) == (True, 512, False)


@pytest.mark.parametrize("text", ["fast", "int8,", "", "int8;mla-512"])
def test_unknown_policy_lists_the_policies(text):
    with pytest.raises(PlacementError, match="policies: paper, int8, mla-512, catalogue"):
        Policy.parse(text)


def test_paper_policy_takes_the_papers_figures_and_catalogue_its_own():
    """The paper's 280 TFLOP/s are FP16; the catalogue's BF16 figure is 245.8."""
    (paper,) = accelerators(["910b"], Policy(), BUILT_IN)
    (own,) = accelerators(["910B"], Policy.parse("catalogue"), BUILT_IN)
    assert (paper.figures, paper.flops_per_s) == ("paper", 280e12)
    assert (own.figures, own.flops_per_s) == ("catalogue", 245.8e12)


def test_paper_card_has_the_papers_figures_by_the_catalogues_name_too():
    (found,) = accelerators(["Ascend-910b"], Policy(), BUILT_IN)
    assert (found.name, found.figures) == ("910B", "paper")


def test_card_by_two_names_is_one():
    assert len(accelerators(["h800", "H800", "h20"], Policy(), BUILT_IN)) == 2


def test_all_of_the_catalogue_leaves_out_what_has_no_price():
    names = [a.name for a in accelerators([], Policy.parse("catalogue"), BUILT_IN)]
    assert "l20" not in names and "ascend-910b" in names
    assert sorted([*names, *unpriced(BUILT_IN)]) == sorted(BUILT_IN.names())


@pytest.mark.parametrize(
    ("card", "said"),
    [
        ("l20", r"cards\.l20\.usd_per_hour"),
        ("ascend-910b1", r"cards\.ascend-910b1\.tflops\.bf16"),
        ("h900", "unknown card 'h900'"),
    ],
)
def test_card_without_a_needed_figure_is_refused(card, said):
    with pytest.raises(PlacementError, match=said):
        accelerators([card], Policy(), BUILT_IN)


@pytest.mark.parametrize("model", paper_names())
def test_attention_never_gets_cheaper_with_more_context(model):
    for card in paper_accelerators():
        usd = [cost(paper_workload(model), card, 2**n).attention_usd for n in range(20)]
        assert usd == sorted(usd)


def test_rows_of_a_table_add_up_and_say_what_is_left_out():
    cards = tuple(paper_accelerators())
    table = CostTable((workload("step3"),), (100, 8192), cards, Policy())
    rows = table.rows()
    assert len(rows) == 8
    for row in rows:
        parts = row["attention_usd_per_mtok"] + row["ffn_usd_per_mtok"]
        assert row["total_usd_per_mtok"] == parts
    for afd in table.splits():
        at = [row for row in rows if row["context"] == afd["context"]]
        halves = (min(r[f"{half}_usd_per_mtok"] for r in at) for half in ("attention", "ffn"))
        assert afd["usd_per_mtok"] == sum(halves)
    notes = " ".join(table.notes())
    for word in ("network", "weight reads", "memory capacity", "embedding", "head", "router"):
        assert word in notes
