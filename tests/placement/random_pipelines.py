"""Random small pipelines, and the same as the plain lists that the simpy model takes."""

import random
from fractions import Fraction

from step3_hetero.placement.pipeline import (
    AttentionGroup,
    FfnGroup,
    LayerRun,
    PredictedPipeline,
)

CONTEXT = 4096


def random_pipeline(seed):
    """Return a pipeline of 1 to 3 groups a side; one in five is colocated."""
    draw = random.Random(seed)
    m, colocated = draw.randint(1, 5), draw.random() < 0.2
    runs = [LayerRun(draw.randint(1, 2), "dense", "local")]
    sets = []
    if not colocated:
        runs = [*runs, LayerRun(draw.randint(1, 4), "moe", "remote"), *runs[: draw.randint(0, 1)]]
        sets = [f"f{n}" for n in range(draw.randint(1, 2))]
    names = [f"a{n}" for n in range(max(len(sets), draw.randint(1, 3)))]

    def seconds():
        return draw.uniform(1e-4, 5e-4)

    attention = tuple(
        AttentionGroup(
            name, "h800", draw.randint(1, 4), 8, draw.randint(1, 300),
            {"dense": seconds(), "moe": seconds()}, draw.uniform(0, 1e-6),
            sets[number % len(sets)] if sets else "",
            seconds() / 2, seconds() / 2, draw.choice([0.0, 2e-5]),
        )
        for number, name in enumerate(names)
    )  # fmt: skip
    flows = {name: m * sum(a.instances for a in attention if a.feeds == name) for name in sets}
    ffn = tuple(
        FfnGroup(name, "ascend-910b", draw.randint(1, min(4, flows[name])), 16, {"moe": seconds()})
        for name in sets
    )
    serves = draw.choice(["together", "in-turn"])
    return PredictedPipeline(m, CONTEXT, tuple(runs), attention, ffn, seconds(), serves)


def plain(pipeline, contexts=None):
    """Return the lists of `simpy_pipeline.run`; the set of each micro-batch by the rule's words."""
    first_set, total = {}, 0
    for group in pipeline.ffn:
        first_set[group.name] = (total, group.instances)
        total += group.instances
    feeding = {
        name: sum(a.instances for a in pipeline.attention if a.feeds in ("", name))
        for name in first_set
    }
    met = dict.fromkeys(first_set, 0)
    instances = []
    for group in pipeline.attention:
        fed = group.feeds or next(iter(first_set), "")
        for _ in range(group.instances):
            set_of = [0] * pipeline.micro_batches
            if fed:
                first, sets = first_set[fed]
                k = met[fed]
                met[fed] += 1
                shift = feeding[fed] if feeding[fed] < sets else 0
                set_of = [first + (k + j * shift) % sets for j in range(pipeline.micro_batches)]
            number = len(instances)
            instances.append(
                {
                    "attention": group.seconds,
                    "slope": group.seconds_per_context_token,
                    "a2f": group.a2f_s,
                    "f2a": group.f2a_s,
                    "latency": group.latency_s,
                    "set_of": set_of,
                    "context": [
                        CONTEXT if contexts is None else contexts[j][number]
                        for j in range(pipeline.micro_batches)
                    ],
                }
            )
    return {
        "micro_batches": pipeline.micro_batches,
        "layers": [(r.kind, r.ffn == "remote") for r in pipeline.layers for _ in range(r.count)],
        "instances": instances,
        "sets": [g.seconds for g in pipeline.ffn for _ in range(g.instances)],
        "between": pipeline.between_tokens_s,
        "plan_context": pipeline.context,
        "in_turn": pipeline.ffn_serves == "in-turn",
    }


def batches(pipeline):
    """Return the sequences of a micro-batch of each instance."""
    return [Fraction(g.batch) for g in pipeline.attention for _ in range(g.instances)]
