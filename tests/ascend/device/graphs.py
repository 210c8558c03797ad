"""Graphs of the stand-in: calls are recorded and made again over the same arrays.

Names and parameters are torch_npu's own (schemas.json, ``runtime``); what they do follows its
``npu/graphs.py``. Assumed: that a card does as that file reads. A capture refuses what would reach
the host; its results hold NaN until the first replay; a replay whose attention was not updated
since the last one is refused, where a card would wait for ever.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

UPDATED = "npu_fused_infer_attention_score"
"""The operator before which a captured stream waits for an update."""


class Stream:
    """A queue of a device that runs at once."""

    def __init__(self, device: Any = None, priority: int = 0, **_: Any) -> None:
        """Take and ignore the vendor's parameters."""

    def wait_stream(self, stream: Stream) -> None:
        """Nothing is ever pending."""


_CURRENT = Stream()


def current_stream(device: Any = None) -> Stream:
    """Return the only stream."""
    return _CURRENT


@contextmanager
def stream(stream: Stream) -> Iterator[None]:
    """Enter a stream: the same as before."""
    yield


class device:
    """Makes a device the current one, which the only one always is."""

    def __init__(self, device: Any) -> None:
        """Take and ignore the vendor's parameter."""

    def __enter__(self) -> None:
        """Change nothing."""

    def __exit__(self, *exception: Any) -> None:
        """Change nothing."""


class _Record:
    """One call of a captured graph, and the arrays that it filled."""

    def __init__(self, function: Any, args: Any, kwargs: Any, results: Any) -> None:
        self.function = function
        self.args, self.kwargs = (tree_map(_kept, x) for x in (args, kwargs))
        given = {_memory(x) for x in _arrays((args, kwargs))}
        self.results = results
        self.filled = [x for x in _arrays(results) if _memory(x) not in given]

    @property
    def updated(self) -> bool:
        """Say whether the runtime waits for an update before this call."""
        return UPDATED in str(self.function)

    def again(self) -> None:
        """Make the call again, its results in the same arrays."""
        new = self.function(*self.args, **self.kwargs)
        for held, x in zip(_arrays(self.results), _arrays(new), strict=True):
            if any(held is filled for filled in self.filled):
                held.copy_(x)


def _kept(x: Any) -> Any:
    return list(x) if isinstance(x, list) else x


def _arrays(found: Any) -> list[torch.Tensor]:
    return [x for x in tree_leaves(found) if isinstance(x, torch.Tensor)]


def _memory(x: torch.Tensor) -> int:
    return x.untyped_storage().data_ptr()


class _Recording(TorchDispatchMode):
    """Notes every call, and refuses those that reach the host."""

    def __init__(self) -> None:
        super().__init__()
        self.records: list[_Record] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        results = func(*args, **(kwargs or {}))
        given, made = _arrays((args, kwargs)), _arrays(results)
        devices = {x.device.type for x in given if x.dim() or x.device.type == "npu"}
        told = not made and not func._schema.is_mutable  # a number or a truth, as item() gives
        reached = "npu" in devices and (told or any(x.device.type == "cpu" for x in made))
        if reached or devices == {"npu", "cpu"}:
            raise RuntimeError(f"graph capture: {func} reaches the host")
        self.records.append(_Record(func, args, kwargs or {}, results))
        return results


class NPUGraph:
    """A graph of recorded calls."""

    def __init__(self) -> None:
        self.auto_dispatch_capture = False
        self.recording = _Recording()
        self.ready = False

    def update(self, cpu_update_input: Sequence[dict[str, Any]]) -> None:
        """Change parameters of the attention's calls: one dictionary for all, or one for each."""
        if not self.auto_dispatch_capture:
            raise RuntimeError("update needs a capture with auto_dispatch_capture=True")
        waiting = [r for r in self.recording.records if r.updated]
        if len(cpu_update_input) == 1:
            cpu_update_input = list(cpu_update_input) * len(waiting)
        if len(cpu_update_input) != len(waiting):
            raise RuntimeError(f"{len(waiting)} calls and {len(cpu_update_input)} updates")
        for record, new in zip(waiting, cpu_update_input, strict=True):
            record.kwargs |= {k: v for k, v in new.items() if k in record.kwargs}
        self.ready = True

    def replay(self) -> None:
        """Make every call again."""
        if any(r.updated for r in self.recording.records) and not self.ready:
            raise RuntimeError("replay: the attention waits for an update that did not come")
        self.ready = False
        for record in self.recording.records:
            record.again()


class graph:
    """What is called inside is captured by ``npu_graph``."""

    def __init__(
        self,
        npu_graph: NPUGraph,
        pool: Any = None,
        stream: Any = None,
        auto_dispatch_capture: bool = False,
        capture_error_mode: str = "global",
    ) -> None:
        self.npu_graph = npu_graph
        npu_graph.auto_dispatch_capture = auto_dispatch_capture

    def __enter__(self) -> None:
        self.npu_graph.recording.__enter__()

    def __exit__(self, *exception: Any) -> None:
        self.npu_graph.recording.__exit__(*exception)
        for record in self.npu_graph.recording.records:
            for x in record.filled:
                if x.is_floating_point():
                    x.fill_(torch.nan)


MEMBERS: dict[str, Any] = {
    "NPUGraph": NPUGraph,
    "Stream": Stream,
    "current_stream": current_stream,
    "device": device,
    "graph": graph,
    "stream": stream,
}
"""What becomes part of ``torch.npu``."""
