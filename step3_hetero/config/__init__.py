"""The config file: what runs where, read into values that remember their line."""

from step3_hetero.config.schema import Config, Emulate, Role, Runtime, Transport
from step3_hetero.config.selectors import (
    STAGES,
    Selector,
    assign_stages,
    parse_selector,
    stage_ranges,
)

__all__ = [
    "STAGES",
    "Config",
    "Emulate",
    "Role",
    "Runtime",
    "Selector",
    "Transport",
    "assign_stages",
    "parse_selector",
    "stage_ranges",
]
