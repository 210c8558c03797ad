import io
import json
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from step3_hetero.errors import ConfigError, RequestError
from step3_hetero.model.image import (
    FeatureRows,
    ImageConfig,
    as_rgb,
    crop_plan,
    image_tokens,
    open_image,
    patch_tokens,
    preprocess,
)

RELEASE = ImageConfig()
WRITABLE = ["PNG", "JPEG", "WEBP", "BMP", "GIF"]


def small(**changes) -> ImageConfig:
    """A small processor whose floats are the pixels divided by 255."""
    sizes = {"image_size": 4, "crop_size": 4, "max_side": 64, "min_side": 3}
    return ImageConfig(image_mean=(0, 0, 0), image_std=(1, 1, 1), **sizes | changes)


def noise(width, height, seed=0) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)
    return Image.fromarray(pixels)


def encoded(image, kind="PNG", **options) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def png_claiming(width, height) -> bytes:
    """A PNG file of a few bytes whose header claims any size."""

    def chunk(kind, data):
        check = zlib.crc32(kind + data)
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", check)

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    body = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + body


# Counts


@pytest.mark.parametrize(
    "size, crops, tokens", [((728, 728), 0, 171), ((1000, 600), 2, 337), ((1920, 1080), 8, 836)]
)
def test_the_worked_token_counts_come_out(size, crops, tokens):
    plan = crop_plan(size, RELEASE)
    assert plan.columns * plan.rows == crops
    assert image_tokens(169, 81, plan) == tokens


def test_the_release_has_169_rows_for_a_view_and_81_for_a_crop():
    assert FeatureRows.of(RELEASE, patch_size=14, stride=2) == FeatureRows(view=169, crop=81)


def test_projector_stride_1_keeps_the_halved_grid():
    assert patch_tokens(728, 14, 1) == 26 * 26


def test_a_picture_under_two_patches_is_refused_with_its_sizes():
    with pytest.raises(ConfigError, match="image_size 27 with patch_size 14"):
        patch_tokens(27, 14, 2)


# Where the picture is cut


@pytest.mark.parametrize(
    "size, window",
    [
        ((728, 728), 0),
        ((728, 486), 0),
        ((485, 728), 485),
        ((600, 400), 0),
        ((729, 729), 504),
        ((1000, 250), 504),
        ((249, 1000), 249),
        ((3000, 600), 504),
    ],
)
def test_the_window_follows_size_and_ratio(size, window):
    assert crop_plan(size, RELEASE).window == window


@pytest.mark.parametrize(
    "size, canvas",
    [
        ((1000, 600), (1008, 504)),
        ((1000, 605), (1008, 1008)),
        ((1000, 300), (1008, 300)),
        ((1920, 1080), (2016, 1008)),
    ],
)
def test_the_canvas_is_whole_windows_unless_it_is_shorter_than_one(size, canvas):
    assert crop_plan(size, RELEASE).canvas == canvas


def test_a_fraction_of_a_fifth_is_judged_in_the_published_codes_floats():
    config = small(crop_size=5)
    assert crop_plan((6, 6), config).canvas == (5, 5)  # 1.2 - 1 is below 0.2
    assert crop_plan((11, 11), config).canvas == (15, 15)  # 2.2 - 2 is above


def test_only_a_thin_and_long_picture_is_padded():
    assert crop_plan((129, 31), RELEASE).padded == (129, 129)
    assert crop_plan((31, 129), RELEASE).padded == (129, 129)
    assert crop_plan((124, 31), RELEASE).padded == (124, 31)
    assert crop_plan((129, 32), RELEASE).padded == (129, 32)


def test_a_longer_side_is_scaled_to_3024_and_the_other_truncated():
    assert crop_plan((4000, 1001), RELEASE).size == (3024, 756)
    assert crop_plan((1001, 4000), RELEASE).size == (756, 3024)
    assert crop_plan((3024, 3024), RELEASE).size == (3024, 3024)


def test_a_picture_that_becomes_thin_by_scaling_is_not_padded_again():
    plan = crop_plan((30240, 300), ImageConfig(max_pixels=10**8))
    assert (plan.padded, plan.size, plan.window) == ((30240, 300), (3024, 30), 30)


def test_line_ends_follow_every_row_of_crops_but_the_last():
    plan = crop_plan((8, 12), small())
    assert (plan.columns, plan.rows) == (2, 3)
    assert plan.newline_after == (False, True, False, True, False, False)


def test_a_single_column_ends_its_line_after_each_crop_but_the_last():
    assert crop_plan((4, 12), small()).newline_after == (True, True, False)


def test_more_crops_than_the_limit_are_refused_with_both_numbers():
    with pytest.raises(RequestError, match=r"30240x32.* 1008 crops, limit 128"):
        crop_plan((30240, 32), RELEASE)


def test_a_picture_of_which_scaling_leaves_nothing_is_refused():
    with pytest.raises(RequestError, match="100000x32: too thin"):
        crop_plan((100_000, 32), RELEASE)


# Pixels


def test_view_and_crops_have_the_configs_shapes_in_float32():
    views = preprocess(noise(9, 6), small(image_size=8))
    assert (views.view.shape, views.view.dtype) == ((3, 8, 8), np.float32)
    assert (views.crops.shape, views.crops.dtype) == ((6, 3, 4, 4), np.float32)
    none = preprocess(noise(8, 8), small(image_size=8))
    assert (none.crops.shape, none.newline_after) == ((0, 3, 4, 4), ())


def test_crops_run_row_by_row():
    pixels = np.zeros((8, 8, 3), np.uint8)
    pixels[:4, :4], pixels[:4, 4:], pixels[4:, :4], pixels[4:, 4:] = 51, 102, 153, 204
    views = preprocess(Image.fromarray(pixels), small())
    np.testing.assert_allclose(views.crops[:, 0, 0, 0], [0.2, 0.4, 0.6, 0.8], rtol=1e-6)
    np.testing.assert_array_equal(views.crops.min((1, 2, 3)), views.crops.max((1, 2, 3)))


def test_channels_are_red_green_blue_and_normalised_one_by_one():
    config = ImageConfig(
        image_mean=(0.0, 0.5, 1.0), image_std=(1.0, 0.5, 0.25), image_size=4, crop_size=4
    )
    views = preprocess(Image.new("RGB", (4, 4), (255, 0, 51)), config)
    np.testing.assert_allclose(views.view[:, 0, 0], [1.0, -1.0, -3.2], rtol=1e-6)


def test_a_strip_lies_top_left_on_black():
    view = preprocess(Image.new("RGB", (16, 2), "white"), small(image_size=16)).view
    assert (view[:, :2] == 1).all() and (view[:, 2:] == 0).all()


def test_what_a_window_holds_beyond_the_canvas_is_black():
    crops = preprocess(Image.new("RGB", (8, 3), "white"), small()).crops
    assert len(crops) == 2
    assert (crops[:, :, :3] == 1).all() and (crops[:, :, 3:] == 0).all()


def test_a_picture_over_the_limit_is_scaled_by_pillow_in_8_bits():
    image = noise(33, 33)
    view = preprocess(image, small(max_side=16, image_size=16)).view
    want = np.asarray(image.resize((16, 16), Image.Resampling.BILINEAR))
    np.testing.assert_allclose(view.transpose(1, 2, 0) * 255, want, atol=1e-4)


def test_the_crop_canvas_is_made_by_pillow_in_8_bits():
    image = noise(9, 9)
    crops = preprocess(image, small()).crops  # 9 / 4 = 2.25: three windows
    want = np.asarray(image.resize((12, 12), Image.Resampling.BILINEAR))
    got = crops.reshape(3, 3, 3, 4, 4).transpose(0, 3, 1, 4, 2).reshape(12, 12, 3)
    np.testing.assert_allclose(got * 255, want, atol=1e-4)


@pytest.mark.parametrize("width, height", [(57, 31), (5, 7), (61, 64), (16, 13), (13, 16)])
def test_the_view_is_normalised_then_resized_in_floats_as_torch_does(width, height):
    torch = pytest.importorskip("torch")
    image, config = noise(width, height), ImageConfig(image_size=16, crop_size=64)
    x = torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 255
    mean, std = (torch.tensor(v)[:, None, None] for v in (config.image_mean, config.image_std))
    want = torch.nn.functional.interpolate(
        ((x - mean) / std)[None], size=(16, 16), mode="bilinear", antialias=True
    )
    view = preprocess(image, config).view
    np.testing.assert_allclose(view, want[0].numpy(), rtol=0, atol=1e-5)


def test_a_window_of_another_size_than_the_crop_is_resized_in_floats_as_torch_does():
    torch = pytest.importorskip("torch")
    image, config = noise(14, 7), small(image_size=16, crop_size=5)
    crops = preprocess(image, config).crops  # twice as long as high: windows of 7
    x = torch.from_numpy(np.array(image)).permute(2, 0, 1).float()[None] / 255
    for number, part in enumerate((x[..., :7], x[..., 7:])):
        want = torch.nn.functional.interpolate(part, size=(5, 5), mode="bilinear", antialias=True)
        np.testing.assert_allclose(crops[number], want[0].numpy(), rtol=0, atol=1e-5)


# Pixel formats


def test_transparency_is_dropped_not_blended():
    image = Image.new("RGBA", (4, 4), (255, 0, 0, 0))
    assert as_rgb(image).getpixel((0, 0)) == (255, 0, 0)


def test_a_transparent_palette_gives_its_colours_without_a_warning():
    image = noise(8, 8).quantize(4)
    image.info["transparency"] = bytes([0, 128, 255, 255])
    again = open_image(encoded(image))
    assert again.mode == "RGB"
    np.testing.assert_array_equal(
        np.asarray(again), np.asarray(noise(8, 8).quantize(4).convert("RGB"))
    )


def test_grey_of_16_bits_is_refused_rather_than_clipped():
    image = Image.fromarray(np.full((4, 4), 40_000, np.uint16))
    with pytest.raises(RequestError, match=r"grey\.png: pixel format I;16"):
        open_image(encoded(image), name="grey.png")


# Files that strangers send


@pytest.mark.parametrize("kind", WRITABLE)
def test_each_known_format_opens_from_bytes_and_from_a_path(kind, tmp_path):
    data = encoded(Image.new("RGB", (16, 8), (200, 100, 50)), kind)
    (tmp_path / "picture").write_bytes(data)
    for source in (data, tmp_path / "picture", str(tmp_path / "picture")):
        image = open_image(source)
        assert (image.size, image.mode) == ((16, 8), "RGB")
        np.testing.assert_allclose(np.asarray(image)[4, 8], [200, 100, 50], atol=6)


def test_of_an_animation_the_first_frame_counts():
    frames = [Image.new("RGB", (4, 4), colour) for colour in ("red", "blue")]
    data = encoded(frames[0], "GIF", save_all=True, append_images=frames[1:])
    assert open_image(data).getpixel((0, 0)) == (255, 0, 0)


def test_an_orientation_noted_in_exif_is_not_applied():
    exif = Image.Exif()
    exif[0x0112] = 6  # rotate by a quarter
    assert open_image(encoded(noise(8, 4), "JPEG", exif=exif)).size == (8, 4)


@pytest.mark.parametrize(
    "data", [b"", b"hello", b"\x89PNG\r\n\x1a\n", encoded(noise(4, 4), "TIFF")]
)
def test_what_is_no_picture_of_a_known_format_is_refused_with_the_known_ones(data):
    with pytest.raises(RequestError, match=r"avatar: no picture .* PNG, JPEG, WEBP, BMP, GIF"):
        open_image(data, name="avatar")


@pytest.mark.parametrize("kind", WRITABLE)
def test_a_damaged_file_is_refused_or_read_but_never_anything_else(kind):
    data, rng = encoded(noise(24, 24), kind), np.random.default_rng(zlib.crc32(kind.encode()))
    for _ in range(60):
        broken = bytearray(data[: rng.integers(1, len(data))])
        broken[rng.integers(len(broken))] ^= int(rng.integers(1, 256))
        try:
            assert open_image(bytes(broken), max_pixels=10_000).mode == "RGB"
        except RequestError as refusal:
            assert str(refusal).startswith(f"image of {len(broken)} bytes: ")


def test_a_truncated_file_is_refused():
    data = encoded(noise(64, 64))
    with pytest.raises(RequestError, match=r"cut\.png: cannot be read"):
        open_image(data[: len(data) // 2], name="cut.png")


@pytest.mark.parametrize(
    "side", [9_000, 10_000, 20_000, 2**31 - 1]
)  # Pillow: silent, warns, raises
def test_a_decompression_bomb_is_refused_by_its_header_with_the_limit(side):
    with pytest.raises(RequestError, match=f"limit {1 << 26} pixels"):
        open_image(png_claiming(side, side))


def test_the_limit_on_pixels_is_the_callers_and_names_the_size():
    data = encoded(noise(20, 10))
    assert open_image(data, max_pixels=200).size == (20, 10)
    with pytest.raises(RequestError, match="20x10 is too large, limit 199 pixels"):
        open_image(data, max_pixels=199)


def test_a_picture_without_pixels_is_refused():
    with pytest.raises(RequestError):
        open_image(png_claiming(0, 5))
    with pytest.raises(RequestError, match="0x5 holds no pixels"):
        preprocess(Image.new("RGB", (0, 5)), RELEASE)


def test_a_missing_file_and_a_folder_are_refused_by_name(tmp_path):
    for path in (tmp_path / "none.png", tmp_path):
        with pytest.raises(RequestError, match=f"{path.name}: cannot be read"):
            open_image(path)


# preprocessor_config.json


def written(folder, **keys):
    (folder / "preprocessor_config.json").write_text(json.dumps(keys, indent=1))
    return folder


def test_without_a_file_the_releases_constants_hold(tmp_path):
    assert ImageConfig.read(tmp_path) == RELEASE
    assert ImageConfig.read(tmp_path, image_size=32) == ImageConfig(image_size=32)


def test_a_file_overrides_the_constants_and_the_vision_configs_size(tmp_path):
    written(tmp_path, image_size=64, image_std=[1, 2, 3], window_ratio=2, processor_class="X")
    want = ImageConfig(image_size=64, image_std=(1.0, 2.0, 3.0), window_ratio=2.0)
    assert ImageConfig.read(tmp_path, image_size=32) == want


def test_a_file_silent_on_the_size_leaves_the_vision_configs(tmp_path):
    assert ImageConfig.read(written(tmp_path, crop_size=24), 32) == ImageConfig(
        image_size=32, crop_size=24
    )


@pytest.mark.parametrize(
    "key, value",
    [
        ("image_size", "728"),
        ("image_size", 0),
        ("image_size", True),
        ("crop_size", 504.5),
        ("max_ratio", -1),
        ("window_ratio", [1.5]),
        ("image_mean", 0.5),
        ("image_mean", [0.5, 0.5]),
        ("image_mean", [0.5, 0.5, "a"]),
        ("image_mean", [0.5, 0.5, float("nan")]),
        ("image_std", [1, 1, 0]),
        pytest.param("max_ratio", 10**400, id="max_ratio-huge"),
        ("image_mean", [10**400, 1, 1]),
        ("image_mean", [-(10**400), 1, 1]),
        ("image_std", [1, 10**400, 1]),
    ],
)
def test_a_wrong_value_is_refused_with_file_line_key_and_value(tmp_path, key, value):
    written(tmp_path, first=1, **{key: value})
    with pytest.raises(ConfigError) as refusal:
        ImageConfig.read(tmp_path)
    assert f"preprocessor_config.json:3: {key}: " in str(refusal.value)
    assert repr(value) in str(refusal.value)


def test_a_file_that_is_no_json_is_refused_with_its_line(tmp_path):
    (tmp_path / "preprocessor_config.json").write_text('{"image_size": 1,\n nonsense}')
    with pytest.raises(ConfigError, match=r"preprocessor_config.json:2: not JSON"):
        ImageConfig.read(tmp_path)
