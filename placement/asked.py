"""From the words of the command line to a `Request`; a refusal names the option and the unit."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Self

from step3_hetero.errors import PlacementError
from step3_hetero.placement.catalogue import Catalogue
from step3_hetero.placement.columns import Problem
from step3_hetero.placement.inventory import Inventory
from step3_hetero.placement.network import NoWire, Wire, wire_between, with_host_nics
from step3_hetero.placement.plan_json import About
from step3_hetero.placement.plans import Objective, Request
from step3_hetero.placement.pools import Pool, parse_pools
from step3_hetero.placement.profile_file import Profile
from step3_hetero.placement.racks import Placed
from step3_hetero.placement.workload import Workload, config_named, step3_workload, workload

MOST_CONTEXT = 100_000_000
MOST_TPOT_MS = 1e6
MOST_DEMAND = 1e12
MOST_GBIT = 1e5
MOST_NICS = 64
MOST_GBYTES = 1e4

EXCLUSIONS = ("vendors", "dtype", "rack", "attention", "ffn")
COLOCATED = "colocated"
"""The exclusion that names nothing: no plan that does not split."""
DTYPES = ("fp8", "int8", "bf16")


@dataclass(frozen=True, slots=True)
class Asked:
    """A request, and what the answer has to say beyond it."""

    request: Request
    about: About
    servers: Inventory

    @classmethod
    def of(
        cls,
        *,
        model: str,
        pools: Sequence[str],
        inventory: str | None = None,
        context: int = 8192,
        tpot_ms: float = 50.0,
        jitter: float = 0.10,
        demand: float | None = None,
        objective: Objective = "usd",
        host_nic_gbit: float | None = None,
        host_nics_per_server: int | None = None,
        pcie_gbytes: float | None = None,
        exclude: Sequence[str] = (),
        profiles: Sequence[str] = (),
        catalogues: Sequence[str] = (),
    ) -> Self:
        """Read and check everything.

        Raises:
            PlacementError, ConfigError: an option is out of range or names what does not exist.
        """
        _within("--context", context, 1, MOST_CONTEXT, "tokens")
        _within("--tpot-ms", tpot_ms, 1e-3, MOST_TPOT_MS, "milliseconds")
        _within("--jitter", jitter, 0, 0.9, "as a part of the target")
        _within("--demand", demand, 1e-6, MOST_DEMAND, "tokens per second")
        _check_links(host_nic_gbit, host_nics_per_server, pcie_gbytes)
        if objective == "tokens" and demand is not None:
            raise PlacementError("--demand says how many tokens; --objective tokens asks for most")
        workload, layers = read_model(model)
        excluded = read_exclusions(exclude)
        catalogue = Catalogue.read(*catalogues)
        if (inventory is None) == (not pools):
            raise PlacementError("give either --pool CARD=N, once or more, or --inventory FILE")
        hosts = None
        if inventory is not None:
            hosts = Inventory.read(Path(inventory), catalogue, excluded["rack"])
            found = hosts.pools()
        elif excluded["rack"]:
            raise PlacementError("--exclude rack: only an --inventory has racks")
        else:
            found = parse_pools(pools, catalogue)
        links = (host_nic_gbit, host_nics_per_server, pcie_gbytes)
        found = [replace(p, card=with_host_nics(p.card, *links)) for p in found]
        for file in profiles:
            found = Profile.read(Path(file)).applied(found)
        if objective == "usd":
            for pool in found:
                pool.card.price()
        problem = Problem(
            workload, tuple(found), context, wires_of(found, excluded["vendors"]),
            frozenset(excluded["dtype"]), _excluded_roles(excluded, found),
        )  # fmt: skip
        request = Request(problem, tpot_ms * 1e-3, objective, demand, jitter)
        notes = [] if hosts else _server_notes(found)
        about = About(workload.name, layers, tuple(notes))
        return cls(request, about, hosts or Inventory.of_pools(found))

    def about_placed(self, placed: Placed) -> About:
        """Return what is to be said of a plan on its servers."""
        notes = self.about.notes
        if placed.left_out:
            left = f"{placed.left_out} attention instances found no way over the racks' uplinks"
            notes = (*notes, f"network: {left} and are left out; the gap counts them")
        return replace(
            self.about, notes=notes, more={"racks": placed.racks} if placed.racks else {}
        )


def _check_links(
    host_nic_gbit: float | None, host_nics_per_server: int | None, pcie_gbytes: float | None
) -> None:
    _within("--host-nic-gbit", host_nic_gbit, 1e-3, MOST_GBIT, "Gb/s")
    _within("--host-nics-per-server", host_nics_per_server, 1, MOST_NICS, "NICs")
    _within("--pcie-gbytes", pcie_gbytes, 1e-3, MOST_GBYTES, "GB/s each way")


def _within(option: str, value: float | None, least: float, most: float, unit: str) -> None:
    if value is not None and not (math.isfinite(value) and least <= value <= most):
        raise PlacementError(
            f"{option} {value!r}: expected {_plain(least)} to {_plain(most)} {unit}"
        )


def _plain(bound: float) -> str:
    """Write a bound without an exponent.

    >>> _plain(1e-6), _plain(0), _plain(0.9), _plain(1e8)
    ('0.000001', '0', '0.9', '100,000,000')
    """
    return f"{bound:,.6f}".rstrip("0").rstrip(".")


def _server_notes(pools: Sequence[Pool]) -> list[str]:
    told = ", ".join(f"{p.card.server.cards} {p.name}" for p in pools)
    return [f"one type of server for each pool is assumed, from the catalogue: {told} a server"]


def read_model(text: str) -> tuple[Workload, tuple[str, ...]]:
    """Return a model's workload and the kind of each layer in order, where that is known.

    Raises:
        PlacementError, ConfigError: it is no family, no folder of a Step-3-like model, and none of
            the paper's.
    """
    model = config_named(text)
    if model is None:
        return workload(text), ()
    layers = range(model.text.num_hidden_layers)
    kinds = tuple("moe" if model.text.is_moe(layer) else "dense" for layer in layers)
    return step3_workload(model), kinds


def read_exclusions(texts: Sequence[str]) -> Mapping[str, set[str]]:
    """Read ``vendors:nvidia+ascend``, ``dtype:int8``, ``rack:r7``, ``ffn:h800``, ``colocated``.

    Raises:
        PlacementError: the form or a dtype is unknown.
    """
    found: dict[str, set[str]] = {kind: set() for kind in (*EXCLUSIONS, COLOCATED)}
    for text in texts:
        kind, sign, what = text.partition(":")
        if text == COLOCATED:
            found[COLOCATED].add("")
            continue
        if not sign or kind not in EXCLUSIONS or not what:
            allowed = "vendors:A+B, dtype:NAME, rack:NAME, attention:CARD, ffn:CARD, colocated"
            raise PlacementError(f"--exclude {text!r}: expected one of {allowed}")
        if kind == "dtype" and what not in DTYPES:
            raise PlacementError(f"--exclude {text!r}: unknown dtype; dtypes: {', '.join(DTYPES)}")
        if kind == "vendors" and len(what.split("+")) != 2:
            raise PlacementError(f"--exclude {text!r}: expected two vendors, as nvidia+ascend")
        found[kind].add("+".join(sorted(what.split("+"))) if kind == "vendors" else what)
    return found


def _excluded_roles(
    excluded: Mapping[str, set[str]], pools: Sequence[Pool]
) -> frozenset[tuple[str, str]]:
    """Return the roles that some cards may not run.

    Raises:
        PlacementError: a card is in no pool.
    """
    cards = {pool.card.name for pool in pools}
    found = {(role, card) for role in ("attention", "ffn", COLOCATED) for card in excluded[role]}
    for role, card in sorted(found - {(COLOCATED, "")}):
        if card not in cards:
            known = ", ".join(sorted(cards))
            raise PlacementError(f"--exclude {role}:{card}: no such card; cards: {known}")
    return frozenset(found)


def wires_of(
    pools: Sequence[Pool], excluded: set[str] | frozenset[str] = frozenset()
) -> dict[tuple[int, int], Wire | NoWire]:
    """Return the wire, or why there is none, from each pool's attention to each pool's FFN."""
    wires: dict[tuple[int, int], Wire | NoWire] = {}
    for i, a in enumerate(pools):
        for j, b in enumerate(pools):
            vendors = "+".join(sorted((a.card.vendor, b.card.vendor)))
            if vendors in excluded:
                wires[i, j] = NoWire(f"--exclude vendors:{vendors}")
            else:
                wires[i, j] = wire_between(a.card, b.card)
    return wires


def request_of(
    workload: Workload, pools: Sequence[Pool], context: int, tpot_s: float, **rest: Any
) -> Request:
    """Return a request over some pools, nothing excluded: for scripts and tests."""
    problem = Problem(workload, tuple(pools), context, wires_of(pools))
    return Request(problem, tpot_s, **rest)
