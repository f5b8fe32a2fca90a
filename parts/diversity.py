"""
How much do images differ? Table 3's metrics in the paper's own units, and each in its textbook convention by a keyword.

    rmse(a, b)  psnr(a, b)  ssim(a, b)  fsim(a, b)  lpips(a, b, net)      of two images
    entropy_1d(a)  entropy_2d(a)                                          of one

Images are uint8 (H, W, 3), numpy or torch, on any device; two images must be of one size (ValueError). RMSE, PSNR, SSIM and
FSIM are those of the PyPI package image-similarity-measures 0.3.6, whose numbers the paper prints, oddities included: its
default dynamic range of 4095 on 8-bit images tells it (README). Image-image CLIPScore is judges.CLIP.embed.
"""
import functools
import math
import re

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

from parts.weights import build, find_url, read_state

LEAST = {"ssim": 7, "fsim": 2, "lpips": 31}  # pixels each way that a metric needs

# ---------------------------------------------------------------------------------------------------------------
# Of two images: RMSE, PSNR, SSIM, FSIM

def tensor(image):
    return image if torch.is_tensor(image) else torch.from_numpy(np.array(image, order="C"))


def planes(image):
    """uint8 (H, W, 3) -> fp64 (3, H, W)."""
    return tensor(image).permute(2, 0, 1).double()


def same_size(a, b):
    if tuple(a.shape) != tuple(b.shape):
        raise ValueError(f"images of different sizes: {tuple(a.shape)} and {tuple(b.shape)}")


def _mean_squares(a, b, scale):
    """(3,) of ((a - b) / scale)^2. In fp32 and summed pixel after pixel, which is numpy's way for these axes and so the
    package's: at 512 x 512 that costs 1e-4 of the value, and fp64 would differ from it in the fifth digit."""
    a, b = (x.cpu().numpy() if torch.is_tensor(x) else np.asarray(x) for x in (a, b))
    return np.square((a.astype(np.float32) - b) / scale).mean((0, 1))


def rmse(a, b, max_p=4095):
    """Root mean squared error: per channel, of pixels divided by max_p, then the mean over the channels.

    max_p 4095 is the package's default, meant for 12-bit satellite images, and behind the paper's numbers; 255 gives the
    textbook value, 16 times larger. Raises ValueError for two sizes, as all pairwise metrics here do.
    """
    same_size(a, b)
    return float(np.sqrt(_mean_squares(a, b, max_p)).mean())


def psnr(a, b, max_p=4095):
    """Peak signal to noise ratio, in dB: 20 log10(max_p / sqrt(mean squared error over pixels and channels)).

    max_p 255 gives the textbook value, 24.1 dB lower. inf for identical images. Not -20 log10(rmse): the mean over
    channels is taken before the root here, after it there.
    """
    same_size(a, b)
    mse = float(_mean_squares(a, b, 1).mean())
    return 20 * math.log10(max_p / math.sqrt(mse)) if mse else math.inf


def ssim(a, b, max_p=4095):
    """Structural similarity (Wang et al. 2004): 7x7 uniform windows, sample covariance, mean over the windows that fit and
    over channels. K1 .01, K2 .03 scale with max_p: at 4095 the constants drown most of the contrast of 8-bit images
    (.73 for two images of one prompt where the textbook's 255 says .2). Raises ValueError below 7 pixels.
    """
    same_size(a, b)
    if min(a.shape[:2]) < LEAST["ssim"]:
        raise ValueError(f"SSIM's window is 7x7, the image {tuple(a.shape[:2])}")
    x, y = planes(a), planes(b)

    def window(v):  # mean over 7x7, from running sums: integers below 2^53, so exact
        s = F.pad(v.cumsum(1).cumsum(2), (1, 0, 1, 0))
        return (s[:, 7:, 7:] - s[:, :-7, 7:] - s[:, 7:, :-7] + s[:, :-7, :-7]) / 49
    mx, my = window(x), window(y)
    vx, vy, vxy = (49 / 48 * (window(p * q) - mp * mq) for p, q, mp, mq in ((x, x, mx, mx), (y, y, my, my), (x, y, mx, my)))
    c1, c2 = (.01 * max_p) ** 2, (.03 * max_p) ** 2
    return ((2 * mx * my + c1) * (2 * vxy + c2) / ((mx ** 2 + my ** 2 + c1) * (vx + vy + c2))).mean().item()


@functools.lru_cache(maxsize=2)
def _log_gabor(H, W, device):
    """(6 orientations, 4 scales, H, W) filters in the frequency plane, DC first: wavelengths 6, 12, 24, 48 pixels."""
    def axis(n):  # cycles a pixel; of odd sizes the package's axis ends at 1/2 on both sides
        return torch.arange(-(n // 2), n - n // 2, dtype=torch.float64, device=device) / (n if n % 2 == 0 else n - 1)
    x, y = torch.meshgrid(axis(W), axis(H), indexing="xy")
    radius, theta = torch.fft.ifftshift(torch.sqrt(x ** 2 + y ** 2)), torch.fft.ifftshift(torch.atan2(-y, x))
    low_pass = 1 / (1 + (radius / .45) ** 30)
    radius[0, 0] = 1
    filters = []
    for o in range(6):
        a = torch.tensor(o * math.pi / 6, dtype=torch.float64)
        off = torch.atan2(theta.sin() * a.cos() - theta.cos() * a.sin(), theta.cos() * a.cos() + theta.sin() * a.sin()).abs()
        spread = ((off * 3).clamp(max=math.pi).cos() + 1) / 2
        for s in range(4):
            radial = torch.exp(-torch.log(radius * 6 * 2 ** s) ** 2 / (2 * math.log(.5978) ** 2)) * low_pass
            radial[0, 0] = 0
            filters.append(radial * spread)
    return torch.stack(filters).view(6, 4, H, W)


def phase_congruency(x):
    """(C, H, W) fp64 -> (C, H, W): Kovesi's phase congruency, summed over 6 orientations (phasepack 1.5's defaults, sigma
    .5978). NaN where an image has no contrast at all."""
    n = x[0].numel()
    spectrum, total = torch.view_as_real(torch.fft.fft2(x))[:, None], 0
    for filters in _log_gabor(*x.shape[1:], x.device):                   # (4, H, W)
        response = torch.fft.ifft2(torch.view_as_complex(spectrum * filters[..., None]))      # (C, 4, H, W)
        even, odd = (v.contiguous() for v in (response.real, response.imag))
        amplitude = (even.square() + odd.square()).sqrt_()
        sum_even, sum_odd, sum_amplitude = even.sum(1), odd.sum(1), amplitude.sum(1)
        squared = sum_even ** 2 + sum_odd ** 2
        length = squared.sqrt() + 1e-4
        # along the mean direction, less what is across it
        across = even.mul_((sum_odd / length)[:, None]).sub_(odd.mul_((sum_even / length)[:, None])).abs_().sum(1)
        energy = squared / length - across
        # noise: Rayleigh, its scale from the median response of the finest filter
        flat = amplitude[:, 0].flatten(1)
        median = (flat.kthvalue((n + 1) // 2, 1).values + flat.kthvalue(n // 2 + 1, 1).values) / 2
        scale = median / math.sqrt(math.log(4)) * (1 - .5 ** 4) / (1 - .5)
        noise = (scale * math.sqrt(math.pi / 2) + 2 * scale * math.sqrt((4 - math.pi) / 2)).clamp(min=1e-4)
        width = (sum_amplitude / (amplitude.amax(1) + 1e-4) - 1) / 3     # of the band that answers, 0 to 1
        weight = 1 / (1 + torch.exp(10 * (.5 - width)))
        total = total + weight * (energy - noise[:, None, None]).clamp_(min=0) / sum_amplitude
    return total


def gradient_magnitude(x, wrap=True):
    """(C, H, W) fp64 -> (C, H, W): Scharr, borders mirrored. wrap: the package computes in 16 unsigned bits, where negative
    slopes saturate to 0 and squares wrap at 65536. That is a slip, but it is inside the published FSIM."""
    p = F.pad(x[None], (1, 1, 1, 1), mode="reflect")[0]
    smooth = lambda v, d: 3 * v.narrow(d, 0, v.shape[d] - 2) + 10 * v.narrow(d, 1, v.shape[d] - 2) + 3 * v.narrow(d, 2, v.shape[d] - 2)
    slope = lambda v, d: v.narrow(d, 2, v.shape[d] - 2) - v.narrow(d, 0, v.shape[d] - 2)
    gx, gy = slope(smooth(p, 1), 2), slope(smooth(p, 2), 1)
    if not wrap:
        return (gx ** 2 + gy ** 2).sqrt()
    gx, gy = gx.clamp(min=0), gy.clamp(min=0)
    return ((gx ** 2 % 65536 + gy ** 2 % 65536) % 65536).sqrt().float()  # numpy's root of a uint16 is fp32


def fsim_maps(image, wrap=True):
    """(phase congruency, gradient magnitude), (3, H, W) each: all of FSIM that depends on one image alone."""
    x = planes(image)
    return phase_congruency(x), gradient_magnitude(x, wrap)


def fsim_of_maps(a, b):
    (pc1, gm1), (pc2, gm2) = a, b
    same_size(pc1, pc2)
    alike = lambda p, q, t: (2 * p * q + t) / (p ** 2 + q ** 2 + t)
    weight = torch.maximum(pc1, pc2)
    s = alike(pc1, pc2, .85) * alike(gm1, gm2, 160.)
    return ((s * weight).sum((1, 2)) / weight.sum((1, 2))).mean().item()


def fsim(a, b, wrap=True):
    """Feature similarity (Zhang et al. 2011) per colour channel, then the mean; 1 for identical images, NaN if one has no
    contrast (the safety checker's black image). wrap=False takes Scharr's gradient as it was meant, in real numbers
    (.317 where the package says .295). For many pairs: fsim_maps once an image, fsim_of_maps once a pair."""
    same_size(a, b)
    return fsim_of_maps(fsim_maps(a, wrap), fsim_maps(b, wrap))


# ---------------------------------------------------------------------------------------------------------------
# Entropies, of one image

def gray_levels(image):
    """uint8 (H, W, 3) -> int64 (H, W), ITU-R 601 luma in PIL's integer arithmetic (mode "L")."""
    r, g, b = tensor(image).long().unbind(-1)
    return (19595 * r + 38470 * g + 7471 * b + 32768) >> 16


def _bits(keys):
    p = torch.bincount(keys.flatten()).double() / keys.numel()
    return torch.special.entr(p).sum().item() / math.log(2)


def entropy_1d(image):
    """Shannon entropy, in bits (0 to 8), of the 256-bin histogram of the gray image."""
    return _bits(gray_levels(image))


def entropy_2d(image, quantised=False):
    """Entropy, in bits, of pairs (gray level, mean of its 8 neighbours), zeros outside the image.

    The mean is not rounded: up to 256 x 2041 bins, at most log2(H W) = 18 bits for 512 x 512, about 14 on photos. That is
    the code in circulation and the paper's number. quantised: the textbook's 256 x 256 bins, about 11.
    """
    g = gray_levels(image)
    p = F.pad(g, (1, 1, 1, 1))
    H, W = g.shape
    around = sum(p[i:i + H, j:j + W] for i in range(3) for j in range(3)) - g  # 0 .. 2040
    return _bits(g * 256 + around // 8 if quantised else g * 2048 + around)


# ---------------------------------------------------------------------------------------------------------------
# LPIPS (Zhang et al. 2018), version 0.1, AlexNet: the lpips package's default

class LPIPS:
    """Distance of unit-normalised AlexNet features, weighted by 1,152 learned, non-negative numbers. fp32.

    weights: a folder with alexnet-owt-7be5be79.pth (torchvision's) and alex.pth (the lpips package's); else downloaded.
    """
    TRUNK = "https://download.pytorch.org/models/alexnet-owt-7be5be79.pth"
    HEADS = "https://github.com/richzhang/PerceptualSimilarity/raw/master/lpips/weights/v0.1/alex.pth"
    CHANNELS = (64, 192, 384, 256, 256)

    def __init__(self, device="cpu", weights=None):
        self.device, self.where = device, find_url(self.TRUNK, weights)
        heads = find_url(self.HEADS, weights)
        c = self.CHANNELS
        def trunk():  # named as torchvision's features: convolutions at 0, 3, 6, 8, 10, a ReLU after each
            conv = lambda i, o, k, **kw: (nn.Conv2d(i, o, k, **kw), nn.ReLU())
            return nn.Sequential(*conv(3, c[0], 11, stride=4, padding=2), nn.MaxPool2d(3, 2), *conv(c[0], c[1], 5, padding=2),
                                 nn.MaxPool2d(3, 2), *conv(c[1], c[2], 3, padding=1), *conv(c[2], c[3], 3, padding=1),
                                 *conv(c[3], c[4], 3, padding=1))
        state = {k.removeprefix("features."): v for k, v in read_state(self.where).items() if not k.startswith("classifier.")}
        self.trunk = build(trunk, state, self.where, device)
        lin = {re.sub(r"lin(\d)\.model\.1\.", r"\1.", k): v for k, v in read_state(heads).items()}
        self.lin = build(lambda: nn.ModuleList(nn.Conv2d(n, 1, 1, bias=False) for n in c), lin, heads, device)

    @torch.no_grad()
    def features(self, image):
        """uint8 (H, W, 3) -> five unit-normalised feature maps (1, C, h, w)."""
        stat = lambda v: torch.tensor(v, device=self.device).view(1, 3, 1, 1)
        x = tensor(image).to(self.device).permute(2, 0, 1)[None].float() / 127.5 - 1
        x, out = (x - stat((-.030, -.088, -.188))) / stat((.458, .448, .450)), []
        for layer in self.trunk:
            x = layer(x)
            if isinstance(layer, nn.ReLU):
                out.append(x / (x.square().sum(1, keepdim=True).sqrt() + 1e-10))
        return out

    @torch.no_grad()
    def distance(self, f, g):
        return sum(lin((a - b) ** 2).mean().item() for lin, a, b in zip(self.lin, f, g))


def lpips(a, b, net):
    """Learned perceptual distance of two images, 0 for the same; net: an LPIPS. For many pairs: net.features once an image."""
    same_size(a, b)
    return net.distance(net.features(a), net.features(b))
