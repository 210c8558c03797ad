"""What the schema found wrong, as one sentence each, with the place it was written."""

from __future__ import annotations

import re
from collections.abc import Iterator
from types import NoneType, UnionType
from typing import Any, Final, get_args

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from step3_hetero.config.document import Document, Problem, shown

_EXPECTED = {
    "bool_type": "true or false",
    "dict_type": "keys and values",
    "finite_number": "a finite number",
    "float_type": "a number",
    "int_type": "a whole number",
    "list_type": "a list",
    "model_type": "keys and values",
    "string_type": "text",
    "tuple_type": "a list",
}
ABOUT_KEY: Final = "about_key"
"""Error type of the schema's own sentences that go after the name of the key."""
WHOLE: Final = "whole"
"""Error type of the schema's own sentences that say themselves what they are about."""


def problems_of(
    failed: ValidationError, schema: type[BaseModel], document: Document
) -> list[Problem]:
    """Return one problem for each error that pydantic reports."""
    return [_problem(error, schema, document) for error in failed.errors(include_url=False)]


def _problem(error: ErrorDetails, schema: type[BaseModel], document: Document) -> Problem:
    path = [str(part) for part in error["loc"]]
    if path[-1:] == ["[key]"] and error["type"] != "extra_forbidden":
        path.pop()  # pydantic's way to say: the key, not its value
    key, above = _dotted(path), _dotted(path[:-1])
    match error["type"]:
        case "extra_forbidden":
            of = f" in {above}" if above else ""
            keys = ", ".join(_keys(schema, path[:-1]))
            message = f"unknown key {shown(path[-1])}{of}; keys: {keys}"
        case "missing":
            message = f"missing key {path[-1]!r}" + (f" in {above}" if above else "")
            return Problem(document.place(path), message, missing=True)
        case kind if kind == WHOLE:
            message = error["msg"]
        case _:
            message = f"{key}: {_said(error)}"
    return Problem(document.place(path), message)


def _dotted(path: list[str]) -> str:
    return ".".join(part if re.fullmatch(r"[\w-]{1,60}", part) else shown(part) for part in path)


def _said(error: ErrorDetails) -> str:
    kind, value, context = error["type"], shown(error["input"]), error.get("ctx", {})
    if kind in _EXPECTED:
        return f"expected {_EXPECTED[kind]}, got {value}"
    match kind:
        case "literal_error":
            return f"expected {context['expected'].replace(chr(39), '')}, got {value}"
        case "greater_than":
            return f"{value} is too small; more than {context['gt']:g}"
        case "greater_than_equal":
            return f"{value} is too small; from {context['ge']:g}"
        case "less_than_equal":
            return f"{value} is too large; up to {context['le']:g}"
        case "too_short":
            return "is empty"
    return error["msg"] if kind == ABOUT_KEY else f"{error['msg']}, got {value}"


def _without_none(annotation: Any) -> Any:
    """Return ``X`` of ``X | None``."""
    kinds = [kind for kind in get_args(annotation) if kind is not NoneType]
    return kinds[0] if isinstance(annotation, UnionType) and len(kinds) == 1 else annotation


def _keys(schema: type[BaseModel], path: list[str]) -> Iterator[str]:
    """Return the keys of the section at ``path``."""
    section: Any = schema
    for part in path:
        if isinstance(section, type) and issubclass(section, BaseModel):
            section = _without_none(section.model_fields[part].annotation)
        else:  # the values of a dict[name, section]
            section = get_args(section)[1]
    return iter(section.model_fields)
