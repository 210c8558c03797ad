"""Small random checkpoints, and the means to damage them."""

import json

import ml_dtypes
import numpy as np
import pytest
import safetensors
from oracle.random_checkpoint import Vision, write_checkpoint
from safetensors.numpy import save_file

from step3_hetero.model.checkpoint import Checkpoint
from step3_hetero.model.config import ModelConfig

DTYPES = {"F32": np.float32, "BF16": ml_dtypes.bfloat16, "F8_E4M3": ml_dtypes.float8_e4m3fn}


@pytest.fixture
def write(tmp_path):
    """Write a checkpoint; ``vision=True`` gives it a tower. Options: oracle.random_checkpoint."""

    def write(name="model", *, vision=False, **options):
        return write_checkpoint(tmp_path / name, vision=Vision() if vision else None, **options)

    return write


@pytest.fixture
def open_checkpoint():
    """Open a folder by its own config.json."""
    return lambda folder: Checkpoint.open(folder, ModelConfig.read(folder))


@pytest.fixture
def stored():
    """Read one file through the safetensors library alone."""

    def stored(path):
        return {
            name: np.frombuffer(t["data"], DTYPES[t["dtype"]]).reshape(t["shape"]).copy()
            for name, t in safetensors.deserialize(path.read_bytes())
        }

    return stored


@pytest.fixture
def edit(stored):
    """Change the tensors of a file in place: ``change`` gets a dict of arrays."""

    def edit(folder, change, file="model.safetensors"):
        tensors = stored(folder / file)
        change(tensors)
        save_file(tensors, folder / file)

    return edit


@pytest.fixture
def edit_json():
    """Change a JSON file in place: ``change`` gets its object."""

    def edit_json(path, change):
        value = json.loads(path.read_text(encoding="utf-8"))
        change(value)
        path.write_text(json.dumps(value, indent=2), encoding="utf-8")

    return edit_json
