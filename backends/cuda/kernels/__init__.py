"""Triton source, one file an op family. What starts a kernel stands beside this folder."""
