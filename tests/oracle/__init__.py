"""A second, separately written Step-3 in float64, for checking the package against.

Nothing here imports the package: where the two agree, they agree by the model's definition and not
by shared code. Plain formulas over whole sequences: no cache, no batching, no rounding to a narrow
type. Fast enough for models of a few million parameters, and meant for nothing larger.
"""
