"""The keys of a catalogue file, and one sentence with file:line for each that will not do.

A file holds ``cards:``, by name. Every key of a card may be left out: what the file says is laid
over what the catalogue knows already, key by key.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError
from pydantic_core import PydanticCustomError

from step3_hetero.config.document import Document, Problem, refuse, shown
from step3_hetero.config.explain import ABOUT_KEY, WHOLE, problems_of

ALL = "all"
"""The key of ``sources`` that speaks for every number without a source of its own."""


def _quantity(unit: str, most: float) -> AfterValidator:
    """Accept more than nothing, up to ten times and more what any device has, in the unit."""

    def check(value: float) -> float:
        if 0 < value <= most:
            return value
        text = f"expected {unit}, more than 0 and up to {most:,.0f}, got {shown(value)}"
        raise PydanticCustomError(ABOUT_KEY, "{text}", {"text": text})

    return AfterValidator(check)


def _matching(pattern: str, said: str) -> AfterValidator:
    def check(value: str) -> str:
        if re.fullmatch(pattern, value):
            return value
        text = f"{said}, got {shown(value)}"
        raise PydanticCustomError(WHOLE, "{text}", {"text": text})

    return AfterValidator(check)


def _range(value: tuple[float, ...] | None) -> tuple[float, ...] | None:
    if value is None or (len(value) == 2 and value[0] <= value[1]):
        return value
    text = "expected two prices in USD per hour, the lower first"
    raise PydanticCustomError(ABOUT_KEY, "{text}", {"text": text})


CardName = Annotated[
    str, _matching("[a-z0-9][a-z0-9.-]*", "cards: a name is small letters, digits, - and .")
]
Text = Annotated[str, Field(min_length=1)]
Gigabytes = Annotated[float, _quantity("GB (1e9 bytes)", 100_000)]
GigabytesPerSecond = Annotated[float, _quantity("GB/s (1e9 bytes each second)", 1_000_000)]
GigabitsPerSecond = Annotated[float, _quantity("Gb/s (1e9 bits each second)", 100_000)]
Teraflops = Annotated[float, _quantity("TFLOP/s, dense (1e12 each second)", 1_000_000)]
UsdPerHour = Annotated[float, _quantity("USD per hour and card", 10_000)]
Count = Annotated[int, _quantity("a count", 1_000)]


class _Section(BaseModel):
    """Frozen, no unknown keys, no conversions."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


class Teraflop(_Section):
    """Dense arithmetic by dtype; null or left out where the card has none."""

    bf16: Teraflops | None = None
    fp8: Teraflops | None = None
    int8: Teraflops | None = None


class ServerEntry(_Section):
    """One server of a card's usual type."""

    cards: Count | None = None
    host_nics: Count | None = None
    host_nic_gbit_per_s: GigabitsPerSecond | None = None
    pcie_gb_per_s: GigabytesPerSecond | None = None


class CardEntry(_Section):
    """One card; the units stand in the keys, and every link counts one direction."""

    title: Text | None = None
    vendor: Text | None = None
    backend: Text | None = None
    driver_names: Annotated[tuple[Text, ...], Field(strict=False)] | None = None
    memory_gb: Gigabytes | None = None
    memory_bandwidth_gb_per_s: GigabytesPerSecond | None = None
    tflops: Teraflop = Teraflop()
    scale_up_gb_per_s: GigabytesPerSecond | None = None
    nic_gbit_per_s: GigabitsPerSecond | None = None
    usd_per_hour: UsdPerHour | None = None
    usd_per_hour_range: Annotated[
        Annotated[tuple[UsdPerHour, ...], Field(strict=False)] | None, AfterValidator(_range)
    ] = None
    server: ServerEntry = ServerEntry()
    sources: dict[str, Text] = {}


class CatalogueFile(_Section):
    """The whole file."""

    cards: dict[CardName, CardEntry]


@dataclass(frozen=True, slots=True)
class Stated:
    """One value of one card as a file states it, under its dotted key (``server.cards``)."""

    value: Any
    source: str
    place: str


Merged = dict[str, dict[str, Stated]]
"""By card and dotted key: what the files read so far say."""


def lay_over(merged: Merged, path: Path, *, built_in: bool = False) -> None:
    """Read a file and lay its cards over ``merged``, key by key.

    A number without a source in the file goes by its place there, as ``mine.yaml:7``. A new price
    takes the old price's range away.

    Raises:
        ConfigError: the file cannot be read or breaks a rule; ``mine.yaml:7: ...``.
    """
    document = Document.read(path)
    problems = list(document.problems)
    try:
        file = CatalogueFile.model_validate(document.values)
    except ValidationError as failed:
        refuse([*problems, *problems_of(failed, CatalogueFile, document)])
        raise  # unreachable: a failed validation has at least one problem
    refuse([*problems, *_strange_sources(file, document)])
    for name, entry in file.cards.items():
        values = merged.setdefault(name, {})
        values.setdefault("", Stated(None, "", document.place(["cards", name]).text))
        stated = dict(_stated(entry))
        if "usd_per_hour" in stated and "usd_per_hour_range" not in stated:
            values.pop("usd_per_hour_range", None)
        for key, value in stated.items():
            place = document.place(["cards", name, *key.split(".")]).text
            source = _source(entry, key, value, "" if built_in else place)
            values[key] = Stated(value, source, place)


def keys() -> list[str]:
    """Return every dotted key of a card, in the order of the file."""
    return [key for key, _ in _walk(CardEntry(), lambda section: type(section).model_fields)]


def _stated(entry: CardEntry) -> Iterator[tuple[str, Any]]:
    """Yield what the file writes, nulls included; what it leaves out is not there."""
    return _walk(entry, lambda section: section.model_fields_set)


def _walk(
    section: BaseModel, names: Callable[[BaseModel], Any], above: str = ""
) -> Iterator[tuple[str, Any]]:
    for name in type(section).model_fields:
        if name not in names(section) or name == "sources":
            continue
        value = getattr(section, name)
        if isinstance(value, BaseModel):
            yield from _walk(value, names, f"{above}{name}.")
        else:
            yield above + name, value


def _source(entry: CardEntry, key: str, value: Any, default: str) -> str:
    """Return the source of a key, of the section it is in, or of all; `all` speaks of no null."""
    for name in (key, key.rpartition(".")[0], *([] if value is None else [ALL])):
        if name in entry.sources:
            return entry.sources[name]
    return default


def _strange_sources(file: CatalogueFile, document: Document) -> Iterator[Problem]:
    known = {ALL, "tflops", "server", *keys()}
    for name, entry in file.cards.items():
        for key in entry.sources:
            if key not in known:
                place = document.place(["cards", name, "sources", key])
                message = f"unknown key {shown(key)} in cards.{name}.sources; keys: all, tflops, "
                yield Problem(place, f"{message}server, {', '.join(keys())}")
