"""The chat template: a Jinja text from the checkpoint, rendered in a sandbox."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from step3_hetero.errors import ConfigError, RequestError
from step3_hetero.model.json_section import Section

if TYPE_CHECKING:
    import jinja2

DEFAULT_TEMPLATE = """\
{{- bos_token + ' ' }}
{%- if messages and messages[0].role == 'system' %}
    {{- messages[0].content }}
    {%- set turns = messages[1:] %}
{%- else %}
    {{- 'You are a helpful assistant.' }}
    {%- set turns = messages %}
{%- endif %}
{{- ' ' }}
{%- for message in turns %}
    {{- '<|BOT|>' + message.role + '\\n ' + message.content + ' <|EOT|>' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|BOT|>assistant\\n<think>\\n' }}
{%- endif %}
"""
"""The prompt of the published examples, for a checkpoint that brings no template of its own.

They show one question; further turns repeat its form.
"""


@dataclass(frozen=True, slots=True)
class ChatTemplate:
    """A compiled template and where it came from."""

    compiled: jinja2.Template
    source: str

    @classmethod
    def read(cls, file: Path, stated: Section) -> ChatTemplate:
        """Take the template's own file, else ``tokenizer_config.json``'s key, else the default.

        Raises:
            ConfigError: the template is no text or not Jinja.
        """
        if file.exists():
            try:
                return cls.compile(file.read_text(encoding="utf-8"), str(file))
            except (OSError, UnicodeDecodeError) as cause:
                raise ConfigError(f"{file}: cannot be read: {cause}") from cause
        text = stated.get("chat_template")
        if text is None:
            return cls.compile(DEFAULT_TEMPLATE, "the default template")
        if not isinstance(text, str):
            raise stated.error("chat_template", f"expected one text, found {type(text).__name__}")
        return cls.compile(text, f"{stated.path}:chat_template")

    @classmethod
    def compile(cls, text: str, source: str) -> ChatTemplate:
        """Compile a template.

        Raises:
            ConfigError: it is not Jinja.
        """
        import jinja2  # a tenth of a second that a config check does without

        try:
            return cls(_sandbox().from_string(text), source)
        except jinja2.TemplateSyntaxError as cause:
            raise ConfigError(f"{source}: line {cause.lineno}: {cause.message}") from cause
        except RecursionError as cause:
            raise ConfigError(f"{source}: nested too deeply") from cause

    def render(self, **names: Any) -> str:
        """Fill in the template.

        Raises:
            RequestError: it refuses these values, or cannot cope with them.
        """
        try:
            return self.compiled.render(**names)
        except Exception as cause:  # a template is a program: it may raise anything
            raise RequestError(f"{self.source} cannot render the conversation: {cause}") from cause


def _sandbox() -> jinja2.Environment:
    """Return the environment that published templates expect: its options, filter and function."""
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _refuse
    return environment


def _to_json(value: Any, indent: int | None = None) -> str:
    """Write JSON; Jinja's own filter would escape it for HTML."""
    return json.dumps(value, ensure_ascii=False, indent=indent)


def _refuse(message: str) -> str:
    raise RequestError(message)
