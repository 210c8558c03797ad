"""Which stages a role runs: `embed`, `ffn`, `"ffn[0-3,60]"`.

`ffn` without layers means every FFN that no other role names by its layer.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from step3_hetero.config.document import shown
from step3_hetero.errors import ConfigError

STAGES = ("embed", "vision", "attention", "ffn", "head")
LAYERED = ("attention", "ffn")

_SELECTOR = re.compile(r"([^\[\]]*?)\s*(?:\[(.*)\])?")
_SPAN = re.compile(r"\s*([0-9]{1,3})\s*(?:-\s*([0-9]{1,3})\s*)?")
_STAGE = re.compile(r"([a-z]+)(?:\[([0-9]+)\])?")


@dataclass(frozen=True, slots=True)
class Selector:
    """The stages of one kind: those of ``layers``, or, without layers, all not named elsewhere."""

    kind: str
    layers: tuple[int, ...] | None = None


def parse_selector(text: str) -> Selector:
    """Read one entry of a role's ``stages``.

    >>> parse_selector("ffn[0-2,60]")
    Selector(kind='ffn', layers=(0, 1, 2, 60))

    Raises:
        ConfigError: it names no stage, or its layers are not a set of numbers.
    """
    found = _SELECTOR.fullmatch(text.strip())
    kind = found[1] if found else text
    if found is None or kind not in STAGES:
        raise ConfigError(f"unknown stage {shown(kind)}; stages: {', '.join(STAGES)}")
    if found[2] is None:
        return Selector(kind)
    if kind not in LAYERED:
        raise ConfigError(f"stage {shown(text)}: only {' and '.join(LAYERED)} have layers")
    layers: dict[int, None] = {}
    for span in found[2].split(","):
        for layer in _span(span, text):
            if layer in layers:
                raise ConfigError(f"stage {shown(text)}: layer {layer} stands twice")
            layers[layer] = None
    return Selector(kind, tuple(layers))


def _span(span: str, text: str) -> range:
    found = _SPAN.fullmatch(span)
    if found is None:
        raise ConfigError(f"stage {shown(text)}: {shown(span)} is no layer; write [0-3,60]")
    first = int(found[1])
    last = int(found[2] or first)
    if last < first:
        raise ConfigError(f"stage {shown(text)}: layers run upwards, {last}-{first}")
    return range(first, last + 1)


def assign_stages(
    roles: Mapping[str, Sequence[str]],
    stage_names: Sequence[str],
    where: Callable[[str], str] = lambda path: path,
) -> dict[str, str]:
    """Return the role that runs each stage, in the order of ``stage_names``.

    A role that names a layer wins over a role that says ``ffn`` or ``attention`` alone. ``vision``
    on a model without it is accepted and means nothing.

    Args:
        roles: each role's selectors, as in the config file.
        stage_names: all stages of one model: ``embed``, ``attention[0]``, ``ffn[0]``, ``head``.
        where: turns a key such as ``roles.f.stages.0`` into the ``run.yaml:9`` of messages.

    Raises:
        ConfigError: a layer that the model lacks, a stage in two roles or in none, an idle role.
    """
    parsed = {role: [parse_selector(text) for text in texts] for role, texts in roles.items()}
    _check_layers(parsed, stage_names, where)
    claims = _Claims(parsed)
    result: dict[str, str] = {}
    disputed: dict[tuple[str, str], list[str]] = {}
    orphans: list[str] = []
    for stage in stage_names:
        match claims.of(stage):
            case []:
                orphans.append(stage)
            case [role]:
                result[stage] = role
            case [one, other, *_]:
                disputed.setdefault((one, other), []).append(stage)
    for (one, other), stages in disputed.items():
        key = claims.key(other, stages[0])
        raise ConfigError(
            f"{where(key)}: {stage_ranges(stages)} in two roles: {one!r} and {other!r}; "
            f"{claims.advice(stages[0])}"
        )
    if orphans:
        raise ConfigError(f"{where('roles')}: no role runs {stage_ranges(orphans)}")
    _check_idle(parsed, result, where)
    return result


class _Claims:
    """Who wants a stage, and by which entry of its list."""

    def __init__(self, roles: Mapping[str, Sequence[Selector]]) -> None:
        self._entries: dict[tuple[str, int | None], dict[str, int]] = {}
        for role, selectors in roles.items():
            for number, selector in enumerate(selectors):
                for layer in selector.layers or (None,):
                    entry = self._entries.setdefault((selector.kind, layer), {})
                    entry.setdefault(role, number)

    def of(self, stage: str) -> list[str]:
        """Return the roles that claim ``stage``: by its layer if any does, else by its kind."""
        return list(self._claiming(stage))

    def key(self, role: str, stage: str) -> str:
        """Return the config key by which ``role`` claims ``stage``."""
        return f"roles.{role}.stages.{self._claiming(stage)[role]}"

    def advice(self, stage: str) -> str:
        """Return what to do about two claims to ``stage``."""
        kind, layer = _split(stage)
        if layer is None:
            return "each stage belongs to one"
        if (kind, layer) in self._entries:
            return "each layer belongs to one"
        return "keep one, or name layers in one of them"

    def _claiming(self, stage: str) -> dict[str, int]:
        kind, layer = _split(stage)
        by_layer = self._entries.get((kind, layer), {}) if layer is not None else {}
        return by_layer or self._entries.get((kind, None), {})


def _check_layers(
    roles: Mapping[str, Sequence[Selector]],
    stage_names: Sequence[str],
    where: Callable[[str], str],
) -> None:
    names = set(stage_names)
    for role, selectors in roles.items():
        for number, selector in enumerate(selectors):
            known = [name for name in stage_names if _split(name)[0] == selector.kind]
            for layer in selector.layers or ():
                if f"{selector.kind}[{layer}]" not in names:
                    raise ConfigError(
                        f"{where(f'roles.{role}.stages.{number}')}: no {selector.kind}[{layer}]; "
                        f"the model has {len(known)} layers: 0-{len(known) - 1}"
                    )


def _check_idle(
    roles: Mapping[str, Sequence[Selector]],
    assigned: Mapping[str, str],
    where: Callable[[str], str],
) -> None:
    busy = set(assigned.values())
    for role, selectors in roles.items():
        only_vision = {selector.kind for selector in selectors} == {"vision"}
        if role not in busy and not (only_vision and "vision" not in assigned):
            raise ConfigError(
                f"{where(f'roles.{role}.stages')}: role {role!r} runs nothing: "
                "other roles name its layers"
            )


def _split(stage: str) -> tuple[str, int | None]:
    found = _STAGE.fullmatch(stage)
    if found is None:
        raise ValueError(f"{stage!r} is no stage name")
    return found[1], None if found[2] is None else int(found[2])


def stage_ranges(stages: Iterable[str]) -> str:
    """Return stage names in the form of selectors.

    >>> stage_ranges(["embed", "ffn[0]", "ffn[1]", "ffn[2]", "ffn[7]"])
    'embed, ffn[0-2,7]'
    """
    kinds: dict[str, list[tuple[int, int]]] = {}
    for kind, layer in map(_split, stages):
        spans = kinds.setdefault(kind, [])
        if layer is None:
            continue
        if spans and spans[-1][1] == layer - 1:
            spans[-1] = (spans[-1][0], layer)
        else:
            spans.append((layer, layer))
    return ", ".join(f"{kind}{_layer_set(spans)}" for kind, spans in kinds.items())


def _layer_set(spans: Sequence[tuple[int, int]]) -> str:
    text = ",".join(f"{a}" if a == b else f"{a}-{b}" for a, b in spans)
    return f"[{text}]" if text else ""
