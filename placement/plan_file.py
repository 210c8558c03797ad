"""A plan as config files of version 1, with the prediction beside them under ``predicted``.

A config has one role for attention and one for FFN (or one for both). A plan that mixes pools is
several such deployments, which share nothing but their users: one file for each.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from step3_hetero.errors import PlacementError
from step3_hetero.model.config import FAMILIES
from step3_hetero.placement.network import EDGES
from step3_hetero.placement.plan_pipeline import shares
from step3_hetero.placement.planner import Outcome
from step3_hetero.placement.plans import AnyPlan, ColocatedPlan, SplitPlan
from step3_hetero.placement.written import write_whole

LEFT_OUT = (
    "alternatives", "attention", "ffn", "pipeline", "racks", "cost_by_context", "pareto"
)  # fmt: skip
"""Keys of the JSON that a config says in its own words, or that are too long for it."""


def plan_files(
    outcome: Outcome, document: Mapping[str, Any], path: Path, model: str
) -> dict[Path, str]:
    """Return each file's text: ``plan.yaml``, and ``plan-2.yaml`` on where pools mix.

    Raises:
        PlacementError: there is no plan, or the model is none that a config can name.
    """
    import yaml

    if outcome.plan is None:
        raise PlacementError(f"no plan, so {path} is not written: {document['reason']}")
    if model not in FAMILIES and not Path(model).is_dir():
        raise PlacementError(
            f"--out: {model!r} can be planned but not run; a config's model is a folder or one of "
            f"{', '.join(FAMILIES)}"
        )
    named = model if model in FAMILIES else _relative(Path(model), path.parent)
    units = unit_plans(outcome.plan)
    texts: dict[Path, str] = {}
    for number, unit in enumerate(units):
        file = path if number == 0 else path.with_stem(f"{path.stem}-{number + 1}")
        config = config_of(unit, outcome, document, named, (number + 1, len(units)))
        head = f"# Written by step3-hetero plan: {document['label']}\n"
        texts[file] = head + yaml.safe_dump(config, sort_keys=False, width=100)
    return texts


def write_plan(outcome: Outcome, document: Mapping[str, Any], path: Path, model: str) -> list[Path]:
    """Write the files of a plan; return their names."""
    texts = plan_files(outcome, document, path, model)
    for file, text in texts.items():
        write_whole(file, text)
    return list(texts)


def _relative(folder: Path, base: Path) -> str:
    """Return a folder as seen from another, with a slash in it, so that it is taken for a path."""
    text = os.path.relpath(folder, base)  # Path.relative_to does not walk up before Python 3.12
    return text if "/" in text else f"./{text}"


def unit_plans(plan: AnyPlan) -> list[AnyPlan]:
    """Return a plan's deployments: each with one attention and one FFN column, or one colocated.

    Raises:
        PlacementError: two kinds of attention instances share an FFN set.
    """
    if isinstance(plan, ColocatedPlan):
        return [ColocatedPlan(((c, n),), c.tokens_per_s * n, plan.cost) for c, n in plan.columns]
    units: list[AnyPlan] = []
    _refuse_shared_sets(plan)
    for a, f, count in shares(plan):
        column, sets = plan.ffn[f]
        part = plan.flow[a, f] / max(plan.flow[:, f].sum(), 1e-12)
        held = max(1, round(sets * part))
        units.append(
            replace(
                plan,
                attention=((plan.attention[a][0], count),),
                ffn=((column, held),),
                flow=plan.flow[a : a + 1, f : f + 1],
                tokens_per_s=plan.tokens_per_s * plan.flow[a, f] / plan.flow.sum(),
            )
        )
    return sorted(units, key=lambda unit: -unit.tokens_per_s)


def _refuse_shared_sets(plan: SplitPlan) -> None:
    """Refuse what a config cannot say: it has one role for attention, which feeds whole sets."""
    for f, (column, sets) in enumerate(plan.ffn):
        feeding = [a for a, g, _ in shares(plan) if g == f]
        if len(feeding) > sets:
            names = " and ".join(plan.pools[plan.attention[a][0].pool].name for a in feeding)
            least = min(feeding, key=lambda a: float(plan.flow[a].sum()))
            pool = plan.pools[plan.attention[least][0].pool].card.name
            raise PlacementError(
                f"--out: a config has one attention role, but {len(feeding)} kinds of instances "
                f"(on {names}) share {sets} FFN set of {column.cards} "
                f"{plan.pools[column.pool].name}; nearest change: --exclude attention:{pool}"
            )


def config_of(
    unit: AnyPlan,
    outcome: Outcome,
    document: Mapping[str, Any],
    model: str,
    place: tuple[int, int],
) -> dict[str, Any]:
    """Return one deployment as a config's keys."""
    from step3_hetero.placement.plan_pipeline import pipeline_of

    problem = outcome.request.problem
    split = isinstance(unit, SplitPlan)
    roles = _split_roles(unit) if isinstance(unit, SplitPlan) else _colocated_roles(unit, outcome)
    precision = next(iter(roles.values()))["weights"]
    in_flight = unit.micro_batches if isinstance(unit, SplitPlan) else unit.columns[0][0].in_flight
    predicted = {key: _plain(v) for key, v in document.items() if key not in LEFT_OUT}
    predicted |= {
        "deployment": f"{place[0]} of {place[1]}",
        "deployment_tokens_per_s": float(unit.tokens_per_s),
        "pipeline": _plain(pipeline_of(unit, problem, _layer_kinds(document)).to_json()),
    }
    config: dict[str, Any] = {
        "version": 1,
        "model": model,
        "roles": roles,
        "runtime": {
            "processes": "per-role",
            "dtype": "bf16",
            "microbatches": in_flight,
            "max_batch": in_flight * _sequences(unit),
            "kv_dtype": precision,
        },
    }
    if split:
        config["transport"] = {
            "kind": EDGES, "a2f_dtype": problem.wire_dtype, "f2a_dtype": "bf16"
        }  # fmt: skip
    return config | {"predicted": predicted}


def _layer_kinds(document: Mapping[str, Any]) -> tuple[str, ...]:
    runs = document["pipeline"]["layers"]
    return tuple(run["kind"] for run in runs for _ in range(run["count"]))


def _sequences(unit: AnyPlan) -> int:
    """Return the sequences of one micro-batch of one attention instance, rounded up.

    The flow is a solver's: what stands a millionth over a whole number is that number, since one
    sequence more may not fit the card's memory.
    """
    if isinstance(unit, ColocatedPlan):
        return unit.columns[0][0].batch
    return max(1, math.ceil(float(unit.flow.sum()) / unit.attention[0][1] - 1e-6))


def _split_roles(unit: SplitPlan) -> dict[str, Any]:
    (a, instances), (f, sets) = unit.attention[0], unit.ffn[0]
    return {
        "a": _role(
            ["embed", "vision", "attention", "head"], unit.pools[a.pool].card,
            instances, a.tp, 1, a.precision,
        ),
        "f": _role(["ffn"], unit.pools[f.pool].card, sets * f.ep, f.tp, f.ep, f.precision),
    }  # fmt: skip


def _colocated_roles(unit: ColocatedPlan, outcome: Outcome) -> dict[str, Any]:
    column, count = unit.columns[0]
    card = outcome.request.problem.pools[column.pool].card
    ep = column.cards // column.tp
    stages = ["embed", "vision", "attention", "ffn", "head"]
    return {"all": _role(stages, card, count * ep, column.tp, ep, column.precision)}


def _role(
    stages: list[str], card: Any, instances: int, tp: int, ep: int, precision: str
) -> dict[str, Any]:
    return {
        "stages": stages,
        "backend": card.backend,
        "card": card.name,
        "instances": instances,
        "tp": tp,
        "ep": ep,
        "weights": precision,
    }


def _plain(value: Any) -> Any:
    """Return a value as YAML writes it: no NumPy, no tuples."""
    if isinstance(value, Mapping):
        return {str(key): _plain(v) for key, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    return value.item() if isinstance(value, np.generic) else value
