"""YAML as plain values, with the line of every key, so that any later error can name it.

The dialect is the core schema of YAML 1.2: `no`, `on` and dates are text, `1e9` is a number, keys
are always text. Anchors, aliases and tags are refused: the config needs none, and they are how a
small file becomes a large one.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from step3_hetero.errors import ConfigError

LIMIT_BYTES = 1 << 20
LIMIT_DEPTH = 32

KeyPath = tuple[str, ...]
"""Keys from the top of the file; an item of a list goes by its number, as text."""

_WORDS = {
    **dict.fromkeys(["", "~", "null", "Null", "NULL"], None),
    **dict.fromkeys(["true", "True", "TRUE"], True),
    **dict.fromkeys(["false", "False", "FALSE"], False),
}
_INT = re.compile(r"[-+]?[0-9]{1,18}")
_FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?")


def shown(value: object) -> str:
    """Return a value as the file would have it, cut at 60 characters.

    >>> shown(True), shown(None), shown("fp31"), shown([1, 2])
    ('true', 'null', "'fp31'", 'a list')
    """
    if isinstance(value, str):
        text = repr(value)
    elif value is None or isinstance(value, bool | int | float):
        text = json.dumps(value)
    elif isinstance(value, list | tuple):
        text = "a list"
    else:
        text = "keys and values" if isinstance(value, dict) else type(value).__name__
    return text if len(text) <= 60 else text[:57] + "..."


@dataclass(frozen=True, order=True, slots=True)
class Place:
    """Where a value was written: a line of the file, or (line 0) an override."""

    line: int
    text: str


@dataclass(frozen=True, slots=True)
class Problem:
    """One thing wrong with the file. What is missing has no line, so it is told last."""

    place: Place
    message: str
    missing: bool = False


def refuse(problems: Sequence[Problem]) -> None:
    """Raise the first problem by line and say how many more there are; return if there is none.

    Raises:
        ConfigError: there is a problem.
    """
    if not problems:
        return
    first = min(problems, key=lambda problem: (problem.missing, problem.place.line))
    more = f" (+{len(problems) - 1} more)" if len(problems) > 1 else ""
    raise ConfigError(f"{first.place.text}: {first.message}{more}")


@dataclass(slots=True)
class Document:
    """A YAML mapping: its values, the place of each key, and what was wrong with its form."""

    name: str
    values: dict[str, Any]
    places: dict[KeyPath, Place] = field(default_factory=dict)
    problems: list[Problem] = field(default_factory=list)

    @classmethod
    def read(cls, path: Path) -> Document:
        """Read the file at ``path``; messages name it as it was given.

        Raises:
            ConfigError: it cannot be read, is too large, or is not YAML with keys at the top.
        """
        try:
            with path.open("rb") as file:
                data = file.read(LIMIT_BYTES + 1)
        except (OSError, ValueError) as cause:
            reason = getattr(cause, "strerror", None) or cause
            raise ConfigError(f"{path}: cannot be read: {reason}") from cause
        if len(data) > LIMIT_BYTES:
            raise ConfigError(f"{path}: larger than {LIMIT_BYTES} bytes, the limit for a config")
        try:
            text = data.decode("utf-8-sig")
        except UnicodeDecodeError as cause:
            line = data.count(b"\n", 0, cause.start) + 1
            byte = f"0x{data[cause.start]:02x}"
            raise ConfigError(f"{path}:{line}: not UTF-8 text: byte {byte}") from cause
        root = _compose(text, str(path))
        if not isinstance(root, yaml.MappingNode):
            line = root.start_mark.line + 1 if root else 1
            found = "a list" if isinstance(root, yaml.SequenceNode) else "no keys"
            raise ConfigError(f"{path}:{line}: expected keys and values at the top, got {found}")
        document = cls(str(path), {}, {(): Place(1, f"{path}:1")})
        document.values = document._mapping(root, ())
        return document

    @classmethod
    def of(cls, mapping: Mapping[str, Any], name: str) -> Document:
        """Wrap values that did not come from a file; they have no lines."""
        return cls(name, dict(mapping), {(): Place(1, name)})

    def place(self, path: Sequence[str]) -> Place:
        """Return where the key was written, or else the nearest key above it."""
        keys = tuple(path)
        while keys not in self.places:
            keys = keys[:-1]
        return self.places[keys]

    def override(self, assignment: str) -> None:
        """Set one key, as in ``roles.f.backend=cpu``; the value is YAML.

        Raises:
            ConfigError: it is not an assignment, the value is not YAML, or a key above is no key.
        """
        name = f"--set {assignment}"
        dotted, equals, text = assignment.partition("=")
        path = tuple(dotted.strip().split("."))
        if not equals or not all(path):
            raise ConfigError(f"{name}: expected key=value, as in roles.f.backend=cpu")
        root = _compose(text, name, lines=False)
        here = Document(name, {})
        value = here._value(root, path) if root else None
        refuse([Problem(Place(0, name), problem.message) for problem in here.problems])
        target = self._parent(path, name)
        target[path[-1]] = value
        self.places = {k: v for k, v in self.places.items() if k[: len(path)] != path}
        self.places[path] = Place(0, name)

    def _parent(self, path: KeyPath, name: str) -> dict[str, Any]:
        """Return the mapping that holds the last key of ``path``, made where it is left out."""
        if path[0] == "roles" and len(path) > 1:
            roles = self.values.get("roles")
            names = roles if isinstance(roles, dict) else {}
            if path[1] not in names:
                known = ", ".join(role for role in names if role.isprintable()) or "none"
                raise ConfigError(f"{name}: unknown role {shown(path[1])}; roles: {known}")
        target = self.values
        for depth, key in enumerate(path[:-1], start=1):
            below = target.get(key)
            if below is None:
                below = target[key] = {}
                self.places.setdefault(path[:depth], Place(0, name))
            if not isinstance(below, dict):
                above = ".".join(path[:depth])
                raise ConfigError(
                    f"{name}: unknown key {shown(path[depth])}: {above} holds a value, not keys"
                )
            target = below
        return target

    def _mapping(self, node: yaml.MappingNode, path: KeyPath) -> dict[str, Any]:
        values: dict[str, Any] = {}
        for key_node, value_node in node.value:
            line = key_node.start_mark.line + 1
            place = Place(line, f"{self.name}:{line}")
            if not isinstance(key_node, yaml.ScalarNode):
                self.problems.append(Problem(place, "a key is one word, not a list or mapping"))
                continue
            key = key_node.value
            if key in values:
                first = self.places[(*path, key)].line
                message = f"key {shown(key)} stands twice, first on line {first}"
                self.problems.append(Problem(place, message))
                continue
            self.places[(*path, key)] = place
            values[key] = self._value(value_node, (*path, key))
        return values

    def _value(self, node: yaml.Node, path: KeyPath) -> Any:
        if isinstance(node, yaml.MappingNode):
            return self._mapping(node, path)
        if isinstance(node, yaml.SequenceNode):
            values = []
            for number, item in enumerate(node.value):
                line = item.start_mark.line + 1
                self.places[(*path, str(number))] = Place(line, f"{self.name}:{line}")
                values.append(self._value(item, (*path, str(number))))
            return values
        quoted = isinstance(node, yaml.ScalarNode) and node.style
        return node.value if quoted else _plain(node.value)


def _plain(text: str) -> Any:
    """Return what an unquoted scalar means.

    >>> [_plain(text) for text in ("1e9", "010", "no", "true", "~", "1.5.2")]
    [1000000000.0, 10, 'no', True, None, '1.5.2']
    """
    if text in _WORDS:
        return _WORDS[text]
    if _INT.fullmatch(text):
        return int(text)
    return float(text) if _FLOAT.fullmatch(text) else text


def _is_text(value: str) -> bool:
    r"""Return False for what an escape like "\ud800" leaves: no output could ever print it."""
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True


class _Refusal(Exception):
    """YAML, but of a kind that a config does not need; args are the line and the sentence."""


class _Loader(yaml.BaseLoader):
    """Nodes without meaning: every scalar is text, and what a config does not need is refused."""

    depth = 0

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        event = self.peek_event()  # type: ignore[no-untyped-call]  # the stubs leave it out
        line = event.start_mark.line + 1
        if isinstance(event, yaml.AliasEvent) or event.anchor is not None:
            raise _Refusal(line, "anchors and aliases (& and *) are not allowed")
        if event.tag is not None:
            raise _Refusal(line, "tags (!) are not allowed")
        if isinstance(event, yaml.ScalarEvent) and not _is_text(event.value):
            raise _Refusal(line, "half of a surrogate pair is no character")
        if self.depth == LIMIT_DEPTH:
            raise _Refusal(line, f"nested deeper than {LIMIT_DEPTH} levels")
        self.depth += 1
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node


def _compose(text: str, name: str, *, lines: bool = True) -> yaml.Node | None:
    """Return the node at the top of ``text``, None if it is empty; messages start with ``name``."""

    def error(line: int, message: str) -> ConfigError:
        return ConfigError(f"{name}:{line}: {message}" if lines else f"{name}: {message}")

    try:
        loader = _Loader(text)
    except yaml.reader.ReaderError as cause:
        line = text.count("\n", 0, cause.position) + 1
        raise error(line, f"character {chr(cause.character)!a} is not allowed in YAML") from cause
    try:
        node: yaml.Node | None = loader.get_single_node()
    except _Refusal as cause:
        raise error(*cause.args) from None
    except yaml.MarkedYAMLError as cause:
        mark = cause.problem_mark or cause.context_mark
        line = mark.line + 1 if mark else 1
        raise error(line, f"not YAML: {_explain(cause)}") from cause
    except (ValueError, OverflowError) as cause:  # PyYAML on an escape like "\UFFFFFFFF"
        raise error(loader.get_mark().line + 1, f"not YAML: {cause}") from cause
    finally:
        loader.dispose()
    return node


def _explain(cause: yaml.MarkedYAMLError) -> str:
    problem = " ".join((cause.problem or cause.context or "?").split())
    if "flow sequence" in (cause.context or "") and "got '['" in problem:
        problem += '; quote a stage with layers: "ffn[0,3]"'
    return problem
