"""Proof that the conformance suite can fail: a twin of the reference with one defect at a time."""
