"""One FFN stage over the members of a set: each takes its experts' share, their sums are added."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np

from step3_hetero.afd.landing import NONE_LANDED, Landed
from step3_hetero.afd.wire import Wire
from step3_hetero.backend import Array, Device
from step3_hetero.errors import EdgeMismatch
from step3_hetero.graph import GraphStage
from step3_hetero.specs import FfnSpec, HostArray, TensorSpec, wide


def own_experts(node: GraphStage, arrays: Mapping[str, HostArray]) -> Mapping[str, HostArray]:
    """Return a stage's inputs with ids as its device numbers them: the first one held is 0.

    An expert of another member becomes -1, which costs nothing and adds nothing (op experts).

    Shapes: ids (tokens, top_k) int32, as the router gave them.

    Raises:
        EdgeMismatch: an id is no expert of the layer.
    """
    spec = node.spec
    if not isinstance(spec, FfnSpec) or not spec.experts or "ids" not in arrays:
        return arrays
    ids = arrays["ids"]
    first, total = (node.share.first, node.share.total) if node.share else (0, spec.experts)
    if ids.dtype != np.int32 or (ids.size and not -1 <= ids.min() <= ids.max() < total):
        raise EdgeMismatch(
            f"{node.name}: ids {ids.dtype} from {ids.min(initial=0)} to {ids.max(initial=0)} "
            f"refused; allowed: int32 from -1 to {total - 1}"
        )
    local = ids - np.int32(first)
    return {**arrays, "ids": np.where((local >= 0) & (local < spec.experts), local, np.int32(-1))}


def added(
    device: Device,
    wire: Wire,
    parts: Sequence[Mapping[str, HostArray]],
    specs: Mapping[str, TensorSpec],
    landed: Sequence[Mapping[str, Landed]] = (),
) -> dict[str, Array]:
    """Return on ``device`` the sum of what each member of a set answered, member 0 first.

    A partial sum is rounded to its tensor's dtype by the stage that made it, and to the wire's, if
    that is another, by its sender. Here they are widened (float32, or float64 for float64), added
    one after the other in the order of the members, whenever they came, and rounded once.

    Shapes: each tensor of ``specs`` as its stage gives it, alike in all ``parts``. ``landed``:
    which tensors of each part are on the device already.

    Raises:
        EdgeMismatch: the members' tensors do not fit together.
    """
    shapes = [{name: x.shape for name, x in part.items()} for part in parts]
    if any(s != shapes[0] or not specs.keys() <= s.keys() for s in shapes):
        raise EdgeMismatch(f"partial sums {shapes} do not fit; allowed: {', '.join(specs)}, alike")
    landed = landed or [NONE_LANDED] * len(parts)
    if len(parts) == 1:
        return wire.to_device(device, parts[0], specs, landed[0])
    wider = {name: replace(spec, dtype=wide(spec.dtype)) for name, spec in specs.items()}
    total = wire.to_device(device, parts[0], wider, landed[0])
    for part, there in zip(parts[1:], landed[1:], strict=True):
        for name, x in wire.to_device(device, part, wider, there).items():
            total[name] = device.kernel("add")(total[name], x)
    return {
        name: x if specs[name] == wider[name] else device.kernel("cast")(x, dtype=specs[name].dtype)
        for name, x in total.items()
    }
