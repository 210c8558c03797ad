"""The dtype of an edge: cast on the device that sends, cast back on the one that receives."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from step3_hetero.afd.landing import NONE_LANDED, Landed
from step3_hetero.afd.leaving import Leaving
from step3_hetero.backend import Array, Device
from step3_hetero.runtime.apart import CAST, WIRE_DTYPE
from step3_hetero.specs import SCALED as SCALED
from step3_hetero.specs import HostArray, TensorSpec


@dataclass(frozen=True, slots=True)
class Wire:
    """How the activations of one edge travel. ``dtype`` is NumPy's name; empty: as they are.

    Hidden states alone are cast. ``SCALED`` dtypes travel with one float32 scale for each token and
    128 columns.
    """

    dtype: str = ""

    @classmethod
    def of(cls, said: str) -> Wire:
        """Return the wire of a config's ``a2f_dtype`` or ``f2a_dtype``."""
        return cls(WIRE_DTYPE[said])

    def to_host(
        self, device: Device, outputs: Mapping[str, Array], specs: Mapping[str, TensorSpec]
    ) -> Leaving:
        """Return the arrays that travel, on the host or on their way there.

        ``outputs`` have the dtypes of their ``specs``; a scale goes beside its codes.
        """
        sent = Leaving(device)
        for name, x in outputs.items():
            if not self.casts(name):
                sent.add(name, x, specs[name].dtype)
            elif self.dtype in SCALED:
                codes, scale = device.kernel("quantise")(x, dtype=self.dtype)
                sent.add(name, codes, self.dtype)
                sent.add(f"{name}.scale", scale, "float32")
            else:
                sent.add(name, device.kernel("cast")(x, dtype=self.dtype), self.dtype)
        return sent

    def to_device(
        self,
        device: Device,
        arrays: Mapping[str, HostArray],
        specs: Mapping[str, TensorSpec],
        landed: Mapping[str, Landed] = NONE_LANDED,
    ) -> dict[str, Array]:
        """Return the arrays of an edge in a device's memory, in the dtypes of their ``specs``.

        Those that have ``landed`` there, unchanged since, are not copied again.
        """

        def there(name: str) -> Array:
            found = landed.get(name)
            if found is not None and found.device is device and found.host is arrays[name]:
                return found.there()
            return device.from_host(arrays[name])

        found: dict[str, Array] = {}
        for name, spec in specs.items():
            if name not in arrays:
                continue
            x = there(name)
            if f"{name}.scale" in arrays:
                scale = there(f"{name}.scale")
                x = device.kernel("dequantise")(x, scale, dtype=spec.dtype)
            elif arrays[name].dtype.name != spec.dtype:
                x = device.kernel("cast")(x, dtype=spec.dtype)
            found[name] = x
        return found

    def casts(self, name: str) -> bool:
        """Say whether a tensor of this name travels in ``dtype``."""
        return bool(self.dtype) and name in CAST
