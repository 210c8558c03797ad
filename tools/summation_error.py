"""How much a long product errs with its sums in blocks and in order: the figures of decision 0009.

python tools/summation_error.py
"""

import numpy as np

from step3_hetero.conformance.tolerance import row_nmse
from step3_hetero.conformance.trial import reference
from step3_hetero.specs import HostTensor, OpSpec

TOKENS, TERMS, COLUMNS = 64, 7168, 48


def main() -> None:
    """Print the mean row's squared relative error in float32."""
    rng = np.random.default_rng(0)
    x = rng.standard_normal((TOKENS, TERMS), dtype=np.float32)
    w = rng.standard_normal((COLUMNS, TERMS), dtype=np.float32) / np.float32(TERMS**0.5)
    want = x.astype(np.float64) @ w.T.astype(np.float64)
    for summation in ("blocked", "in-order"):
        device = reference(summation)
        spec = OpSpec("linear", "float32", {"in": TERMS, "out": COLUMNS}, {"out_dtype": "float32"})
        weights = device.prepare("linear", {"w": HostTensor("w", w)}, spec)
        got = device.to_host(device.kernel("linear")(device.from_host(x), weights))
        print(f"{summation}: {row_nmse(got.astype(np.float64), want).mean():.1e}")


if __name__ == "__main__":
    main()
