"""A plan with every key that a report shows; the figures are made up."""

from step3_hetero.placement.pipeline import (
    AttentionGroup,
    FfnGroup,
    LayerRun,
    PredictedPipeline,
)


def predicted():
    """Return a split pipeline of Step-3's layers."""
    layers = (LayerRun(4, "dense", "local"), LayerRun(56, "moe", "remote"))
    attention = AttentionGroup(
        "h800", "h800", 2, 8, 256, {"dense": 3e-4, "moe": 2.4e-4}, 1.1e-8, "", 2e-4, 2e-4, 1e-5
    )
    ffn = FfnGroup("ascend-910b", "ascend-910b", 1, 16, {"moe": 2.6e-4})
    return PredictedPipeline(
        3, 8192, (*layers, LayerRun(1, "dense", "local")), (attention,), (ffn,), 4e-4
    )


def server(name, card, role, instance, cards=8):
    """Return a server of eight cards."""
    used = [{"role": role, "instance": instance, "cards": cards}] if cards else []
    return {"name": name, "card": card, "cards": 8, "used": used}


CONTEXTS = (2048, 4096, 8192, 16384, 32768, 65536)
LINES = {
    "h800 attention, ascend-910b FFN": (0.040, 1.6e-6, True),
    "h20, colocated": (0.062, 1.1e-6, False),
    "h800, colocated": (0.071, 3.4e-6, False),
    "a800, colocated": (0.058, 2.9e-6, False),
}
"""Label -> $ at no context, $ for each token of it, whether it was chosen."""


def charts(labels):
    """Return what the charts are drawn from."""
    return {
        "breakdown": {
            "attention, h800": 0.0301,
            "FFN, ascend-910b": 0.0174,
            "idle in bubbles": 0.0076,
        },
        "cost_by_context": [
            {
                "label": label,
                "chosen": chosen,
                "points": [
                    {"context": c, "usd_per_mtok": None if c > 40000 and not chosen else a + b * c}
                    for c in CONTEXTS
                ],
            }
            for label, (a, b, chosen) in LINES.items()
        ],
        "pareto": [
            {"tpot_ms": 21.0, "usd_per_mtok": 0.114, "label": "h800, colocated"},
            {"tpot_ms": 33.5, "usd_per_mtok": 0.078, "label": "h800 + h20"},
            {"tpot_ms": 48.6, "usd_per_mtok": 0.0551, "label": labels[0], "chosen": True},
            {"tpot_ms": 72.0, "usd_per_mtok": 0.0509, "label": "h20 + ascend-910b"},
        ],
        "racks": [
            {
                "name": "rack 1",
                "servers": [
                    server("h800-0", "h800", "attention", 0),
                    server("h800-1", "h800", "attention", 1),
                    server("h800-2", "h800", "attention", 2, cards=0),
                ],
            },
            {
                "name": "rack 2",
                "servers": [
                    server("ascend-0", "ascend-910b", "ffn", 0),
                    server("ascend-1", "ascend-910b", "ffn", 1),
                ],
                "more_servers": 6,
            },
        ],
    }


def full_plan():
    """Return the JSON of a feasible plan with every optional key."""
    labels = list(LINES)
    return {
        "feasible": True,
        "objective_usd_per_mtok": 0.0551,
        "lower_bound": 0.0549,
        "gap": 0.0036,
        "paper_bound": 0.0547,
        "tpot_ms": 48.6,
        "tokens_per_s": 26825.0,
        "cards": {"h800": 16, "ascend-910b": 16},
        "attention": {"pool": "h800", "instances": 2, "tp": 8, "batch": 256, "precision": "fp8"},
        "ffn": {"pool": "ascend-910b", "instances": 2, "ep": 2, "tp": 8, "precision": "int8"},
        "split": True,
        "alternatives": [
            {
                "label": f"{labels[n % 4]}, case {n}",
                "usd_per_mtok": None if n == 3 else 0.0551 * (1.02 + 0.03 * n),
                "loses_on": ("price", "network", "stage time", "memory")[n % 4],
                "detail": "8 cards share one 200 Gb/s host NIC: F2A takes 576 µs of 272 µs.",
            }
            for n in range(12)
        ],
        "solve_s": 0.41,
        "model": "step3",
        "context": 8192,
        "tpot_target_ms": 50.0,
        "binding": "The FFN's stage time of 260 µs keeps the batch from growing.",
        "notes": ["ascend-910b is uncalibrated: its constants are assumed."],
        "usd_per_mtok_range": (0.0489, 0.0634),
        **charts(labels),
        "pipeline": predicted().to_json(),
    }
