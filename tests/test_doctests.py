"""The examples in docstrings run. Modules are imported under their one name, not by path."""

import doctest
import importlib
import pkgutil

import pytest

import step3_hetero
import step3_hetero.backends.cpu
import step3_hetero.backends.reference
import step3_hetero.backends.torch_common
import step3_hetero.placement

PACKAGES = (
    step3_hetero.backends.cpu,
    step3_hetero.backends.reference,
    step3_hetero.backends.torch_common,
    step3_hetero.placement,
    step3_hetero,
)


def modules():
    for package in PACKAGES:
        prefix = package.__name__ + "."
        for found in pkgutil.iter_modules(package.__path__, prefix):
            yield found.name
            if found.ispkg and not found.name.endswith((".backends", ".placement")):
                yield from (
                    m.name
                    for m in pkgutil.walk_packages(
                        importlib.import_module(found.name).__path__, found.name + "."
                    )
                )


NAMES = sorted(set(modules()))


@pytest.mark.parametrize("name", NAMES)
def test_examples_hold(name):
    result = doctest.testmod(importlib.import_module(name))
    assert result.failed == 0


def test_every_reference_kernel_file_has_an_example():
    tried = [n for n in NAMES if ".reference." in n]
    assert sum(doctest.testmod(importlib.import_module(n)).attempted for n in tried) >= 20
