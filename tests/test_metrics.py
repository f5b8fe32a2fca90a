"""Table 3's metrics against the public packages' own numbers.

golden/metrics.json says which versions gave them, and how they were run.
"""

import base64
import io
import math
import os
import warnings
import zlib

import numpy as np
import pytest
import torch
from PIL import Image
from weights import golden

from parts import diversity
from parts.diversity import LPIPS, entropy_1d, entropy_2d, fsim, psnr, rmse, ssim

GOLD = golden("metrics.json")
OF_TWO = (rmse, psnr, ssim, fsim)


def lpips(a, b, net):
    return net.distance(net.features(a), net.features(b))


@pytest.fixture(scope="module")
def photo():
    """A natural image that comes with matplotlib (public domain)."""
    from matplotlib.cbook import get_sample_data

    image = np.array(Image.open(get_sample_data("grace_hopper.jpg")).convert("RGB"))
    # another JPEG decoder's pixels would not be those of the golden numbers
    assert zlib.crc32(image.tobytes()) == GOLD["source"]["crc32"]
    return image


def pair(photo, name):
    """The pairs' rules stand beside their numbers in metrics.json."""
    if name == "photo 512x512":
        return photo[0:512], photo[88:600]
    if name == "odd 131x97":
        return photo[100:231, 60:157], photo[200:331, 160:257]
    if name == "even-odd 64x65":
        square = photo[50:114, 200:265]
        return square, square[:, ::-1]
    if name == "wide 50x120":
        wide = photo[300:350, 100:220]
        noisy = wide + np.random.RandomState(0).normal(0, 20, wide.shape)
        return wide, np.clip(noisy, 0, 255).round().astype(np.uint8)
    assert name == "small 16x16"
    return photo[10:26, 10:26], photo[400:416, 250:266]


@pytest.mark.parametrize("name", GOLD["pairs"])
def test_pairwise_metrics_are_the_packages(photo, name):
    (a, b), want = pair(photo, name), GOLD["pairs"][name]
    assert [zlib.crc32(np.ascontiguousarray(x).tobytes()) for x in (a, b)] == want["crc32"]
    for max_p, tail in ((4095, ""), (255, "_max_p_255")):
        assert rmse(a, b, max_p) == pytest.approx(want[f"rmse{tail}"], abs=1e-9)
        assert psnr(a, b, max_p) == pytest.approx(want[f"psnr{tail}"], abs=1e-5)
        assert ssim(a, b, max_p) == pytest.approx(want[f"ssim{tail}"], abs=1e-12)
    assert fsim(a, b) == pytest.approx(want["fsim"], abs=1e-12)
    congruency = diversity.phase_congruency(diversity.planes(a))[0]
    assert congruency.mean().item() == pytest.approx(want["pc_sum_mean_a0"], abs=1e-12)


def test_tensors_are_taken_as_well_as_arrays(photo):
    a, b = pair(photo, "even-odd 64x65")
    for metric in OF_TWO:
        assert metric(torch.tensor(a.copy()), torch.tensor(b.copy())) == metric(a, b)


@pytest.mark.parametrize("metric", (rmse, psnr, ssim))
def test_4095_is_the_packages_default_and_so_it_is_here(photo, metric):
    a, b = pair(photo, "even-odd 64x65")
    assert metric(a, b) == metric(a, b, 4095)


@pytest.mark.parametrize("name", GOLD["pairs"])
def test_entropies_are_skimages_and_the_loops(photo, name):
    (a, _), want = pair(photo, name), GOLD["pairs"][name]
    assert entropy_1d(a) == pytest.approx(want["entropy_1d"], abs=1e-12)
    assert entropy_2d(a) == pytest.approx(want["entropy_2d_unquantised"], abs=1e-12)
    quantised = entropy_2d(a, quantised=True)
    assert quantised == pytest.approx(want["entropy_2d_quantised"], abs=1e-12)


def test_gray_is_pils(photo):
    want = np.asarray(Image.fromarray(photo).convert("L"))
    assert (diversity.gray_levels(photo).numpy() == want).all()


def test_the_scharr_slip_is_there(photo):
    """Written out: cv2.Scharr in 16 unsigned bits, where slopes saturate and squares wrap."""
    a, _ = pair(photo, "odd 131x97")
    found = diversity.gradient_magnitude(diversity.planes(a)).permute(1, 2, 0).numpy()
    p = np.pad(a.astype(float), ((1, 1), (1, 1), (0, 0)), mode="reflect")
    weights = (3, 10, 3)
    gx = sum(w * (p[i : i + 131, 2:] - p[i : i + 131, :-2]) for i, w in enumerate(weights))
    gy = sum(w * (p[2:, j : j + 97] - p[:-2, j : j + 97]) for j, w in enumerate(weights))
    squares = [np.clip(slope, 0, None) ** 2 % 65536 for slope in (gx, gy)]
    np.testing.assert_allclose(found, np.sqrt(sum(squares) % 65536), rtol=1e-6)
    assert found.max() < 256 < np.hypot(gx, gy).max()


def test_identities_and_edges(photo):
    a, _ = pair(photo, "odd 131x97")
    black = np.zeros_like(a)
    assert rmse(a, a) == 0 and psnr(a, a) == math.inf
    assert ssim(a, a) == pytest.approx(1) and fsim(a, a) == pytest.approx(1)
    assert math.isnan(fsim(a, black)) and math.isnan(fsim(black, black))
    assert entropy_1d(black) == entropy_2d(black[:1, :1]) == 0
    every_level = np.arange(256, dtype=np.uint8).reshape(16, 16, 1).repeat(3, axis=2)
    assert entropy_1d(every_level) == pytest.approx(8)
    for metric in OF_TWO:
        with pytest.raises(RuntimeError, match="must match|equal size"):
            metric(a, a[:-1])
    with pytest.raises(RuntimeError, match="too small"):
        ssim(a[:6], a[:6])
    assert ssim(a[:7], a[:7]) == pytest.approx(1)


def test_against_black_the_textbook_formulas_can_be_done_by_hand(photo):
    """rmse and psnr of an image and black: the roots of the channels' mean squares."""
    a, _ = pair(photo, "odd 131x97")
    squares = (a.astype(float) ** 2).mean((0, 1))
    black = np.zeros_like(a)
    assert rmse(a, black, 255) == pytest.approx(
        np.sqrt(squares).mean() / 255, rel=1e-3
    )  # fp32 sums
    want = 10 * np.log10(255**2 / squares.mean())
    assert psnr(a, black, 255) == pytest.approx(want, rel=1e-3)


@pytest.mark.parametrize("name", diversity.LEAST)
def test_the_least_size_that_a_metric_takes(photo, weights_dir, name):
    least = diversity.LEAST[name]
    arguments = [LPIPS("cpu", weights_dir)] if name == "lpips" else []
    metric = {"ssim": ssim, "fsim": fsim, "lpips": lpips}[name]
    a, b = photo[100 : 100 + least, :40], photo[300 : 300 + least, 100:140]
    assert math.isfinite(metric(a, b, *arguments))
    with pytest.raises(RuntimeError):
        metric(a[1:], b[1:], *arguments)


def test_maps_of_one_image_serve_all_its_pairs(photo):
    a, b = pair(photo, "even-odd 64x65")
    maps = [diversity.fsim_maps(image) for image in (a, b)]
    assert diversity.fsim_of_maps(*maps) == fsim(a, b)


@pytest.mark.parametrize("name", GOLD["lpips"]["filled_lins"])
def test_lpips_is_the_packages(photo, name, weights_dir):
    net = LPIPS("cpu", weights_dir)  # a random trunk, the same as in the oracle's run
    a, b = pair(photo, name)
    want = GOLD["lpips"]["filled_lins"][name]
    want = want["distance"] if isinstance(want, dict) else want
    assert lpips(a, b, net) == pytest.approx(want, rel=1e-5)
    assert lpips(a, a, net) == 0
    with pytest.raises(RuntimeError, match="must match"):
        lpips(a, a[:-4], net)


def test_lpips_file_format_is_the_shipped_one(weights_dir):
    shipped = GOLD["lpips"]["shipped_alex_pth"]
    assert shipped["loads_weights_only"]
    want = {}
    for name, value in shipped["tensors"].items():
        want[name] = value["shape"] if isinstance(value, dict) else value
    mine = torch.load(os.path.join(weights_dir, "alex.pth"), weights_only=True)
    assert {name: list(tensor.shape) for name, tensor in mine.items()} == want


@pytest.mark.parametrize("kind", GOLD["png"])
def test_odd_pngs_are_read_as_cv2_reads_them(tmp_path, kind):
    import evaluate

    path = tmp_path / "0_0.png"
    path.write_bytes(base64.b64decode(GOLD["png"][kind]["base64"]))
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # Pillow's advice on palettes is not for a user
        image = evaluate.read_image(path)
    assert image.dtype == np.uint8
    assert (image == np.array(GOLD["png"][kind]["cv2_rgb"])).all()
    if kind == "grey 16":  # what PIL alone would make of it
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            alone = np.asarray(Image.open(io.BytesIO(path.read_bytes())).convert("RGB"))
        assert (alone == 255).mean() > 0.9


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA here")
def test_metrics_on_cuda_are_those_of_the_cpu(photo):
    a, b = (torch.tensor(image.copy()) for image in pair(photo, "odd 131x97"))
    for metric in OF_TWO:
        assert metric(a.cuda(), b.cuda()) == pytest.approx(metric(a, b), rel=1e-9)
    for quantised in (False, True):
        want = entropy_2d(a, quantised)
        assert entropy_2d(a.cuda(), quantised) == pytest.approx(want, rel=1e-12)
