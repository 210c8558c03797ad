"""Writes the model's folder and the example pictures, each as a whole or not at all."""

import json
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from string import Template
from typing import Any

import numpy as np
from safetensors.torch import save_file
from torch import Tensor

from tiny.digits import Digits, all_digits, draw_digit, side_of
from tiny.net import Step3
from tiny.shape import config_json, preprocessor_json
from tiny.text import tokenizer, tokenizer_config_json

SHARDS = 2
PAGES = Path(__file__).parent / "pages"
SIGNATURE = "python tools/train_tiny.py"
"""Stands in every page, and so marks the folders that may be replaced."""
EXAMPLES = 12


def refusal(target: Path) -> str | None:
    """Say why ``target`` may not be replaced: it holds something that this tool did not write."""
    if not target.exists() or not any(target.iterdir()):
        return None
    page = target / "README.md"
    if page.exists() and SIGNATURE in page.read_text(encoding="utf-8"):
        return None
    return f"{target} holds other files, which would be lost; name a new folder"


@contextmanager
def replaced(target: Path) -> Iterator[Path]:
    """Yield an empty folder that takes the place of ``target`` once it is filled.

    It lies beside ``target``, so that the renames stay on one disk. If filling it fails, ``target``
    keeps what it had.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{target.name}-", dir=target.parent) as beside:
        fresh, old = Path(beside) / "fresh", Path(beside) / "old"
        fresh.mkdir()
        yield fresh
        if target.exists():
            target.rename(old)
        fresh.rename(target)


def write_model(folder: Path, net: Step3, held_out: Digits, facts: dict[str, str]) -> None:
    """Write the whole model folder: weights, JSON files, split, held-out set and README."""
    _write_weights(folder, net)
    _write_json(folder / "config.json", config_json())
    _write_json(folder / "preprocessor_config.json", preprocessor_json())
    _write_json(folder / "tokenizer_config.json", tokenizer_config_json())
    tokenizer().save(str(folder / "tokenizer.json"))
    _write_split(folder / "split.txt")
    _write_held_out(folder / "eval" / "held_out.npz", held_out)
    _write_page("model.md", folder / "README.md", facts)


def write_examples(folder: Path, held_out: Digits) -> None:
    """Write a dozen held-out digits as pictures: the first of every label, then of some again."""
    for position in _first_of_each(held_out)[:EXAMPLES]:
        label, index = held_out.labels[position], held_out.indices[position]
        draw_digit(held_out.pixels[position]).save(folder / f"{label}_held-out_{index:04d}.png")
    _write_page("examples.md", folder / "README.md", {})


def _first_of_each(digits: Digits) -> list[int]:
    """Order the positions so that the n-th of every label comes before the n+1-th of any."""
    seen: dict[int, int] = {}
    ranks = []
    for position, label in enumerate(digits.labels.tolist()):
        seen[label] = seen.get(label, 0) + 1
        ranks.append((seen[label], label, position))
    return [position for _, _, position in sorted(ranks)]


def _write_weights(folder: Path, net: Step3) -> None:
    """Write bfloat16 shards of about equal size, in the model's order, and their index."""
    weights = {n: t.detach().bfloat16().contiguous() for n, t in net.state_dict().items()}
    total = sum(t.nbytes for t in weights.values())
    shards: list[dict[str, Tensor]] = [{} for _ in range(SHARDS)]
    written = 0
    for name, weight in weights.items():
        shards[written * SHARDS // total][name] = weight
        written += weight.nbytes
    files = {f"model-{i + 1:05d}-of-{SHARDS:05d}.safetensors": s for i, s in enumerate(shards)}
    for file, shard in files.items():
        save_file(shard, folder / file, metadata={"format": "pt"})
        (folder / file).chmod(0o644)  # safetensors leaves it readable by the owner alone
    where = {name: file for file, shard in files.items() for name in shard}
    index = {"metadata": {"total_size": total}, "weight_map": where}
    _write_json(folder / "model.safetensors.index.json", index)


def _write_split(path: Path) -> None:
    """Write one line a picture: its number in the data set, its side, its digest."""
    digits = all_digits()
    lines = ["# index side sha256 of the 64 pixel bytes; held-out where digest % 10 < 2"]
    pictures = zip(digits.indices, digits.digests(), strict=True)
    lines += [f"{i} {side_of(d)} {d}" for i, d in pictures]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def _write_held_out(path: Path, digits: Digits) -> None:
    path.parent.mkdir()
    np.savez_compressed(
        path,
        images=digits.pixels,
        labels=digits.labels,
        indices=digits.indices,
        pairs=digits.pairs(),
    )


def _write_json(path: Path, content: dict[str, Any]) -> None:
    text = json.dumps(content, indent=2, ensure_ascii=False)
    path.write_text(text + "\n", encoding="utf-8")


def _write_page(name: str, path: Path, facts: dict[str, str]) -> None:
    """Fill a page's ``$names`` in; a name without a fact is an error."""
    page = Template((PAGES / name).read_text(encoding="utf-8"))
    path.write_text(page.substitute(facts), encoding="utf-8")
