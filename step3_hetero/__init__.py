"""Step-3 over accelerators of several vendors: stages, backends, placement."""

__version__ = "0.1.0"
