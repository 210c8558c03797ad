"""The handwritten digits: which are held out, how one is drawn, how training varies them."""

import hashlib
import math
from dataclasses import dataclass
from functools import cache

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from PIL import Image
from sklearn.datasets import load_digits
from torch import Tensor

from tiny.shape import RULES, VISION

SIDE = 8
INK = 16
"""The value of full ink in the data."""

Pixels = npt.NDArray[np.uint8]
PAIRS, PAIR_SEED = 1000, 1234


def digest(pixels: Pixels) -> str:
    """Return the SHA-256 of the 64 bytes of one 8x8 picture.

    >>> digest(np.zeros((8, 8), np.uint8))[:8]
    'f5a5fd42'
    """
    return hashlib.sha256(pixels.astype(np.uint8).tobytes()).hexdigest()


def side_of(digest_hex: str) -> str:
    """Say whether a picture is held out; equal pictures always land on one side.

    >>> side_of("0a"), side_of("1f")
    ('held-out', 'held-out')
    """
    return "held-out" if int(digest_hex, 16) % 10 < 2 else "train"


def on_dev_slice(digest_hex: str) -> bool:
    """Whether a training picture belongs to the slice that settings are chosen on."""
    return int(digest_hex, 16) % 10 in (2, 3)


@dataclass(frozen=True)
class Digits:
    """Pictures (n, 8, 8) of 0 to 16, their labels (n,), and their numbers in the data set (n,)."""

    pixels: Pixels
    labels: npt.NDArray[np.int64]
    indices: npt.NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.labels)

    def take(self, keep: list[bool]) -> "Digits":
        """Return the pictures marked to keep."""
        mask = np.array(keep)
        return Digits(self.pixels[mask], self.labels[mask], self.indices[mask])

    def digests(self) -> list[str]:
        """Return every picture's digest."""
        return [digest(p) for p in self.pixels]

    def pairs(self) -> npt.NDArray[np.int64]:
        """Return the fixed pairs (1000, 2) of positions among these pictures.

        Every picture stands in as many pairs as any other, give or take two: drawn independently,
        a picture that is misread may count three times over, and did.
        """
        rng = np.random.default_rng(PAIR_SEED)
        rounds = -(-PAIRS // len(self))
        sides = [np.concatenate([rng.permutation(len(self)) for _ in range(rounds)]) for _ in "ab"]
        return np.stack([side[:PAIRS] for side in sides], axis=1)


@cache
def all_digits() -> Digits:
    """Load the 1797 pictures of scikit-learn's load_digits."""
    data = load_digits()
    labels = data.target.astype(np.int64)
    return Digits(data.images.astype(np.uint8), labels, np.arange(len(labels)))


def split(*, dev: bool) -> tuple[Digits, Digits]:
    """Return (to train on, to measure on); with ``dev`` both come from the training side."""
    digits = all_digits()
    held = [side_of(d) == "held-out" for d in digits.digests()]
    if not dev:
        return digits.take([not h for h in held]), digits.take(held)
    train = digits.take([not h for h in held])
    tuned_on = [on_dev_slice(d) for d in train.digests()]
    return train.take([not t for t in tuned_on]), train.take(tuned_on)


def draw_digit(pixels: npt.NDArray[np.number]) -> Image.Image:
    """Draw one 8x8 digit, 0 (ground) to 16 (ink), as a grey picture: light ink on black.

    The side is the model's own, so that its processor only normalises. Bilinear, on 8-bit pixels,
    by Pillow.

    >>> draw_digit(np.full((8, 8), 16)).getpixel((0, 0))
    255
    """
    grey = np.rint(np.asarray(pixels, np.float64) * 255 / INK).astype(np.uint8)
    size = (RULES.image_size, RULES.image_size)
    return Image.fromarray(grey).resize(size, Image.Resampling.BILINEAR)


def drawn(digits: Digits) -> Tensor:
    """Draw every picture. Shapes: (n, 1, side, side), float32 in [0, 1]."""
    pictures = np.stack([np.asarray(draw_digit(p)) for p in digits.pixels])
    return torch.from_numpy(pictures)[:, None].float() / 255


def normalise(grey: Tensor) -> Tensor:
    """Return what the image processor returns for drawn digits.

    Shapes: grey (n, 1, side, side) in [0, 1] -> (n, 3, side, side).
    """
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in (RULES.image_mean, RULES.image_std))
    return (grey.expand(-1, VISION.num_channels, -1, -1) - mean) / std


def vary(grey: Tensor) -> Tensor:
    """Shift, turn, scale, slant and blemish each picture a little at random.

    Shapes: grey (n, 1, side, side) in [0, 1] -> the same. Up to 0.8 of the data's pixels in shift,
    12 degrees, a tenth in scale and in slant.
    """

    def within(most: float) -> Tensor:
        return (torch.rand(len(grey)) * 2 - 1) * most

    angle, scale, slant = within(math.radians(12)), 1 + within(0.1), within(0.1)
    cos, sin = torch.cos(angle) * scale, torch.sin(angle) * scale
    rows = [
        torch.stack([cos, slant - sin, within(0.2)], 1),
        torch.stack([sin, cos, within(0.2)], 1),
    ]
    where = F.affine_grid(torch.stack(rows, 1), list(grey.shape), align_corners=False)
    moved = F.grid_sample(grey, where, align_corners=False)
    spots = torch.randn(len(grey), 1, SIDE, SIDE) * 0.06
    blemish = F.interpolate(spots, size=grey.shape[-2:], mode="bilinear", align_corners=False)
    return (moved + blemish).clamp(0, 1)
