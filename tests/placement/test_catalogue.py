"""The device catalogue: figures of the facts, sources, a user's file, and what is refused."""

import re
from pathlib import Path

import pytest

from step3_hetero.errors import ConfigError, PlacementError
from step3_hetero.placement.catalogue import Catalogue

BUILT_IN = Catalogue.read()

# TFLOP/s bf16, fp8, int8; HBM GB; GB/s; scale-up GB/s; NIC Gb/s; $/h
PROFILES = {
    "h800": (989, 1979, 1979, 80, 3350, 200, 400, 2.00),
    "h100": (989, 1979, 1979, 80, 3350, 450, 400, (1.99, 5.00)),
    "h200": (989, 1979, 1979, 141, 4800, 450, 400, (2.50, 7.00)),
    "h20": (148, 296, 296, 96, 4000, 450, 400, 0.80),
    "a800": (312, None, 624, 80, 2000, 200, 200, 0.75),
    "a100": (312, None, 624, 80, 2039, 300, 200, (0.80, 3.00)),
    "b200": (2250, 4500, 4500, 180, 7700, 900, 800, 2.68),
    "l20": (119.5, 239, 239, 48, 864, None, None, None),
    "ascend-910b": (245.8, None, 560, 64, 1600, 196, 200, 0.67),
    "ascend-910b-313t": (294.9, None, 626, 64, 1600, 196, 200, None),
    "ascend-910b-376t": (353.9, None, 752, 64, 1600, 196, 200, None),
    "ascend-910c": (353.9, None, 752, 64, 1600, 196, None, None),
}


@pytest.fixture
def file(tmp_path):
    """Write a catalogue file."""

    def file(text, name="mine.yaml"):
        path = tmp_path / name
        path.write_text(text)
        return path

    return file


def scaled(value, size):
    return None if value is None else pytest.approx(value * size)


@pytest.mark.parametrize("name", PROFILES)
def test_card_has_the_figures_of_its_public_profile(name):
    bf16, fp8, int8, memory, bandwidth, scale_up, nic, price = PROFILES[name]
    card = BUILT_IN.card(name)
    flops = {"bf16": bf16, "fp8": fp8, "int8": int8}
    assert card.flops_per_s == {d: scaled(f, 1e12) for d, f in flops.items() if f}
    assert card.memory_bytes == memory * 10**9
    assert card.memory_bandwidth_bytes_per_s == scaled(bandwidth, 1e9)
    assert card.scale_up_bytes_per_s == scaled(scale_up, 1e9)
    assert card.nic_bytes_per_s == scaled(nic, 1e9 / 8)
    if isinstance(price, tuple):
        assert card.usd_per_hour_range == price
    else:
        assert card.usd_per_hour == price


def test_price_of_a_range_is_its_middle_and_says_so():
    ranged = [c for c in map(BUILT_IN.card, BUILT_IN.names()) if c.usd_per_hour_range]
    assert [c.name for c in ranged] == ["h100", "h200", "a100"]
    for card in ranged:
        low, high = card.usd_per_hour_range
        assert card.usd_per_hour == pytest.approx((low + high) / 2)
        assert "middle" in card.sources["usd_per_hour"]
    assert "from 2.68" in BUILT_IN.card("b200").sources["usd_per_hour"]


def numbers(card):
    """Yield every field that holds a number, as sources name it."""
    for field in ("memory_bytes", "memory_bandwidth_bytes_per_s", "scale_up_bytes_per_s",
                  "nic_bytes_per_s", "usd_per_hour", "usd_per_hour_range"):  # fmt: skip
        if getattr(card, field) is not None:
            yield field
    yield from (f"flops_per_s.{dtype}" for dtype in card.flops_per_s)
    yield from (f"server.{f}" for f in card.server.__slots__ if getattr(card.server, f) is not None)


@pytest.mark.parametrize("name", BUILT_IN.names())
def test_every_number_has_a_source(name):
    card = BUILT_IN.card(name)
    assert all(card.sources.get(field) for field in numbers(card))
    assert len(list(numbers(card))) >= 3


@pytest.mark.parametrize("name", BUILT_IN.names())
def test_host_nics_and_pcie_are_never_assumed(name):
    server = BUILT_IN.card(name).server
    found = (server.host_nics, server.host_nic_bytes_per_s, server.pcie_bytes_per_s)
    assert found == (None, None, None)


@pytest.mark.parametrize(
    ("reported", "name"),
    [
        ("NVIDIA H20", "h20"),
        ("nvidia h800 ", "h800"),
        ("Ascend910B4", "ascend-910b"),
        ("Ascend910B3", "ascend-910b-313t"),
        ("Ascend910B2", "ascend-910b-376t"),
        ("Ascend910B1", "ascend-910b1"),
    ],
)
def test_card_is_found_by_the_name_its_driver_reports(reported, name):
    assert BUILT_IN.by_driver_name(reported).name == name


def test_unknown_driver_name_is_no_card():
    assert BUILT_IN.by_driver_name("NVIDIA H20-3e") is None


def test_no_driver_name_belongs_to_two_cards():
    names = [d for n in BUILT_IN.names() for d in BUILT_IN.card(n).driver_names]
    assert len(names) == len(set(names)) > len(BUILT_IN.names())


def test_unknown_card_names_the_nearest_and_all():
    with pytest.raises(PlacementError, match=r"'h801'; did you mean h800\?; cards: h800, h100"):
        BUILT_IN.card("h801")


def test_unpriced_card_says_which_key_gives_it_a_price():
    with pytest.raises(PlacementError, match=r"l20 .* cards\.l20\.usd_per_hour \(USD per hour\)"):
        BUILT_IN.card("l20").price()


def test_bin_that_no_source_names_has_no_arithmetic():
    assert BUILT_IN.card("ascend-910b1").flops_per_s == {}


def test_users_file_overrides_one_number_and_keeps_the_rest(file):
    path = file("cards:\n  h800:\n    usd_per_hour: 1.5\n")
    card, before = Catalogue.read(path).card("h800"), BUILT_IN.card("h800")
    assert card.usd_per_hour == 1.5
    assert card.sources["usd_per_hour"] == f"{path}:3"
    assert card.flops_per_s == before.flops_per_s
    assert card.sources["memory_bytes"] == before.sources["memory_bytes"]


def test_users_file_overrides_within_a_section_key_by_key(file):
    path = file("cards:\n  h20: {tflops: {fp8: 250}, server: {host_nics: 2}}\n")
    card = Catalogue.read(path).card("h20")
    assert card.flops_per_s == {"bf16": 148e12, "fp8": 250e12, "int8": 296e12}
    assert (card.server.cards, card.server.host_nics) == (8, 2)


def test_users_source_is_kept(file):
    path = file("cards: {l20: {usd_per_hour: 0.3, sources: {usd_per_hour: our contract}}}\n")
    assert Catalogue.read(path).card("l20").sources["usd_per_hour"] == "our contract"


def test_later_file_lies_over_an_earlier_one(file):
    first = file("cards: {h20: {usd_per_hour: 1, nic_gbit_per_s: 100}}\n", "a.yaml")
    second = file("cards: {h20: {usd_per_hour: 2}}\n", "b.yaml")
    card = Catalogue.read(first, second).card("h20")
    assert (card.usd_per_hour, card.nic_bytes_per_s) == (2, 12.5e9)


def test_null_takes_a_number_away(file):
    card = Catalogue.read(file("cards: {h20: {usd_per_hour: null}}\n")).card("h20")
    assert card.usd_per_hour is None


def test_new_price_takes_the_old_range_away(file):
    card = Catalogue.read(file("cards: {h100: {usd_per_hour: 2.1}}\n")).card("h100")
    assert (card.usd_per_hour, card.usd_per_hour_range) == (2.1, None)


NEW = """\
cards:
  mx-1:
    title: Strange card
    vendor: strange
    backend: strange-backend
    memory_gb: 32
    memory_bandwidth_gb_per_s: 1000
    tflops: {bf16: 100}
    server: {cards: 4}
"""


def test_users_file_adds_a_card_of_a_new_vendor(file):
    path = file(NEW)
    card = Catalogue.read(path).card("MX-1")
    assert (card.backend, card.memory_bytes, card.server.cards) == (
        "strange-backend",
        32 * 10**9,
        4,
    )
    assert card.sources["memory_bytes"] == f"{path}:6"
    assert all(card.sources.get(field) for field in numbers(card))


@pytest.mark.parametrize(
    ("text", "line", "said"),
    [
        ("cards:\n  h800:\n    memory_gb: big\n", 3, "cards.h800.memory_gb: expected a number"),
        ("cards:\n  h800:\n    memory_gb: true\n", 3, "expected a number, got true"),
        ("cards:\n  h800:\n    memory_gb: 80000000000\n", 3, r"expected GB \(1e9 bytes\), more"),
        ("cards:\n  h20:\n    usd_per_hour: -1\n", 3, "expected USD per hour and card, more"),
        ("cards:\n  h20:\n    usd_per_hour: 0\n", 3, "got 0"),
        ("cards:\n  h20:\n    usd_per_hour: .nan\n", 3, "expected a number"),
        ("cards:\n  h20:\n    nic_gbit_per_s: -4\n", 3, r"expected Gb/s \(1e9 bits each second\)"),
        ("cards:\n  h20:\n    usd_per_hour_range: [3, 1]\n", 3, "the lower first"),
        ("cards:\n  h20:\n    usd_per_hour_range: [1]\n", 3, "expected two prices"),
        ("cards:\n  h20:\n    server: {cards: 1.5}\n", 3, "expected a whole number, got 1.5"),
        ("cards:\n  h20:\n    server: {cards: 0}\n", 3, "expected a count, more than 0"),
        ("cards:\n  h20:\n    price: 1\n", 3, "unknown key 'price' in cards.h20; keys: title,"),
        ("cards:\n  h20:\n    tflops: {fp4: 1}\n", 3, "unknown key 'fp4' .*keys: bf16, fp8, int8"),
        ("cards:\n  h20:\n    sources: {prise: x}\n", 3, "unknown key 'prise' .*h20.sources"),
        ("cards:\n  h20:\n    vendor: other\n", 3, "'other' has no backend .*cards.h20.backend"),
        ("cards:\n  My Card: {memory_gb: 1}\n", 2, "small letters, digits"),
        ("cards:\n  h20: 5\n", 2, "cards.h20: expected keys and values, got 5"),
        ("devices: {}\n", 1, "unknown key 'devices'; keys: cards"),
        ("cards:\n  h20:\n    usd_per_hour: 1\n    usd_per_hour: 2\n", 4, "stands twice"),
        ("cards:\n  - h20\n", 1, "cards: expected keys and values"),
    ],
)  # fmt: skip
def test_wrong_file_is_refused_with_file_and_line(file, text, line, said):
    path = file(text)
    with pytest.raises(ConfigError, match=rf"^{re.escape(str(path))}:{line}: .*{said}"):
        Catalogue.read(path)


@pytest.mark.parametrize(
    "key", ["title", "vendor", "memory_gb", "memory_bandwidth_gb_per_s", "server"]
)
def test_new_card_that_lacks_a_figure_is_refused_by_its_line(file, key):
    text = "".join(line for line in NEW.splitlines(True) if f" {key}:" not in line)
    path = file(text)
    with pytest.raises(ConfigError, match=rf"{re.escape(str(path))}:2: cards.mx-1 lacks {key}"):
        Catalogue.read(path)


def test_missing_file_is_refused():
    with pytest.raises(ConfigError, match=r"nowhere\.yaml: cannot be read: No such file"):
        Catalogue.read(Path("nowhere.yaml"))
