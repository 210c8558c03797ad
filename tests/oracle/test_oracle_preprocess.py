"""Picture sizes to crops and tokens, and pixels to floats."""

from itertools import groupby

import numpy as np
import pytest
from PIL import Image

from oracle import resample
from oracle.preprocess import Constants, layout, limited_size, preprocess

SMALL = Constants(view=32, crop=24, patch=4, longest=96, thin=6, mean=(0.0,) * 3, std=(1.0,) * 3)


def picture(width, height):
    pixels = np.random.default_rng(width).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def planes(image):
    return np.asarray(image, dtype=np.float64).transpose(2, 0, 1) / 255


@pytest.mark.parametrize(
    ("size", "columns", "rows", "tokens"),
    [
        ((728, 728), 0, 0, 171),
        ((1000, 600), 2, 1, 337),
        ((1920, 1080), 4, 2, 836),
        ((1080, 1920), 2, 4, 8 * 83 + 3 + 171),
        ((3024, 3024), 6, 6, 36 * 83 + 5 + 171),
        ((4000, 2000), 6, 3, 18 * 83 + 2 + 171),  # brought down to 3024 x 1512
        ((600, 400), 0, 0, 171),  # 1.5 exactly: not cut
        ((601, 400), 2, 1, 2 * 83 + 171),  # window 400; half of a second one is filled
        ((400, 601), 1, 2, 2 * 83 + 1 + 171),
        ((729, 729), 2, 2, 4 * 83 + 1 + 171),
        ((1108, 1109), 2, 3, 6 * 83 + 2 + 171),  # 2.198 and 2.2004 windows
        ((1000, 400), 2, 1, 2 * 83 + 171),  # lower than a window
        ((1400, 300), 5, 1, 5 * 83 + 171),  # a strip: window 300
        ((3000, 700), 6, 2, 12 * 83 + 1 + 171),  # a strip higher than 504
        ((100, 20), 0, 0, 171),  # thin: padded to 100 x 100
        ((1000, 20), 2, 2, 4 * 83 + 1 + 171),  # thin: padded to 1000 x 1000
        ((20, 1000), 2, 2, 4 * 83 + 1 + 171),
        ((80, 20), 4, 1, 4 * 83 + 171),  # 4 exactly: not padded
        ((200, 32), 7, 1, 7 * 83 + 171),  # 32 is not under 32; 6.25 windows of 32
    ],
    ids=str,
)
def test_release_cuts_and_counts(size, columns, rows, tokens):
    names = layout(size)

    assert len(names) == tokens
    assert names.count("<patch_start>") == columns * rows
    assert names.count("<patch_newline>") == max(rows - 1, 0)


def test_layout_puts_crops_first_and_a_newline_between_rows():
    runs = [(name, len(list(run))) for name, run in groupby(layout((1920, 1080)))]
    crop = [("<patch_start>", 1), ("<im_patch>", 81), ("<patch_end>", 1)]
    view = [("<im_start>", 1), ("<im_patch>", 169), ("<im_end>", 1)]

    assert runs == crop * 4 + [("<patch_newline>", 1)] + crop * 4 + view


def test_small_constants_give_small_counts():
    names = layout((48, 48), SMALL)

    assert names.count("<im_patch>") == 4 * 4 + 4
    assert len(names) == 4 * (4 + 2) + 1 + 4 + 2


def test_shapes_and_layout_fit_together():
    got = preprocess(picture(60, 50), SMALL)

    assert got.view.shape == (3, 32, 32)
    assert got.crops.shape == (6, 3, 24, 24)
    assert got.layout == layout((60, 50), SMALL)


def test_picture_of_whole_windows_is_cut_without_resizing():
    image = picture(72, 48)
    got = preprocess(image, SMALL).crops
    whole = planes(image)

    corners = [(0, 0), (0, 24), (0, 48), (24, 0), (24, 24), (24, 48)]  # top, left; row by row
    want = [whole[:, y : y + 24, x : x + 24] for y, x in corners]
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-15)


def test_canvas_of_crops_is_resized_on_8_bit_pixels():
    image = picture(60, 50)  # 2.5 and 2.08 windows of 24
    got = preprocess(image, SMALL).crops
    canvas = planes(image.resize((72, 48), Image.Resampling.BILINEAR))

    np.testing.assert_allclose(got[4], canvas[:, 24:, 24:48], rtol=0, atol=1e-15)


def test_window_beyond_the_canvas_is_black():
    got = preprocess(picture(60, 20), SMALL).crops  # 72 x 20 under windows of 24

    assert got.shape == (3, 3, 24, 24)
    assert (got[:, :, 20:] == 0).all()
    assert (got[:, :, :20] > 0).mean() > 0.9


def test_view_is_the_whole_picture_resized_in_floats():
    image = picture(60, 20)
    want = resample.resize(planes(image), 32, 32, resample.triangle)

    np.testing.assert_allclose(preprocess(image, SMALL).view, want, rtol=0, atol=1e-14)


def test_pixels_are_normalised_by_channel():
    got = preprocess(Image.new("RGB", (728, 728), (128, 0, 255))).view[:, 300, 300]

    want = [
        (128 / 255 - 0.48145466) / 0.26862954,
        (0 - 0.4578275) / 0.26130258,
        (1 - 0.40821073) / 0.27577711,
    ]
    np.testing.assert_allclose(got, want, rtol=1e-14)


def test_thin_picture_lies_top_left_in_a_black_square():
    image = picture(32, 5)
    got = preprocess(image, SMALL)

    assert len(got.crops) == 0
    np.testing.assert_allclose(got.view[:, :5], planes(image), rtol=0, atol=1e-15)
    assert (got.view[:, 5:] == 0).all()


def test_large_picture_is_brought_down_on_8_bit_pixels_before_all_else():
    image = picture(150, 200)
    small = image.resize((72, 96), Image.Resampling.BILINEAR)
    got, want = (preprocess(i, SMALL) for i in (image, small))

    np.testing.assert_array_equal(got.view, want.view)
    np.testing.assert_array_equal(got.crops, want.crops)


def test_longer_side_is_truncated_like_the_shorter():
    assert limited_size((6048, 1001)) == (3024, 500)
    # In floats 4236 * (3024 / 4236) lies just under 3024; the published processor truncates it.
    assert limited_size((4236, 4236)) == (3023, 3023)


def test_grey_and_transparent_pictures_become_rgb():
    grey = preprocess(Image.new("L", (32, 32), 51), SMALL).view
    clear = preprocess(Image.new("RGBA", (32, 32), (51, 51, 51, 0)), SMALL).view

    np.testing.assert_allclose(grey, 0.2, rtol=1e-14)
    np.testing.assert_array_equal(grey, clear)


@pytest.mark.parametrize("size", [(9, 14), (31, 8), (20, 40), (13, 7), (60, 60)], ids=str)
@pytest.mark.parametrize(
    ("kernel", "pillow"),
    [
        (resample.triangle, Image.Resampling.BILINEAR),
        (resample.cubic, Image.Resampling.BICUBIC),
    ],
    ids=["bilinear", "bicubic"],
)
def test_resize_agrees_with_pillow_on_floats(kernel, pillow, size):
    plane = np.random.default_rng(1).random((20, 31)).astype(np.float32)
    height, width = size

    got = resample.resize(plane.astype(np.float64), height, width, kernel)
    want = Image.fromarray(plane).resize((width, height), pillow)

    np.testing.assert_allclose(got, np.asarray(want), rtol=0, atol=1e-6)
