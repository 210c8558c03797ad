"""Writing a file whole or not at all, and filling the templates of this folder."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import Any

from step3_hetero.errors import RequestError

TEMPLATES = Path(__file__).parent / "templates"


def check_writable(option: str, path: str | Path | None) -> None:
    """Refuse, before any work, a file that could not be written in the end; None is no file.

    Raises:
        RequestError: its folder is missing, or it is a folder itself.
    """
    if path is None:
        return
    file = Path(path).absolute()
    if not file.parent.is_dir():
        raise RequestError(
            f"{option} {path}: no folder {str(Path(path).parent)!r}; make it first, or name another"
        )
    if file.is_dir():
        raise RequestError(f"{option} {path}: is a folder; name a file in it")


def write_whole(path: Path, text: str) -> None:
    """Write text to a temporary name in the same folder, then put it in the file's place.

    Raises:
        RequestError: it cannot be written; what was there before is untouched.
    """
    temporary = ""
    try:
        with tempfile.NamedTemporaryFile(
            "w", encoding="utf-8", dir=path.parent, prefix=f".{path.name}.", delete=False
        ) as file:
            temporary = file.name
            file.write(text)
        Path(temporary).chmod(0o666 & ~_umask())
        Path(temporary).replace(path)
    except OSError as cause:
        Path(temporary or path.with_name(f".{path.name}.none")).unlink(missing_ok=True)
        raise RequestError(f"{path} cannot be written: {cause.strerror}") from cause


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def fill(template: str, **values: Any) -> str:
    """Return a filled-in template of `templates/`; text is escaped, an unknown name an error."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template(template).render(**values)
