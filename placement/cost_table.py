"""Cost by model, context and accelerator, as rows for a table, JSON or CSV."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from step3_hetero.placement.cost import LEFT_OUT, Accelerator, Policy, Split, cost, split
from step3_hetero.placement.workload import ELEMENT_BYTES, Workload


@dataclass(frozen=True, slots=True)
class CostTable:
    """What was asked for: models, contexts in tokens, accelerators, and how to count."""

    models: tuple[Workload, ...]
    contexts: tuple[int, ...]
    accelerators: tuple[Accelerator, ...]
    policy: Policy
    left_out: tuple[str, ...] = ()  # cards without a price
    files: tuple[str, ...] = ()  # the user's, over the built-in catalogue

    def split(self, model: Workload, context: int) -> Split:
        """Return the cheapest attention and the cheapest FFN of one model at one context."""
        return split(model, self.accelerators, context)

    def rows(self) -> list[dict[str, Any]]:
        """Return one row for each model, context and accelerator, unrounded."""
        return [
            _row(model, context, accelerator, self.policy)
            for model in self.models
            for context in self.contexts
            for accelerator in self.accelerators
        ]

    def splits(self) -> list[dict[str, Any]]:
        """Return one row for each model and context: each half where it costs least."""
        return [
            {
                "model": model.name,
                "context": context,
                "attention_on": found.attention,
                "ffn_on": found.ffn,
                "usd_per_mtok": found.usd,
            }
            for model in self.models
            for context in self.contexts
            for found in [self.split(model, context)]
        ]

    def notes(self) -> list[str]:
        """Return what a reader has to know beside the numbers."""
        notes = [f"policy {self.policy.name}; {LEFT_OUT}"]
        if self.left_out:
            notes.append(
                f"without a price or arithmetic, left out: {', '.join(self.left_out)}; "
                "name them in a file with --catalogue"
            )
        borrowed = [a.name for a in self.accelerators if a.figures == "catalogue"]
        if borrowed and not self.policy.catalogue:
            notes.append(f"figures of the catalogue, not the paper's: {', '.join(borrowed)}")
        fixed = [a.name for a in self.accelerators if a.figures == "paper"]
        if self.files and fixed:
            notes.append(
                f"policy {self.policy.name} keeps the paper's figures for {', '.join(fixed)}; "
                f"policy catalogue takes those of {', '.join(self.files)}"
            )
        routed = [m.name for m in self.models if any(p.name == "attention-moe" for p in m.parts)]
        if routed:
            notes.append(f"router counted, which the paper leaves out: {', '.join(routed)}")
        return notes

    def to_json(self) -> dict[str, Any]:
        """Return models, rows, AFD totals and notes as plain data, unrounded."""
        return {
            "policy": self.policy.name,
            "notes": self.notes(),
            "models": [_model(model) for model in self.models],
            "costs": self.rows(),
            "afd": self.splits(),
        }


def _model(model: Workload) -> dict[str, Any]:
    """Return what does not depend on the context: FLOPs of one token and weights, by stage."""
    stages = dict.fromkeys(part.stage for part in model.parts)
    return {
        "model": model.name,
        "layers": model.layers,
        "hidden": model.hidden,
        "active_expert_fraction": model.active_expert_fraction,
        "linear_flops": {
            stage: sum(p.layers * p.linear_flops for p in model.of(stage)) for stage in stages
        },
        "weight_bytes": {
            precision: {stage: model.weight_bytes(precision, stage) for stage in stages}
            for precision in ELEMENT_BYTES
        },
    }


def _row(model: Workload, context: int, accelerator: Accelerator, policy: Policy) -> dict[str, Any]:
    priced = cost(model, accelerator, context)
    return {
        "model": model.name,
        "context": context,
        "hardware": accelerator.name,
        "policy": policy.name,
        "figures": accelerator.figures,
        "arithmetic": accelerator.arithmetic,
        "kv_bytes": model.kv_bytes(context),
        "attention_flops": model.attention_flops(context),
        "linear_flops": model.linear_flops,
        "ffn_flops": model.ffn_flops,
        "attention_usd_per_mtok": priced.attention_usd,
        "ffn_usd_per_mtok": priced.ffn_usd,
        "total_usd_per_mtok": priced.total_usd,
        "bound": priced.bound,
    }
