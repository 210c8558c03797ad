"""What the simulator needs of a plan's YAML, and of the words on its command line."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

from step3_hetero.config.document import Document, refuse
from step3_hetero.config.schema import Transport
from step3_hetero.errors import ConfigError, RequestError
from step3_hetero.placement.pipeline import PredictedPipeline
from step3_hetero.placement.simulate_loss import ROLES, Loss

MOST_CONTEXT = 10**9


@dataclass(frozen=True, slots=True)
class PlanFile:
    """The pipeline of a plan, which of its roles hold which stages, and the deadline of a wait."""

    pipeline: PredictedPipeline
    stages: dict[str, tuple[str, ...]]
    deadline_s: float

    @classmethod
    def read(cls, path: Path) -> PlanFile:
        """Read a version-1 config with ``predicted.pipeline``.

        Raises:
            ConfigError: it cannot be read, is no plan, or `PredictedPipeline.from_json` refuses it.
        """
        document = Document.read(path)
        refuse(document.problems)
        predicted = document.values.get("predicted")
        if not isinstance(predicted, dict) or "pipeline" not in predicted:
            place = document.place(["predicted"]).text
            message = "no key predicted.pipeline: this config is no plan; make one by"
            raise ConfigError(f"{place}: {message} step3-hetero plan --out plan.yaml")
        pipeline = PredictedPipeline.from_json(
            predicted["pipeline"], lambda key: document.place(key.split(".")).text
        )
        return cls(pipeline, _stages(document), _deadline_s(document))

    def loss(self, text: str) -> Loss:
        """Return what ``--fail ROLE@T`` asks for; a role goes by its name or by its stage.

        Raises:
            RequestError: it is not ROLE@T, or the plan has no such role.
        """
        role, at, time = text.rpartition("@")
        try:
            at_s = float(time.removesuffix("s"))
        except ValueError:
            at_s = math.nan
        if not at or not 0 <= at_s < math.inf:
            raise RequestError(
                f"--fail: {text!r}: expected ROLE@T, T in seconds from 0, as in ffn@2.5"
            )
        found = role if role in ROLES else self._stage_of(role)
        if found is None:
            known = ", ".join([*ROLES, *self.stages])
            raise RequestError(f"--fail: unknown role {role!r}; roles: {known}")
        return Loss(found, at_s, self.deadline_s)

    def _stage_of(self, role: str) -> str | None:
        stages = self.stages.get(role, ())
        if "attention" in stages:
            return "attention"
        return "ffn" if "ffn" in stages else None


def _stages(document: Document) -> dict[str, tuple[str, ...]]:
    roles = document.values.get("roles")
    found = {}
    for name, role in (roles if isinstance(roles, dict) else {}).items():
        stages = role.get("stages") if isinstance(role, dict) else None
        listed = stages if isinstance(stages, list) else []
        found[name] = tuple(str(stage).partition("[")[0] for stage in listed)
    return found


def _deadline_s(document: Document) -> float:
    transport = document.values.get("transport")
    value = transport.get("deadline_s") if isinstance(transport, dict) else None
    if value is None:
        return Transport().deadline_s
    if isinstance(value, int | float) and not isinstance(value, bool) and value > 0:
        return float(value)
    place = document.place(["transport", "deadline_s"]).text
    raise ConfigError(f"{place}: transport.deadline_s: expected seconds above 0, got {value!r}")


def read_contexts(path: Path) -> tuple[int, ...]:
    """Read measured contexts, one whole number of tokens a line; empty lines count for nothing.

    Raises:
        RequestError: the file cannot be read, is empty, or a line is no such number.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as cause:
        reason = getattr(cause, "strerror", None) or "not UTF-8 text"
        raise RequestError(f"--contexts: {path} cannot be read: {reason}") from cause
    found = []
    for number, line in enumerate(lines, start=1):
        text = line.strip()
        if not text:
            continue
        if not text.isdecimal() or not 1 <= int(text) <= MOST_CONTEXT:
            wanted = f"tokens, a whole number from 1 to {MOST_CONTEXT}"
            raise RequestError(f"{path}:{number}: expected {wanted}, got {text[:60]!r}")
        found.append(int(text))
    if not found:
        raise RequestError(f"--contexts: {path} holds no contexts; one whole number a line")
    return tuple(found)
