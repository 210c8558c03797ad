"""Step-3 over accelerators of several vendors: stages, backends, placement.

from step3_hetero import load

engine = load("examples/digits.yaml")
engine.generate("which digit is this ?", images=["7.png"]).text
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from step3_hetero.api import load
    from step3_hetero.runtime.engine import Engine
    from step3_hetero.runtime.request import Completion, SamplingParams

__version__ = "0.1.0"
__all__ = ["Completion", "Engine", "SamplingParams", "__version__", "load"]

_HOME = {
    "load": "step3_hetero.api",
    "Engine": "step3_hetero.runtime.engine",
    "Completion": "step3_hetero.runtime.request",
    "SamplingParams": "step3_hetero.runtime.request",
}


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used: ``import step3_hetero`` itself stays light."""
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_HOME[name]), name)
