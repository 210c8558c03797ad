"""Triton kernels for the 910B, never run on hardware. What is proven: docs/ascend.md."""
