"""The keys of the config file, version 1, and what each may hold.

A key whose meaning comes with later work exists already: its default is accepted, anything else is
refused as not available yet. Opening such a key is taking `_later` off its field.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from importlib.metadata import entry_points
from pathlib import Path
from typing import Annotated, Any, Literal, LiteralString, Self

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PrivateAttr,
    ValidationError,
)
from pydantic_core import PydanticCustomError

from step3_hetero.config.degrees import degree_problems
from step3_hetero.config.document import Document, Problem, refuse, shown
from step3_hetero.config.explain import ABOUT_KEY, WHOLE, problems_of
from step3_hetero.config.selectors import Selector, assign_stages, parse_selector
from step3_hetero.config.standing import standing_problems
from step3_hetero.errors import ConfigError

VERSION = 1
TRANSPORT_GROUP = "step3_hetero.transports"


def _sentence(text: str, kind: LiteralString = ABOUT_KEY) -> PydanticCustomError:
    # The text goes in by the context: as a template, its braces would be read as fields.
    return PydanticCustomError(kind, "{text}", {"text": text})


def _later(*ready: object) -> AfterValidator:
    """Accept what works today; say of every other legal value that it comes later."""

    def check(value: object) -> object:
        if value in ready:
            return value
        today = "leave it out" if ready == (None,) else f"use {' or '.join(map(shown, ready))}"
        raise _sentence(f"{shown(value)} is not available yet; {today}")

    return AfterValidator(check)


def _version(value: int) -> int:
    if value != VERSION:
        raise _sentence(f"expected {VERSION}, got {shown(value)}")
    return value


def _name(value: str) -> str:
    """Refuse what would make a message or a path unreadable."""
    if not value.strip() or not value.isprintable():
        raise _sentence(f"expected a name, got {shown(value)}")
    return value


def _role_name(value: str) -> str:
    if not re.fullmatch("[A-Za-z0-9_-]+", value):
        raise _sentence(f"role {shown(value)}: use letters, digits, - and _", WHOLE)
    return value


def _stage(value: str) -> str:
    try:
        parse_selector(value)
    except ConfigError as cause:
        raise _sentence(str(cause), WHOLE) from cause
    return value


def _some(values: tuple[Any, ...] | None) -> tuple[Any, ...] | None:
    if values == ():
        raise _sentence("is empty")
    return values


def _transport(value: str) -> str:
    known = sorted({ep.name for ep in entry_points(group=TRANSPORT_GROUP)})
    if value not in known:
        raise _sentence(f"{shown(value)} is unknown; known: {', '.join(known)}")
    return value


def _auto_or_count(value: object) -> object:
    if value == "auto" or (type(value) is int and value >= 1):
        return value
    raise _sentence(f"expected auto or a whole number from 1, got {shown(value)}")


def _emulate(value: object) -> object:
    """Take a card's name for the mapping that holds nothing else."""
    if isinstance(value, str):
        return {"card": value}
    if value is None or isinstance(value, dict):
        return value
    raise _sentence(f"expected a card's name, as h20, or keys and values, got {shown(value)}")


Name = Annotated[str, AfterValidator(_name)]
RoleName = Annotated[str, AfterValidator(_role_name)]
Count = Annotated[int, Field(ge=1)]
Rate = Annotated[float, Field(gt=0)]
WireDtype = Literal["auto", "fp32", "bf16", "fp8", "int8"]


class _Section(BaseModel):
    """Frozen, no unknown keys, no conversions: `true` is no number and `"8"` is text."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


class Emulate(_Section):
    """A card that the host plays (docs/emulation.md); ``h20`` is short for ``{card: h20}``."""

    card: Name
    memory: Annotated[float, Field(gt=0, le=1)] = 1.0
    """The part of the card's memory that there is."""
    slow: Annotated[float, Field(ge=1)] = 1.0
    """A stage takes so many times the seconds that it takes here."""
    latency_s: Annotated[float, Field(ge=0)] = 0.0
    """Seconds that an edge to another device takes beyond its bytes, each way."""
    bytes_per_s: Rate | None = None
    """What an edge carries each way; None: as fast as it goes."""
    copy_bytes_per_s: Rate | None = None
    """What copies between card and host carry each way; None: as fast as the host's own."""
    corrupt_every: Count | None = None
    """Of the frames with tensors that come over an edge, each so-manyth arrives damaged."""
    cut_every: Count | None = None
    """An edge's connection is cut each time so many of them have come."""


FAULTS = ("corrupt_every", "cut_every")
"""Keys of `Emulate` that harm the edges between processes."""


class Role(_Section):
    """A named group of stages on one backend."""

    stages: Annotated[
        tuple[Annotated[str, AfterValidator(_stage)], ...],
        Field(strict=False),
        AfterValidator(_some),
    ]
    """Selectors: `embed`, `ffn`, `ffn[0-3,60]`."""
    backend: Name
    """An entry point of the group `step3_hetero.backends`."""
    card: Name | None = None
    """A name of the device catalogue, for planning without the device."""
    devices: Annotated[
        tuple[Annotated[int, Field(ge=0)], ...] | None, Field(strict=False), AfterValidator(_some)
    ] = None
    """Device numbers of the backend; None takes them from 0 on."""
    instances: Count = 1
    tp: Count = 1
    """Cards that share each of an instance's stages."""
    ep: Count = 1
    """Instances that share the experts: one set."""
    spares: Annotated[int, Field(ge=0)] = 0
    """Instances that stand by loaded; one takes the place of an instance that dies."""
    hosts: Annotated[tuple[Name, ...] | None, Field(strict=False), AfterValidator(_some)] = None
    """Where the role's instances stand, then its spares, if somebody else starts them."""
    weights: Literal["auto", "fp32", "bf16", "fp8", "int8"] = "auto"
    """The format in device memory of the matrices in attention and FFN; auto keeps `runtime.dtype`.

    int8: codes with a float32 scale for each output row, made at load from what is stored.
    """
    emulate: Annotated[Emulate | None, BeforeValidator(_emulate)] = None
    options: dict[str, Any] = Field(default_factory=dict)
    """Passed on to the backend, which checks them."""

    @property
    def processes(self) -> int:
        """How many processes do its work, spares left out: an instance is ``tp`` ranks."""
        return self.instances * self.tp

    @property
    def selectors(self) -> tuple[Selector, ...]:
        """Return ``stages``, parsed."""
        return tuple(map(parse_selector, self.stages))


class Runtime(_Section):
    """How the engine runs, for all roles."""

    processes: Literal["one", "per-role"] = "one"
    """One process for all roles, or one for each instance of each role."""
    dtype: Literal["model", "fp32", "bf16", "fp64"] = "model"
    """Of activations; model is what the checkpoint says. The reference alone computes in fp64."""
    batch_invariant: bool = False
    """A sequence's tokens do not depend on what else is in the batch, bit for bit."""
    router_logits: Literal["fp32", "model"] = "fp32"
    microbatches: Annotated[int, Field(ge=1, le=64)] = 1
    """Micro-batches under way at a time on each attention instance."""
    max_batch: Count = 64
    """Sequences in one step."""
    kv_dtype: Literal["auto", "bf16", "fp8", "int8"] = "auto"
    """Of the KV cache; auto is ``dtype``. fp8 and int8 have a scale for each token and KV head."""
    kv_blocks: Annotated[int | Literal["auto"], BeforeValidator(_auto_or_count)] = "auto"
    """Logical blocks of 128 tokens; auto fills the memory that the weights leave."""
    prefill_chunk: Count = 512
    """Tokens of a prompt in one step."""
    prefix_reuse: bool = True
    """Sequences that begin alike share the KV blocks of their beginning."""
    max_waiting: Count = 4096
    """Requests in the queue beyond which another one is refused."""
    fallback: Annotated[bool, _later(False)] = False
    shadow_backend: Name | None = None
    shadow_sample: Annotated[float, Field(ge=0, le=1)] = 0.0


class Transport(_Section):
    """What carries an edge between two roles; checked, but unused while roles share a process."""

    kind: Annotated[str, AfterValidator(_transport)] = "shm"
    deadline_s: Annotated[float, Field(gt=0)] = 2.0
    """Counted from the peer's last sign of life."""
    a2f_dtype: WireDtype = "auto"
    f2a_dtype: WireDtype = "auto"
    key_file: Name | None = None
    """A file, relative to this one, whose content peers have to know; needed beyond loopback."""
    tls_cert: Name | None = None
    """This side's certificate chain, PEM, relative to this file; tcp alone, with ``tls_key``."""
    tls_key: Name | None = None
    tls_ca: Name | None = None
    """Who has signed the peers' certificates; without it the key tells who a peer is."""


ROLE_READY: Mapping[str, tuple[object, ...]] = {
    "weights": ("auto", "fp32", "bf16", "int8"),
}
"""What this build runs, of keys whose other values only a plan may hold."""

EMULATED_READY = {key: values for key, values in ROLE_READY.items() if key != "weights"}
"""The same of a role that emulates a card: placing says which formats of weights the card has."""

RUNTIME_READY: Mapping[str, tuple[object, ...]] = {
    "microbatches": (1, 2, 3, 4),
}


class Config(_Section):
    """The whole file, one field per key. It remembers where each key was written."""

    version: Annotated[int, AfterValidator(_version)]
    model: Name
    """A folder, relative to the file, or the name of a family."""
    roles: Annotated[dict[RoleName, Role], Field(min_length=1)]
    runtime: Runtime = Runtime()
    transport: Transport = Transport()
    predicted: dict[str, Any] | None = None
    """What the planner expects of this placement."""

    _base: Path = PrivateAttr()
    _document: Document = PrivateAttr()

    @classmethod
    def read(
        cls, path: str | Path, overrides: Sequence[str] = (), *, planned: bool = False
    ) -> Self:
        """Read a file, then apply overrides such as ``roles.f.backend=cpu``.

        ``planned``: a file with ``predicted`` may hold what this build cannot run yet.

        Raises:
            ConfigError: it cannot be read or breaks a rule; one line, ``run.yaml:9: ...``.
        """
        document = Document.read(Path(path))
        for override in overrides:
            document.override(override)
        config = cls._of(document, Path(path).parent)
        if not planned or config.predicted is None:
            refuse(list(config.unready()))
        return config

    @classmethod
    def from_dict(
        cls, mapping: Mapping[str, Any], base: str | Path, *, name: str = "config"
    ) -> Self:
        """Check values that come from elsewhere; ``model`` is relative to the folder ``base``.

        Raises:
            ConfigError: a rule is broken; the message starts with ``name`` in the place of a line.
        """
        config = cls._of(Document.of(mapping, name), Path(base))
        refuse(list(config.unready()))
        return config

    @classmethod
    def _of(cls, document: Document, base: Path) -> Self:
        problems = list(document.problems)
        try:
            config = cls.model_validate(document.values)
        except ValidationError as failed:
            refuse([*problems, *problems_of(failed, cls, document)])
            raise  # unreachable: a failed validation has at least one problem
        config._base, config._document = base, document
        refuse([*problems, *config._conflicts()])
        return config

    def unready(self) -> Iterator[Problem]:
        """Yield each key whose value this build cannot run, or not yet, with what it can."""
        sections: list[tuple[str, BaseModel, Mapping[str, tuple[object, ...]]]] = [
            (f"roles.{name}", role, EMULATED_READY if role.emulate else ROLE_READY)
            for name, role in self.roles.items()
        ]
        for prefix, section, ready in [*sections, ("runtime", self.runtime, RUNTIME_READY)]:
            for key, values in ready.items():
                value = getattr(section, key)
                if value not in values:
                    place = self._document.place([*prefix.split("."), key])
                    use = " or ".join(map(shown, values))
                    said = f"{prefix}.{key}: {shown(value)} is not available yet; use {use}"
                    yield Problem(place, said)
        for name in self.roles:
            yield from degree_problems(self, name, self._document)

    def _conflicts(self) -> Iterator[Problem]:
        """Yield what is wrong between keys, or between a key and the disk."""
        if "/" in self.model and self.model_path is None:
            message = f"model: no folder {str(self._base / self.model)!r}"
            message += "; a path is relative to the config's folder"
            yield Problem(self._document.place(["model"]), message)
        if self.runtime.processes == "one" and self.runtime.microbatches > 1:
            place = self._document.place(("runtime", "microbatches"))
            message = f"runtime.microbatches: {self.runtime.microbatches} refused; allowed: 1 with"
            yield Problem(place, f"{message} runtime.processes: one; set that to per-role")
        for name, role in self.roles.items():
            for fault in FAULTS if self.runtime.processes == "one" and role.emulate else ():
                if (every := getattr(role.emulate, fault)) is not None:
                    place = self._document.place(("roles", name, "emulate", fault))
                    message = f"roles.{name}.emulate.{fault}: {every} refused: there are no frames"
                    yield Problem(place, f"{message} with runtime.processes: one; use per-role")
            several = [key for key in ("instances", "tp") if getattr(role, key) > 1]
            for many in several if self.runtime.processes == "one" else ():
                place = self._document.place(("roles", name, many))
                message = f"roles.{name}.{many}: {getattr(role, many)} refused; allowed: 1 with"
                yield Problem(place, f"{message} runtime.processes: one; set that to per-role")
            yield from standing_problems(self, name, self._document)
            ranks = role.processes + role.spares
            if role.devices is not None and len(role.devices) != ranks:
                key = ("roles", name, "devices")
                message = f"{'.'.join(key)}: expected {ranks}, got {len(role.devices)}"
                yield Problem(self._document.place(key), f"{message} (instances x tp + spares)")

    @property
    def model_path(self) -> Path | None:
        """The model's folder; None if ``model`` is the name of a family."""
        folder = self._base / self.model
        try:
            return folder if folder.is_dir() else None
        except OSError:  # a name too long for the file system, or not ours to look at
            return None

    @property
    def folder(self) -> Path:
        """The folder that relative paths start from."""
        return self._base

    def values(self) -> dict[str, Any]:
        """Return what was written, overrides applied, as plain data for ``from_dict``."""
        return dict(self._document.values)

    def where(self, key: str) -> str:
        """Return where a key such as ``roles.f.stages.0`` was written, as ``run.yaml:9``.

        A key that was left out goes by the nearest key above it; an overridden key by its
        ``--set``.
        """
        return self._document.place(key.split(".")).text

    def error(self, key: str, message: str) -> ConfigError:
        """Return an error about one key, for whoever finds out later that its value will not do."""
        return ConfigError(f"{self.where(key)}: {key}: {message}")

    def assign(self, stage_names: Sequence[str]) -> dict[str, str]:
        """Return the role that runs each stage of the model.

        Raises:
            ConfigError: see `assign_stages`.
        """
        roles = {name: role.stages for name, role in self.roles.items()}
        return assign_stages(roles, stage_names, self.where)
