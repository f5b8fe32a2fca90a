"""Table 3's metrics against the public packages' own numbers (golden/metrics.json says which versions, and how they were run)."""
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

from parts import diversity
import evaluate
from weights import golden

GOLD = golden("metrics.json")


@pytest.fixture(scope="module")
def photo():
    """A natural image that comes with matplotlib (public domain)."""
    from matplotlib.cbook import get_sample_data
    image = np.array(Image.open(get_sample_data("grace_hopper.jpg")).convert("RGB"))
    assert zlib.crc32(image.tobytes()) == GOLD["source"]["crc32"], "another JPEG decoder: the golden numbers are of other pixels"
    return image


def pair(photo, name):
    """The pairs' rules stand beside their numbers in metrics.json."""
    img = photo
    if name == "photo 512x512":
        return img[0:512], img[88:600]
    if name == "odd 131x97":
        return img[100:231, 60:157], img[200:331, 160:257]
    if name == "even-odd 64x65":
        return img[50:114, 200:265], img[50:114, 200:265][:, ::-1]
    if name == "wide 50x120":
        a = img[300:350, 100:220]
        return a, np.clip(a + np.random.RandomState(0).normal(0, 20, a.shape), 0, 255).round().astype(np.uint8)
    assert name == "small 16x16"
    return img[10:26, 10:26], img[400:416, 250:266]


@pytest.mark.parametrize("name", GOLD["pairs"])
def test_pairwise_metrics_are_the_packages(photo, name):
    (a, b), want = pair(photo, name), GOLD["pairs"][name]
    assert [zlib.crc32(np.ascontiguousarray(x).tobytes()) for x in (a, b)] == want["crc32"]
    for max_p, tail in ((4095, ""), (255, "_max_p_255")):
        assert evaluate.rmse(a, b, max_p) == pytest.approx(want[f"rmse{tail}"], abs=1e-9)
        assert evaluate.psnr(a, b, max_p) == pytest.approx(want[f"psnr{tail}"], abs=1e-5)
        assert evaluate.ssim(a, b, max_p) == pytest.approx(want[f"ssim{tail}"], abs=1e-12)
    assert evaluate.fsim(a, b) == pytest.approx(want["fsim"], abs=1e-12)
    assert diversity.phase_congruency(diversity.planes(a))[0].mean().item() == pytest.approx(want["pc_sum_mean_a0"], abs=1e-12)
    assert evaluate.rmse(a, b) == evaluate.rmse(torch.tensor(a.copy()), torch.tensor(b.copy()))  # tensors as well as arrays


@pytest.mark.parametrize("name", GOLD["pairs"])
def test_entropies_are_skimages_and_the_loops(photo, name):
    (a, _), want = pair(photo, name), GOLD["pairs"][name]
    assert evaluate.entropy_1d(a) == pytest.approx(want["entropy_1d"], abs=1e-12)
    assert evaluate.entropy_2d(a) == pytest.approx(want["entropy_2d_unquantised"], abs=1e-12)
    assert evaluate.entropy_2d(a, quantised=True) == pytest.approx(want["entropy_2d_quantised"], abs=1e-12)


def test_gray_is_pils(photo):
    assert (diversity.gray_levels(photo).numpy() == np.asarray(Image.fromarray(photo).convert("L"))).all()


def test_the_scharr_slip_is_there_and_can_be_left_out(photo):
    a, b = pair(photo, "odd 131x97")
    x = diversity.planes(a)
    textbook = diversity.gradient_magnitude(x, wrap=False)
    p = np.pad(a.astype(float), ((1, 1), (1, 1), (0, 0)), mode="reflect")
    gx = sum(w * (p[i:i + 131, 2:] - p[i:i + 131, :-2]) for i, w in enumerate((3, 10, 3)))
    gy = sum(w * (p[2:, j:j + 97] - p[:-2, j:j + 97]) for j, w in enumerate((3, 10, 3)))
    np.testing.assert_allclose(textbook.permute(1, 2, 0).numpy(), np.sqrt(gx ** 2 + gy ** 2), atol=1e-9)
    assert diversity.gradient_magnitude(x).max() < 256 < textbook.max()  # 16 bits wrap
    assert evaluate.fsim(a, b, wrap=False) != pytest.approx(evaluate.fsim(a, b), abs=.01)


def test_identities_and_edges(photo):
    a, _ = pair(photo, "odd 131x97")
    black = np.zeros_like(a)
    assert evaluate.rmse(a, a) == 0 and evaluate.psnr(a, a) == math.inf
    assert evaluate.ssim(a, a) == pytest.approx(1) and evaluate.fsim(a, a) == pytest.approx(1)
    assert math.isnan(evaluate.fsim(a, black)) and math.isnan(evaluate.fsim(black, black))
    assert evaluate.entropy_1d(black) == evaluate.entropy_2d(black[:1, :1]) == 0
    assert evaluate.entropy_1d(np.repeat(np.arange(256, dtype=np.uint8).reshape(16, 16, 1), 3, 2)) == pytest.approx(8)
    for metric in (evaluate.rmse, evaluate.psnr, evaluate.ssim, evaluate.fsim):
        assert metric(a, black[::1]) is not None
        with pytest.raises(ValueError, match="different sizes"):
            metric(a, a[:-1])
    with pytest.raises(ValueError, match="7x7"):
        evaluate.ssim(a[:6], a[:6])


def test_maps_of_one_image_serve_all_its_pairs(photo):
    a, b = pair(photo, "even-odd 64x65")
    assert evaluate.fsim_of_maps(evaluate.fsim_maps(a), evaluate.fsim_maps(b)) == evaluate.fsim(a, b)


@pytest.mark.parametrize("name", GOLD["lpips"]["filled_lins"])
def test_lpips_is_the_packages(photo, name, weights_dir):
    net = evaluate.LPIPS("cpu", weights_dir)  # a random trunk, the same as in the oracle's run
    a, b = pair(photo, name)
    want = GOLD["lpips"]["filled_lins"][name]
    want = want["distance"] if isinstance(want, dict) else want
    assert evaluate.lpips(a, b, net) == pytest.approx(want, rel=1e-5)
    assert evaluate.lpips(a, a, net) == 0
    with pytest.raises(ValueError, match="different sizes"):
        evaluate.lpips(a, a[:-1], net)


def test_lpips_file_format_is_the_shipped_one(weights_dir):
    shipped = GOLD["lpips"]["shipped_alex_pth"]
    assert shipped["loads_weights_only"]
    mine = torch.load(os.path.join(weights_dir, "alex.pth"), weights_only=True)
    assert {k: list(v.shape) for k, v in mine.items()} == {k: v["shape"] if isinstance(v, dict) else v for k, v in shipped["tensors"].items()}


@pytest.mark.parametrize("kind", GOLD["png"])
def test_odd_pngs_are_read_as_cv2_reads_them(tmp_path, kind):
    path = tmp_path / "0_0.png"
    path.write_bytes(base64.b64decode(GOLD["png"][kind]["base64"]))
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # Pillow has advice on palettes; a user should not be bothered with it
        image = evaluate.read_image(path)
    assert image.dtype == np.uint8 and (image == np.array(GOLD["png"][kind]["cv2_rgb"])).all()
    if kind == "grey 16":  # what PIL alone would make of it
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            assert (np.asarray(Image.open(io.BytesIO(path.read_bytes())).convert("RGB")) == 255).mean() > .9


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA here")
def test_metrics_on_cuda_are_those_of_the_cpu(photo):
    a, b = (torch.tensor(x.copy()) for x in pair(photo, "odd 131x97"))
    for metric in (evaluate.rmse, evaluate.psnr, evaluate.ssim, evaluate.fsim):
        assert metric(a.cuda(), b.cuda()) == pytest.approx(metric(a, b), rel=1e-9)
    assert evaluate.entropy_2d(a.cuda()) == pytest.approx(evaluate.entropy_2d(a), rel=1e-12)
