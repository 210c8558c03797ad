"""The pipeline that a plan predicts, as `step3-hetero simulate` reads it from a plan's YAML.

The keys, all seconds for one micro-batch in one layer unless said otherwise::

    predicted:
      pipeline:
        micro_batches: 3           # in flight in each attention instance, from 1
        context: 8192              # tokens of context at which attention's seconds hold
        between_tokens_s: 0.0004   # embedding, head and sampling of one micro-batch, once a
                                   # token, before the first layer's attention; default 0
        ffn_serves: together       # together: an FFN set runs one pass over micro-batch j of all
                                   # attention instances that feed it, when the last has arrived;
                                   # in-turn: one pass for each of them, in order; default together
        layers:                    # runs of like layers, first to last; `count` sums to the model's
          - {count: 4, kind: dense, ffn: local}     # local: the FFN runs on the attention instance,
          - {count: 56, kind: moe, ffn: remote}     # its time is part of attention's, no wire
          - {count: 1, kind: dense, ffn: local}     # a colocated plan has local layers only
        attention:                 # one entry for each group of like instances
          - name: h800             # unique in the list; the pool's name where one entry is its all
            card: h800             # catalogue name
            instances: 2
            cards: 8               # in each instance
            batch: 256             # sequences of one micro-batch in one instance
            spares: 0              # instances that stand by; default 0
            seconds: {dense: 0.0003, moe: 0.00024}  # by kind of layer, at `context`
            seconds_per_context_token: 1.1e-8       # added for each token of mean context above
                                                    # `context`, in every layer; default 0
            feeds: ascend-910b     # name of an `ffn` entry; may be left out where there is only one
            a2f_s: 0.0002          # occupies the instance's outgoing link; default 0
            f2a_s: 0.0003          # occupies the instance's incoming link; default 0
            latency_s: 0.00001     # added to each of the two, occupies nothing; default 0
        ffn:                       # one entry for each group of like FFN sets; [] where colocated
          - name: ascend-910b
            card: ascend-910b
            instances: 1           # sets: replicas of all experts (ep instances of the config)
            cards: 16              # in each set
            spares: 0              # sets that stand by; default 0
            seconds: {moe: 0.00026}  # one pass of a set, by kind of layer, at its usual tokens

Attention instance k of those that feed an entry (counted through the list) uses its set k mod sets.
With fewer instances than sets, micro-batch j of instance k uses set (k + j * instances) mod sets.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from step3_hetero.placement.pipeline_keys import Keys

TOGETHER, IN_TURN = "together", "in-turn"
LOCAL, REMOTE = "local", "remote"
Where = Callable[[str], str]


@dataclass(frozen=True, slots=True)
class LayerRun:
    """``count`` like layers in a row; ``ffn`` is "local" (with the attention) or "remote"."""

    count: int
    kind: str
    ffn: str


@dataclass(frozen=True, slots=True)
class AttentionGroup:
    """Like attention instances; the module's text says what each key means."""

    name: str
    card: str
    instances: int
    cards: int
    batch: int
    seconds: Mapping[str, float]
    seconds_per_context_token: float = 0.0
    feeds: str = ""
    a2f_s: float = 0.0
    f2a_s: float = 0.0
    latency_s: float = 0.0
    spares: int = 0


@dataclass(frozen=True, slots=True)
class FfnGroup:
    """Like FFN sets; the module's text says what each key means."""

    name: str
    card: str
    instances: int
    cards: int
    seconds: Mapping[str, float]
    spares: int = 0


@dataclass(frozen=True, slots=True)
class PredictedPipeline:
    """The whole pipeline; the module's text is the contract of its keys."""

    micro_batches: int
    context: int
    layers: tuple[LayerRun, ...]
    attention: tuple[AttentionGroup, ...]
    ffn: tuple[FfnGroup, ...] = field(default=())
    between_tokens_s: float = 0.0
    ffn_serves: Literal["together", "in-turn"] = "together"

    @property
    def split(self) -> bool:
        """Whether any layer's FFN runs elsewhere than its attention."""
        return any(run.ffn == REMOTE for run in self.layers)

    @property
    def layer_count(self) -> int:
        """Layers of the model."""
        return sum(run.count for run in self.layers)

    @property
    def card_count(self) -> int:
        """Cards of all instances and sets, spares not counted."""
        attention = sum(group.instances * group.cards for group in self.attention)
        return attention + sum(group.instances * group.cards for group in self.ffn)

    @property
    def attention_instances(self) -> int:
        """Attention instances of all groups, spares not counted."""
        return sum(group.instances for group in self.attention)

    @property
    def ffn_sets(self) -> int:
        """FFN sets of all groups, spares not counted."""
        return sum(group.instances for group in self.ffn)

    def to_json(self) -> dict[str, Any]:
        """Return plain values that `from_json` reads back, for ``predicted.pipeline``."""
        values = asdict(self)
        for key in ("layers", "attention", "ffn"):
            values[key] = [dict(entry) for entry in values[key]]
        for group in (*values["attention"], *values["ffn"]):
            group["seconds"] = dict(group["seconds"])
        return values

    @classmethod
    def from_json(cls, values: object, where: Where = str) -> PredictedPipeline:
        """Read plain values, strictly; ``where`` turns a dotted key into the place it stands at.

        Raises:
            ConfigError: a key is missing, unknown, of another type or out of its range, a kind of
                layer has no seconds, or ``feeds`` names no entry of ``ffn``.
        """
        keys = Keys.of(values, "predicted.pipeline", where)
        pipeline = cls(
            micro_batches=keys.count("micro_batches", most=MOST_MICRO_BATCHES),
            context=keys.count("context"),
            between_tokens_s=keys.seconds("between_tokens_s", 0.0),
            ffn_serves=keys.one_of("ffn_serves", (TOGETHER, IN_TURN), TOGETHER),  # type: ignore[arg-type]
            layers=tuple(map(_layer_run, keys.entries("layers"))),
            attention=tuple(map(_attention_group, keys.entries("attention"))),
            ffn=tuple(map(_ffn_group, keys.entries("ffn", may_be_empty=True))),
        )
        keys.done()
        _check(pipeline, keys)
        return pipeline


MOST_MICRO_BATCHES = 64
MOST_LAYERS = 10_000


def _layer_run(keys: Keys) -> LayerRun:
    return keys.made(
        LayerRun(
            count=keys.count("count", most=MOST_LAYERS),
            kind=keys.text("kind"),
            ffn=keys.one_of("ffn", (LOCAL, REMOTE)),
        )
    )


def _attention_group(keys: Keys) -> AttentionGroup:
    return keys.made(
        AttentionGroup(
            name=keys.text("name"),
            card=keys.text("card"),
            instances=keys.count("instances"),
            cards=keys.count("cards"),
            batch=keys.count("batch"),
            seconds=keys.seconds_by_kind("seconds"),
            seconds_per_context_token=keys.seconds("seconds_per_context_token", 0.0),
            feeds=keys.text("feeds", ""),
            a2f_s=keys.seconds("a2f_s", 0.0),
            f2a_s=keys.seconds("f2a_s", 0.0),
            latency_s=keys.seconds("latency_s", 0.0),
            spares=keys.count("spares", 0, least=0),
        )
    )


def _ffn_group(keys: Keys) -> FfnGroup:
    return keys.made(
        FfnGroup(
            name=keys.text("name"),
            card=keys.text("card"),
            instances=keys.count("instances"),
            cards=keys.count("cards"),
            seconds=keys.seconds_by_kind("seconds"),
            spares=keys.count("spares", 0, least=0),
        )
    )


def _check(pipeline: PredictedPipeline, keys: Keys) -> None:
    """Refuse what is wrong between keys."""
    _check_names(pipeline, keys)
    _check_kinds(pipeline, keys)
    if pipeline.split and not pipeline.ffn:
        raise keys.error("ffn", "is empty, but `layers` has FFNs that are remote; name their sets")
    if pipeline.ffn and not pipeline.split:
        raise keys.error("ffn", "names sets, but no layer's FFN is remote; leave `ffn` out")
    for group in pipeline.ffn:
        _check_fed(pipeline, group, keys)


def _check_names(pipeline: PredictedPipeline, keys: Keys) -> None:
    sets = [group.name for group in pipeline.ffn]
    for key, groups in (("attention", pipeline.attention), ("ffn", pipeline.ffn)):
        names = [group.name for group in groups]
        for number, name in enumerate(names):
            if name in names[:number]:
                raise keys.error(f"{key}.{number}.name", f"{name!r} stands twice; names are unique")
    for number, attention in enumerate(pipeline.attention):
        key = f"attention.{number}.feeds"
        if attention.feeds and attention.feeds not in sets:
            known = ", ".join(sets) or "none"
            raise keys.error(key, f"{attention.feeds!r} is no entry of ffn; entries: {known}")
        if not attention.feeds and len(sets) > 1:
            raise keys.error(key, f"is needed where ffn has several entries: {', '.join(sets)}")


def _check_kinds(pipeline: PredictedPipeline, keys: Keys) -> None:
    """Every kind of layer needs its seconds where it runs."""
    kinds = {run.kind: run.ffn for run in pipeline.layers}
    for number, run in enumerate(pipeline.layers):
        if kinds[run.kind] != run.ffn:
            message = f"kind {run.kind!r} is both local and remote; give them two names"
            raise keys.error(f"layers.{number}.kind", message)
    remote = {kind for kind, ffn in kinds.items() if ffn == REMOTE}
    for key, seconds, needed in (
        ("attention", [group.seconds for group in pipeline.attention], set(kinds)),
        ("ffn", [group.seconds for group in pipeline.ffn], remote),
    ):
        for number, given in enumerate(seconds):
            missing = sorted(needed - set(given))
            if missing:
                message = f"missing for layers of kind {', '.join(missing)}"
                raise keys.error(f"{key}.{number}.seconds", message)


def unfed(pipeline: PredictedPipeline, group: FfnGroup) -> str:
    """Say how few micro-batches there are for sets that outnumber them; empty if they do not."""
    feeding = sum(a.instances for a in pipeline.attention if a.feeds in ("", group.name))
    flows = feeding * pipeline.micro_batches
    if flows >= group.instances:
        return ""
    return (
        f"{group.instances} sets of {group.name!r}, but only {flows} micro-batches feed them "
        f"({feeding} attention instances x {pipeline.micro_batches})"
    )


def _check_fed(pipeline: PredictedPipeline, group: FfnGroup, keys: Keys) -> None:
    if said := unfed(pipeline, group):
        key = f"ffn.{pipeline.ffn.index(group)}.instances"
        raise keys.error(key, f"{said}; name no more sets than micro-batches")
