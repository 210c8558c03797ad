"""Which files a checkpoint consists of, and which of them holds which tensor."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath, PureWindowsPath

from step3_hetero.errors import CheckpointError
from step3_hetero.model.json_file import no_duplicates
from step3_hetero.model.layout import canonical
from step3_hetero.model.safetensors_file import Entry, Shard
from step3_hetero.specs import HostArray

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"

_LISTED = 10


@dataclass(frozen=True, slots=True)
class Place:
    """A stored tensor: its file, and its name there, which may be the other spelling."""

    shard: Shard
    stored_name: str

    @property
    def entry(self) -> Entry:
        """Return what the file's header says of the tensor."""
        return self.shard.entries[self.stored_name]

    def view(self) -> HostArray:
        """Return the tensor without copying it."""
        return self.shard.view(self.stored_name)


def find_tensors(folder: Path) -> dict[str, Place]:
    """Return the place of every stored tensor, scales included, by the checkpoint's spelling.

    Raises:
        CheckpointError: a file is missing, damaged or outside the folder, the index and the files
            disagree, or one tensor is stored twice.
    """
    index, single = folder / INDEX, folder / SINGLE
    if index.is_file():
        named = _read_index(index)
        if single.is_file() and SINGLE not in named.values():
            raise CheckpointError(f"{folder}: {INDEX} does not name {SINGLE}; remove one of them")
        return _indexed(folder, named)
    if single.is_file():
        return _places([Shard(single)])
    raise CheckpointError(f"{folder}: no weights; expected {INDEX} or {SINGLE}")


def listed(items: Iterable[str]) -> str:
    """Return the first ten items and how many more there are.

    >>> listed(str(n) for n in range(12))
    '0, 1, 2, 3, 4, 5, 6, 7, 8, 9 and 2 more'
    """
    found = list(items)
    more = f" and {len(found) - _LISTED} more" if len(found) > _LISTED else ""
    return ", ".join(found[:_LISTED]) + more


def _read_index(path: Path) -> dict[str, str]:
    """Return the index's weight_map: tensor name to file name."""
    try:
        index = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=no_duplicates)
    except json.JSONDecodeError as cause:
        raise CheckpointError(f"{path}:{cause.lineno}: not JSON: {cause.msg}") from cause
    except (OSError, ValueError, RecursionError) as cause:
        raise CheckpointError(f"{path}: cannot be read: {cause}") from cause
    names = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(names, dict) or not names:
        raise CheckpointError(f"{path}: weight_map must name each tensor's file, found {names!r}")
    for tensor, file in names.items():
        _check_file_name(path, tensor, file)
    return names


def _check_file_name(index: Path, tensor: str, file: object) -> None:
    """Refuse anything but the bare name of a safetensors file: an index may come from anywhere."""
    bare = isinstance(file, str) and (
        PurePosixPath(file).name == file and PureWindowsPath(file).name == file
    )
    if not bare or not str(file).endswith(".safetensors") or "\0" in str(file):
        raise CheckpointError(
            f"{index}: {tensor} is said to lie in {file!r}; "
            "expected the bare name of a .safetensors file in the same folder"
        )


def _indexed(folder: Path, index: Mapping[str, str]) -> dict[str, Place]:
    """Open the files that the index names; both must tell the same of every tensor."""
    files = sorted(set(index.values()))
    missing = [f for f in files if not (folder / f).is_file()]
    if missing:
        raise CheckpointError(
            f"{folder}: {len(missing)} of {len(files)} files that {INDEX} names are missing: "
            f"{listed(missing)}"
        )
    shards = [Shard(folder / f) for f in files]
    places = _places(shards)
    _check_index(folder, index, shards)
    return places


def _check_index(folder: Path, index: Mapping[str, str], shards: list[Shard]) -> None:
    stored = {name: s.path.name for s in shards for name in s.entries}
    lacking = [f"{n} in {file}" for n, file in index.items() if stored.get(n) != file]
    if lacking:
        raise CheckpointError(
            f"{folder}: {INDEX} names {len(lacking)} tensors that are not there: {listed(lacking)}"
        )
    unnamed = [f"{n} in {file}" for n, file in stored.items() if n not in index]
    if unnamed:
        raise CheckpointError(
            f"{folder}: {len(unnamed)} tensors are not named in {INDEX}: {listed(unnamed)}"
        )


def _places(shards: Iterable[Shard]) -> dict[str, Place]:
    places: dict[str, Place] = {}
    twice: list[str] = []
    for shard in shards:
        for stored in shard.entries:
            place = Place(shard, stored)
            first = places.setdefault(canonical(stored), place)
            if first is not place:
                twice.append(f"{canonical(stored)} in {first.shard.path.name}, {shard.path.name}")
    if twice:
        folder = next(iter(places.values())).shard.path.parent
        raise CheckpointError(f"{folder}: {len(twice)} tensors stored twice: {listed(twice)}")
    return places
