"""Every exception the package raises on purpose.

Step3HeteroError
├── ConfigError             the YAML file, or the model's config.json, is wrong
├── CheckpointError         the weights on disk are missing, damaged or of another model
├── RequestError            a prompt, an image or a token id cannot be served
├── BackendNotFound         no installed package provides the name
├── UnsupportedOp           the device has no kernel for the op, dtype or shape
├── PlacementError          no assignment of stages to devices fits
├── EdgeMismatch            the two ends of an edge do not agree on what crosses it
├── TransportTimeout        a peer gave no sign of life within the deadline
├── RoleLost                a role died and nothing can take its place
└── ConformanceError        a backend differs from the reference by more than rounding explains

The command line prints the message without a traceback and exits 2 for bad input, 1 for a failure.
"""


class Step3HeteroError(Exception):
    """Base class: catch this to catch everything the package raises on purpose."""

    exit_code = 1


class ConfigError(Step3HeteroError):
    """The YAML file, or the model's config.json, is wrong. The message starts with file:line."""

    exit_code = 2


class CheckpointError(Step3HeteroError):
    """The weights on disk are missing, damaged, or belong to another model."""

    exit_code = 2


class RequestError(Step3HeteroError):
    """A prompt, an image or a token id cannot be served."""

    exit_code = 2


class BackendNotFound(Step3HeteroError):
    """No installed package registers a backend under the name asked for."""

    exit_code = 2


class UnsupportedOp(Step3HeteroError):
    """The device has no kernel for an op with these shapes, dtypes or parameters."""

    exit_code = 2


class PlacementError(Step3HeteroError):
    """No assignment of stages to devices fits."""

    exit_code = 2


class EdgeMismatch(Step3HeteroError):
    """The two ends of an edge do not agree on what crosses it."""

    exit_code = 2


class TransportTimeout(Step3HeteroError):
    """A peer gave no sign of life within the deadline."""


class RoleLost(Step3HeteroError):
    """A role died and nothing can take its place."""


class ConformanceError(Step3HeteroError):
    """A backend differs from the reference by more than rounding explains."""
