import numpy as np
import pytest

from step3_hetero.resample import resize_matrix

SIZES = [(52, 36), (52, 8), (36, 52), (8, 32), (7, 7), (1, 5), (5, 1), (1080, 91), (31, 64)]
KINDS = ["bilinear", "bicubic"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size_in, size_out", SIZES)
def test_it_is_torchs_antialiased_resize(kind, size_in, size_out):
    torch = pytest.importorskip("torch")
    x = np.random.default_rng(size_in * 10_000 + size_out).standard_normal((size_in, 13))
    want = torch.nn.functional.interpolate(
        torch.from_numpy(x)[None, None],
        size=(size_out, 9),
        mode=kind,
        antialias=True,
        align_corners=False,
    )
    got = resize_matrix(size_in, size_out, kind) @ x @ resize_matrix(13, 9, kind).T
    np.testing.assert_allclose(got, want[0, 0].numpy(), rtol=0, atol=1e-12)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size_in, size_out", SIZES)
def test_a_flat_picture_stays_flat(kind, size_in, size_out):
    rows = resize_matrix(size_in, size_out, kind).sum(axis=1)
    np.testing.assert_allclose(rows, np.ones(size_out), rtol=0, atol=1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_an_equal_size_changes_nothing(kind):
    np.testing.assert_array_equal(resize_matrix(6, 6, kind), np.eye(6))


def test_shrinking_looks_at_every_sample():
    assert (resize_matrix(64, 4, "bilinear").sum(axis=0) > 0).all()


@pytest.mark.parametrize("size_in, size_out", [(0, 3), (3, 0), (-1, 3)])
def test_a_size_of_nothing_is_refused_by_value(size_in, size_out):
    with pytest.raises(ValueError, match=f"{size_in} samples to {size_out}"):
        resize_matrix(size_in, size_out, "bilinear")
