"""What Step-3's image processor makes of one picture: a view, crops, and the tokens around them.

Pillow resizes 8-bit pixels in two places: a picture that is too large, and the canvas from which
crops are cut. The sizes that the vision tower takes are reached in floats, after normalising.
"""

from dataclasses import dataclass

import numpy as np
from PIL import Image

from oracle import resample
from oracle.checkpoint import Array

Size = tuple[int, int]  # width, height


@dataclass(frozen=True)
class Constants:
    """Constants of the release; a small model has smaller ones."""

    view: int = 728  # side of the whole view, and the longest side of a small picture
    crop: int = 504  # side of a crop, and of the window that cuts it from the canvas
    patch: int = 14
    longest: int = 3024
    thin: int = 32  # a picture with a side under this is padded to a square ...
    thin_ratio: float = 4.0  # ... if it is also longer than this many times its height
    small_ratio: float = 1.5  # within the view's side, only longer pictures are cut
    strip_ratio: float = 4.0  # beyond it, longer pictures get windows of their short side
    fraction: float = 0.2  # a further window starts when more than this of it is filled
    mean: tuple[float, ...] = (0.48145466, 0.4578275, 0.40821073)
    std: tuple[float, ...] = (0.26862954, 0.26130258, 0.27577711)


RELEASE = Constants()


@dataclass(frozen=True)
class Prepared:
    """Shapes: view (3, view, view), crops (n, 3, crop, crop); layout holds the token names."""

    view: Array
    crops: Array
    layout: list[str]


def preprocess(image: Image.Image, c: Constants = RELEASE) -> Prepared:
    """Prepare one picture; the rows of its crops come before those of its view."""
    names = layout(image.size, c)
    image = image.convert("RGB")
    if image.size != padded_size(image.size, c):
        square = Image.new("RGB", padded_size(image.size, c))  # black
        square.paste(image, (0, 0))
        image = square
    image = bilinear_8bit(image, limited_size(image.size, c))
    crops = [to_floats(part, c.crop, c) for part in cut(image, c)]
    return Prepared(
        view=to_floats(image, c.view, c),
        crops=np.stack(crops) if crops else np.zeros((0, 3, c.crop, c.crop)),
        layout=names,
    )


def layout(size: Size, c: Constants = RELEASE) -> list[str]:
    """Name the tokens that stand for a picture of this size, before padding and limiting.

    The order matters: what only limiting makes thin is not padded.
    """
    size = limited_size(padded_size(size, c), c)
    columns, rows = crop_grid(size, c)
    crop = ["<patch_start>", *["<im_patch>"] * token_count(c.crop, c.patch), "<patch_end>"]
    lines = [crop * columns for _ in range(rows)]
    tokens = [token for line in lines[:-1] for token in [*line, "<patch_newline>"]]
    tokens += lines[-1] if lines else []
    return [*tokens, "<im_start>", *["<im_patch>"] * token_count(c.view, c.patch), "<im_end>"]


def token_count(side: int, patch: int) -> int:
    """Count the rows of one square picture: patches, halved (kernel 2), halved (kernel 3, pad 1).

    >>> token_count(728, 14), token_count(504, 14)
    (169, 81)
    """
    grid = side // patch
    halved = (grid - 2) // 2 + 1
    return ((halved + 2 - 3) // 2 + 1) ** 2


def padded_size(size: Size, c: Constants) -> Size:
    """Return the square that a thin strip is laid into; other sizes are kept."""
    strip = min(size) < c.thin and max(size) / min(size) > c.thin_ratio
    return (max(size), max(size)) if strip else size


def limited_size(size: Size, c: Constants = RELEASE) -> Size:
    """Return the size with its longer side brought down to ``longest``, truncating."""
    if max(size) <= c.longest:
        return size
    scale = c.longest / max(size)
    return int(size[0] * scale), int(size[1] * scale)


def window_side(size: Size, c: Constants) -> int:
    """Return the side of the square window that cuts crops, 0 for no crops."""
    long, short = max(size), min(size)
    if long <= c.view:
        return short if long / short > c.small_ratio else 0
    return min(short, c.crop) if long / short > c.strip_ratio else c.crop


def canvas_side(x: int, window: int, c: Constants) -> int:
    """Return one side of the canvas: whole windows, unless it is shorter than one."""
    if x < window:
        return x
    whole = x // window
    return window * (whole + 1 if x / window - whole > c.fraction else whole)


def crop_grid(size: Size, c: Constants) -> Size:
    """Return how many crops lie side by side and one above the other; (0, 0) for none."""
    window = window_side(size, c)
    if window == 0:
        return 0, 0
    columns, rows = (-(-canvas_side(x, window, c) // window) for x in size)
    return columns, rows


def cut(image: Image.Image, c: Constants) -> list[Image.Image]:
    """Cut the crops, row by row. What of a window lies outside the canvas is black."""
    window = window_side(image.size, c)
    columns, rows = crop_grid(image.size, c)
    if window:
        width, height = (canvas_side(x, window, c) for x in image.size)
        image = bilinear_8bit(image, (width, height))
    corners = [(x * window, y * window) for y in range(rows) for x in range(columns)]
    return [image.crop((x, y, x + window, y + window)) for x, y in corners]


def bilinear_8bit(image: Image.Image, size: Size) -> Image.Image:
    """Resize with Pillow."""
    return image.resize(size, Image.Resampling.BILINEAR)


def to_floats(image: Image.Image, side: int, c: Constants) -> Array:
    """Normalise, then resize in floats. Shape of the result: (3, side, side)."""
    pixels = np.asarray(image, dtype=np.float64) / 255  # (height, width, 3)
    planes = ((pixels - c.mean) / c.std).transpose(2, 0, 1)
    return resample.resize(planes, side, side, resample.triangle)
