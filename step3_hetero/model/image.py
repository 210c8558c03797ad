"""The image processor: one picture becomes a view of the whole and, if it is large, crops.

::

    picture -> padded, limited (8 bits) --+-> normalised, resized in floats -> view
                                          +-> canvas (8 bits) -> windows -> normalised, resized
                                                                 in floats -> crops

Every number is a constant of the release, kept in `ImageConfig`; a small model has smaller ones.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image, UnidentifiedImageError

from step3_hetero.errors import ConfigError, RequestError
from step3_hetero.model.json_section import Section, is_finite
from step3_hetero.resample import resize_matrix

Float32 = npt.NDArray[np.float32]
Size = tuple[int, int]
"""Width and height, in Pillow's order."""
Channels = tuple[float, float, float]

FILE = "preprocessor_config.json"

FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF")
"""Accepted file formats; the first frame counts where a file holds several."""

EIGHT_BIT_MODES = ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr")
"""Pixel formats that convert to RGB; 16-bit grey is refused, it would be clipped to white."""

MAX_PIXELS = 1 << 26


@dataclass(frozen=True, slots=True)
class ImageConfig:
    """Constants of the image processor. The last two are limits of this program, not of the model.

    A picture whose sides are 30,000 and 32 passes any limit on pixels, yet the rules below would
    cut it into a thousand crops of 3 MB each: hence ``max_crops``. Within ``max_side`` no picture
    needs more than 95.
    """

    image_mean: Channels = (0.48145466, 0.4578275, 0.40821073)
    image_std: Channels = (0.26862954, 0.26130258, 0.27577711)
    image_size: int = 728  # side of the view; a longer side calls for crops
    crop_size: int = 504  # side of a crop
    max_side: int = 3024  # a longer side is scaled down to this
    min_side: int = 32  # a shorter side is padded if the ratio also exceeds max_ratio
    max_ratio: float = 4.0  # long / short beyond which a picture is a strip
    window_ratio: float = 1.5  # long / short beyond which even a small picture is cut
    crop_round_up: float = 0.2  # fraction of a window that deserves a window of its own
    max_pixels: int = MAX_PIXELS
    max_crops: int = 128

    @classmethod
    def read(cls, folder: Path, image_size: int | None = None) -> ImageConfig:
        """Read ``preprocessor_config.json``; what it does not state keeps the release's value.

        ``image_size``, the vision config's, counts where the file does not state one. Keys of
        other programs are ignored.

        Raises:
            ConfigError: the file is no JSON object, or a value is of the wrong type or range.
        """
        path = folder / FILE
        stated = Section.read(path) if path.exists() else Section(path, {})
        base = cls() if image_size is None else cls(image_size=image_size)
        return cls(
            image_mean=_three(stated, "image_mean", base.image_mean, above=-math.inf),
            image_std=_three(stated, "image_std", base.image_std, above=0.0),
            image_size=stated.integer("image_size", default=base.image_size),
            crop_size=stated.integer("crop_size", default=base.crop_size),
            max_side=stated.integer("max_side", default=base.max_side),
            min_side=stated.integer("min_side", default=base.min_side),
            max_ratio=stated.positive("max_ratio", default=base.max_ratio),
            window_ratio=stated.positive("window_ratio", default=base.window_ratio),
            crop_round_up=stated.positive("crop_round_up", default=base.crop_round_up),
            max_pixels=stated.integer("max_pixels", default=base.max_pixels),
            max_crops=stated.integer("max_crops", default=base.max_crops),
        )


def _three(stated: Section, key: str, default: Channels, above: float) -> Channels:
    """Read one number for each of red, green and blue."""
    value = stated.get(key)
    if value is None:
        return default
    if not isinstance(value, list) or len(value) != 3 or not all(map(is_finite, value)):
        raise stated.error(key, f"expected three numbers, found {value!r}")
    if not all(above < x for x in value):
        raise stated.error(key, f"expected three numbers above {above:g}, found {value!r}")
    return float(value[0]), float(value[1]), float(value[2])


def open_image(
    source: str | Path | bytes, *, name: str | None = None, max_pixels: int = MAX_PIXELS
) -> Image.Image:
    """Read a picture from a file or from its bytes, as RGB.

    ``name`` is what messages call it; a path is its own name. The size is checked before anything
    is decoded. The pixels are taken as stored: an orientation noted in EXIF is not applied.

    Raises:
        RequestError: the file is missing, broken, empty, too large or of another format.
    """
    file = BytesIO(source) if isinstance(source, bytes) else source
    name = name or (f"image of {len(source)} bytes" if isinstance(source, bytes) else str(source))
    try:
        with Image.open(file, formats=FORMATS) as image:
            _check_size(image.size, name, max_pixels)
            return as_rgb(image, name)
    except RequestError:
        raise
    except UnidentifiedImageError as cause:
        known = ", ".join(FORMATS)
        raise RequestError(f"{name}: no picture of a known format; known: {known}") from cause
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as cause:
        raise RequestError(f"{name}: too large, limit {max_pixels} pixels: {cause}") from cause
    except OSError as cause:
        raise RequestError(f"{name}: cannot be read: {cause.strerror or cause}") from cause
    except Exception as cause:  # on damaged bytes Pillow may raise almost anything
        raise RequestError(f"{name}: cannot be read: {cause}") from cause


def _check_size(size: Size, name: str, max_pixels: int) -> None:
    width, height = size
    if min(size) < 1:
        raise RequestError(f"{name}: {width}x{height} holds no pixels")
    if width * height > max_pixels:
        raise RequestError(f"{name}: {width}x{height} is too large, limit {max_pixels} pixels")


def as_rgb(image: Image.Image, name: str = "image") -> Image.Image:
    """Return the picture as 8-bit RGB; transparency is dropped, not blended with a background.

    Raises:
        RequestError: its pixels have more than 8 bits a channel and would be clipped.
    """
    if image.mode not in EIGHT_BIT_MODES:
        known = ", ".join(EIGHT_BIT_MODES)
        raise RequestError(f"{name}: pixel format {image.mode} is not of 8 bits; known: {known}")
    if image.mode == "P":  # Pillow warns when a palette with transparency goes to RGB directly
        image = image.convert("RGBA")
    return image.convert("RGB")


@dataclass(frozen=True, slots=True)
class CropPlan:
    """How a picture of some size is padded, limited and cut; no pixel is touched."""

    padded: Size  # the square that a strip is laid into, else the picture's own size
    size: Size  # what the view is made of
    window: int = 0  # side of the square that is one crop, 0 without crops
    canvas: Size = (0, 0)  # what the crops are cut from

    @property
    def columns(self) -> int:
        """Return how many crops lie side by side."""
        return -(-self.canvas[0] // self.window) if self.window else 0

    @property
    def rows(self) -> int:
        """Return how many crops lie one above the other."""
        return -(-self.canvas[1] // self.window) if self.window else 0

    @property
    def boxes(self) -> list[tuple[int, int, int, int]]:
        """Return left, top, right and bottom of each crop on the canvas, row by row.

        A canvas is whole windows, so the published step that shifts a last window back never
        moves one. Along an axis shorter than a window the box reaches beyond the canvas.
        """
        w = self.window
        corners = [(x * w, y * w) for y in range(self.rows) for x in range(self.columns)]
        return [(x, y, x + w, y + w) for x, y in corners]

    @property
    def newline_after(self) -> tuple[bool, ...]:
        """Say of each crop whether it ends a row that is not the last."""
        count = self.rows * self.columns
        return tuple((i + 1) % self.columns == 0 and i + 1 < count for i in range(count))


def crop_plan(size: Size, config: ImageConfig) -> CropPlan:
    """Plan the crops of a picture of this size, before padding and limiting.

    Raises:
        RequestError: the size holds no pixels, is too thin, or calls for too many crops.
    """
    _check_size(size, "image", config.max_pixels)
    padded = _padded(size, config)
    _check_size(padded, "image, padded to a square,", config.max_pixels)
    limited = _limited(padded, config)
    if min(limited) < 1:
        raise RequestError(
            f"image {size[0]}x{size[1]}: too thin, at {config.max_side} pixels nothing is left"
        )
    window = _window(limited, config)
    if window == 0:
        return CropPlan(padded, limited)
    canvas = (_whole(limited[0], window, config), _whole(limited[1], window, config))
    plan = CropPlan(padded, limited, window, canvas)
    if plan.rows * plan.columns > config.max_crops:
        raise RequestError(
            f"image {size[0]}x{size[1]}: cut into {plan.rows * plan.columns} crops, "
            f"limit {config.max_crops}; crop or scale it first"
        )
    return plan


def _padded(size: Size, config: ImageConfig) -> Size:
    long, short = max(size), min(size)
    strip = short < config.min_side and long / short > config.max_ratio
    return (long, long) if strip else size


def _limited(size: Size, config: ImageConfig) -> Size:
    if max(size) <= config.max_side:
        return size
    scale = config.max_side / max(size)
    return int(size[0] * scale), int(size[1] * scale)


def _window(size: Size, config: ImageConfig) -> int:
    long, short = max(size), min(size)
    if long <= config.image_size:
        return short if long / short > config.window_ratio else 0
    return min(short, config.crop_size) if long / short > config.max_ratio else config.crop_size


def _whole(length: int, window: int, config: ImageConfig) -> int:
    """Return the canvas's length along one axis: whole windows, unless it is shorter than one.

    The fraction is that of the published code's floats, where 2.2 - 2 exceeds 0.2 and 1.2 - 1
    does not.
    """
    if length < window:
        return length
    windows = length // window
    return window * (windows + (length / window - windows > config.crop_round_up))


@dataclass(frozen=True, slots=True, eq=False)
class ImageViews:
    """What the vision stage is given of one picture.

    Shapes: view (3, image_size, image_size), crops (n, 3, crop_size, crop_size), both float32;
    newline_after has n entries. Crops run row by row.
    """

    view: Float32
    crops: Float32
    newline_after: tuple[bool, ...]


def preprocess(image: Image.Image, config: ImageConfig) -> ImageViews:
    """Make the view and the crops of a picture.

    What a crop holds beyond the canvas, and a strip beyond the picture, is black.

    Raises:
        RequestError: the picture holds no pixels, is too thin, or calls for too many crops.
    """
    plan = crop_plan(image.size, config)
    image = as_rgb(image)
    if plan.padded != image.size:
        square = Image.new("RGB", plan.padded)
        square.paste(image, (0, 0))
        image = square
    image = image.resize(plan.size, Image.Resampling.BILINEAR)
    canvas = image.resize(plan.canvas, Image.Resampling.BILINEAR) if plan.window else image
    windows = [np.asarray(canvas.crop(box)) for box in plan.boxes]
    crops = np.zeros((0, 3, config.crop_size, config.crop_size), np.float32)
    if windows:
        crops = _to_floats(np.stack(windows), config.crop_size, config)
    view = _to_floats(np.asarray(image)[None], config.image_size, config)[0]
    return ImageViews(view, crops, plan.newline_after)


def _to_floats(pixels: npt.NDArray[np.uint8], side: int, config: ImageConfig) -> Float32:
    """Bring pixels to [0, 1], normalise them, and only then resize, with antialiasing.

    Shapes: pixels (n, height, width, 3) -> (n, 3, side, side).
    """
    unit = pixels.astype(np.float32) / np.float32(255)
    mean, std = (np.array(x, np.float32) for x in (config.image_mean, config.image_std))
    normal = (unit - mean) / std
    planes = np.ascontiguousarray(normal.transpose(0, 3, 1, 2))  # (n, 3, height, width)
    height, width = planes.shape[-2:]
    if width != side:
        planes = planes @ resize_matrix(width, side, "bilinear").T.astype(np.float32)
    if height != side:
        planes = resize_matrix(height, side, "bilinear").astype(np.float32) @ planes
    return planes


@dataclass(frozen=True, slots=True)
class FeatureRows:
    """How many feature rows the vision stage makes of a view, and of a crop."""

    view: int
    crop: int

    @classmethod
    def of(cls, config: ImageConfig, patch_size: int, stride: int) -> FeatureRows:
        """Count them for a model's image processor, patch size and projector stride."""
        return cls(
            patch_tokens(config.image_size, patch_size, stride),
            patch_tokens(config.crop_size, patch_size, stride),
        )


def patch_tokens(image_size: int, patch_size: int, stride: int) -> int:
    """Count the feature rows of one square picture: patches, then the two convolutions.

    The first has kernel 2 and stride 2; the second kernel 3, the projector's stride and padding 1.

    >>> patch_tokens(728, 14, 2), patch_tokens(504, 14, 2)
    (169, 81)

    Raises:
        ConfigError: the picture is under two patches wide, which the first convolution needs.
    """
    grid = image_size // patch_size
    if grid < 2:
        raise ConfigError(
            f"image_size {image_size} with patch_size {patch_size}: {grid} patches a side, need 2"
        )
    halved = (grid - 2) // 2 + 1
    side = (halved + 2 - 3) // stride + 1
    return side * side


def image_tokens(n_view_tokens: int, n_crop_tokens: int, views: ImageViews | CropPlan) -> int:
    """Count the tokens that stand for one picture: rows, their brackets and the line ends."""
    newlines = views.newline_after
    return len(newlines) * (n_crop_tokens + 2) + sum(newlines) + n_view_tokens + 2
