"""Which attention and which FFN make up a layer, for each kind of layer of a model."""

from __future__ import annotations

from step3_hetero.placement.workload import Part, Workload


def kinds(workload: Workload) -> dict[str, tuple[Part | None, Part | None, int]]:
    """Return each kind of layer with its attention, its FFN and its number.

    Where attention and FFN both come in several kinds that do not match by name, attention's is
    None: the mean of all layers.
    """
    attention, ffn = workload.of("attention"), workload.of("ffn")
    if len(ffn) == 1 and len(attention) > 1:
        return {_suffix(p): (p, ffn[0], p.layers) for p in attention}
    by_kind = {_suffix(p): p for p in attention}
    return {
        _suffix(p): (
            attention[0] if len(attention) == 1 else by_kind.get(_suffix(p)), p, p.layers
        )
        for p in ffn
    }  # fmt: skip


def _suffix(part: Part) -> str:
    """Return the kind of layer a part belongs to: "moe" of "ffn-moe"."""
    return part.name.partition("-")[2] or part.name
