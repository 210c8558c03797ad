"""pytest's side of the suite: ``pytest --pyargs step3_hetero.conformance --backend NAME``.

Options are added only when the suite itself is asked for: this plugin is loaded by every pytest of
an environment that has the package.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from step3_hetero.conformance.suite import Workers

SUITE = "step3_hetero.conformance"


@pytest.hookimpl
def pytest_load_initial_conftests(
    early_config: pytest.Config, parser: pytest.Parser, args: list[str]
) -> None:
    """Add the suite's options when it is among the arguments."""
    if any(argument.startswith(SUITE) for argument in args):
        group = parser.getgroup("conformance")
        group.addoption("--backend", metavar="NAME[:INDEX]", help="the device on trial")
        group.addoption("--option", action="append", default=[], metavar="KEY=VALUE",
                        help="an option of the backend")  # fmt: skip
        group.addoption("--full", action="store_true", help="all cases, real sizes too")
        group.addoption("--deadline", type=float, default=300.0, help="seconds for one case")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Give the suite's one test every case as a parameter."""
    if "conformance_case" not in metafunc.fixturenames:
        return
    from step3_hetero.conformance.suite import select

    if not metafunc.config.getoption("--backend", None):
        raise pytest.UsageError("name the device on trial: --backend NAME[:INDEX]")
    chosen = select(full=metafunc.config.getoption("--full"))
    metafunc.parametrize("conformance_case", chosen, ids=[trial.id for trial in chosen])


@pytest.fixture(scope="session")
def conformance_workers(request: pytest.FixtureRequest) -> Iterator[tuple[Workers, dict[str, str]]]:
    """Open the device in a process of its own; known gaps come with it."""
    from step3_hetero.conformance.gaps import known_gaps
    from step3_hetero.conformance.suite import Target, workers

    target = Target.parse(_option(request, "--backend"), _option(request, "--option"))
    gaps = known_gaps(target.backend())
    with workers(target, deadline_s=_option(request, "--deadline")) as pool:
        yield pool, gaps


def _option(request: pytest.FixtureRequest, name: str) -> Any:
    return request.config.getoption(name)
