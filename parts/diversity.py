"""How much do images differ? The metrics of the paper's Table 3.

    rmse(a, b)  psnr(a, b)  ssim(a, b)  fsim(a, b)      of two images
    entropy_1d(a)  entropy_2d(a)                        of one

Images are uint8 (H, W, 3), numpy or torch, on any device; two must be of one size. RMSE, PSNR, SSIM
and FSIM are those of the PyPI package image-similarity-measures 0.3.6, whose numbers the paper
prints, oddities included; a keyword gives each one's textbook convention (docs/metrics.md). What
needs weights is had from load_metric: "lpips" and "clip_i", the image-image CLIPScore.
"""

import math

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from scipy.stats import rayleigh

from parts.images import to_pixels
from parts.judges import load_judge
from parts.judges_clip import renamed, take
from parts.weights import build, find_url, read_state

LEAST = {"ssim": 7, "fsim": 2, "lpips": 31}  # pixels each way that a metric needs
EPS = 1e-4  # phasepack's
TRUNK = "https://download.pytorch.org/models/alexnet-owt-7be5be79.pth"
HEADS = "https://github.com/richzhang/PerceptualSimilarity/raw/master/lpips/weights/v0.1/alex.pth"
RAYLEIGH = (rayleigh.mean() + 2 * rayleigh.std()) / rayleigh.median()  # the limit of its noise


def load_metric(name, device, weights):
    """(prepare, compare): what is computed once an image, and of two prepared ones (or None)."""
    if name == "lpips":
        net = LPIPS(device, weights)
        return net.features, net.distance
    if name == "clip_i":
        judge = load_judge("clipscore", device, weights)
        return lambda image: judge.embed(to_pixels([image]))[0], torch.dot
    return FORMULAS[name]


def tensor(image):
    return image if torch.is_tensor(image) else torch.from_numpy(np.array(image, order="C"))


def planes(image):
    """uint8 (H, W, 3) -> fp64 (3, H, W)."""
    return tensor(image).permute(2, 0, 1).double()


def mean_squares(a, b, scale):
    """(3,) means of ((a - b) / scale)^2, in fp32 and numpy's order, pixel after pixel. So are the
    package's: at 512 x 512 the rounding is 1e-4 of the value."""
    difference = tensor(a).float() - tensor(b)
    return np.square(difference.cpu().numpy() / scale).mean((0, 1))


def rmse(a, b, max_p=4095):
    """Root mean squared error: per channel, of pixels divided by max_p, then the mean of channels.
    max_p 255 gives the textbook value, 16 times larger."""
    return float(np.sqrt(mean_squares(a, b, max_p)).mean())


def psnr(a, b, max_p=4095):
    """Peak signal to noise ratio, in dB: 20 log10(max_p / root mean squared error); inf if equal.
    max_p 255 gives the textbook value, 24.1 dB lower. Channels are averaged before the root."""
    mse = float(mean_squares(a, b, 1).mean())
    return 20 * math.log10(max_p / math.sqrt(mse)) if mse else math.inf


def ssim(a, b, max_p=4095):
    """Structural similarity (Wang et al. 2004) over 7x7 windows, sample covariances. K1 .01, K2 .03
    scale with max_p: 4095 drowns most contrast of 8 bits (.73 where the textbook's 255 says .2)."""
    x, y = planes(a), planes(b)
    means = F.avg_pool2d(torch.stack([x, y, x * x, y * y, x * y]), 7, stride=1)
    mean_x, mean_y, mean_xx, mean_yy, mean_xy = means
    variances = (mean_xx - mean_x**2 + mean_yy - mean_y**2) * 49 / 48
    covariance = (mean_xy - mean_x * mean_y) * 49 / 48
    c1, c2 = (0.01 * max_p) ** 2, (0.03 * max_p) ** 2
    structure = (2 * covariance + c2) / (variances + c2)
    return (similarity(mean_x, mean_y, c1) * structure).mean().item()


def similarity(p, q, constant):
    return (2 * p * q + constant) / (p**2 + q**2 + constant)


def fsim(a, b):
    """Feature similarity (Zhang et al. 2011) per colour channel, then the mean of channels; NaN for
    a black image. For many pairs: fsim_maps once an image, fsim_of_maps once a pair."""
    return fsim_of_maps(fsim_maps(a), fsim_maps(b))


def fsim_maps(image):
    """(phase congruency, gradient magnitude), (3, H, W) each: FSIM's share of one image alone."""
    x = planes(image)
    return phase_congruency(x), gradient_magnitude(x)


def fsim_of_maps(a, b):
    (phase_a, gradient_a), (phase_b, gradient_b) = a, b
    alike = similarity(phase_a, phase_b, 0.85) * similarity(gradient_a, gradient_b, 160.0)
    weight = torch.maximum(phase_a, phase_b)
    return ((alike * weight).sum((1, 2)) / weight.sum((1, 2))).mean().item()


def gradient_magnitude(x):
    """(C, H, W) fp64 -> (C, H, W): Scharr's gradient, borders mirrored. In 16 unsigned bits, where
    negative slopes are 0 and squares wrap: the package's slip, but inside the published FSIM."""
    scharr = x.new_tensor([[-3, 0, 3], [-10, 0, 10], [-3, 0, 3]])
    kernels = torch.stack([scharr, scharr.T])[:, None]
    padded = F.pad(x[:, None], (1, 1, 1, 1), mode="reflect")
    slopes = F.conv2d(padded, kernels).round()  # (C, 2, H, W): integers, whatever the algorithm
    squares = slopes.clamp(min=0).square() % 65536
    return (squares.sum(1) % 65536).sqrt().float()  # numpy's root of a uint16 is fp32


def phase_congruency(x):
    """(C, H, W) fp64 -> (C, H, W): Kovesi's phase congruency, with phasepack 1.5's defaults."""
    spectrum = torch.fft.fft2(x)[:, None]
    total = 0
    for filters in log_gabor(*x.shape[1:], x.device):  # (4, H, W), of one orientation
        response = torch.fft.ifft2(spectrum * filters)  # (C, 4, H, W)
        amplitude, resultant = response.abs(), response.sum(1, keepdim=True)
        turned = response * (resultant / (resultant.abs() + EPS)).conj()
        energy = (turned.real - turned.imag.abs()).sum(1)  # along their sum, less what is across
        finest = amplitude[:, 0].flatten(1)  # its noise stands for 1 + 1/2 + 1/4 + 1/8, of 4 scales
        # of an even count torch's median is the lower one, and minus that of -x the upper
        median = (finest.median(1).values - (-finest).median(1).values) / 2
        noise = (1.875 * RAYLEIGH * median).clamp(min=EPS)[:, None, None]
        sum_amplitude = amplitude.sum(1)
        band = (sum_amplitude / (amplitude.amax(1) + EPS) - 1) / 3  # the share that answers
        weight = torch.sigmoid(10 * (band - 0.5))
        total = total + weight * (energy - noise).clamp(min=0) / sum_amplitude
    return total


def log_gabor(height, width, device):
    """(6 orientations, 4 scales, H, W): phasepack's filters in the frequency plane, DC first."""

    def frequencies(n):  # cycles a pixel; of odd sizes the axis reaches 1/2 at both ends
        return torch.fft.fftfreq(n, (n - n % 2) / n, dtype=torch.float64, device=device)

    x, y = frequencies(width), frequencies(height)[:, None]
    radius, angle = torch.hypot(x, y), torch.atan2(-y, x)
    low_pass = 1 / (1 + (radius / 0.45) ** 30)
    wavelengths = radius.new_tensor([6, 12, 24, 48])[:, None, None]  # pixels
    octaves = torch.log(radius * wavelengths) / math.log(0.5978)
    scales = torch.exp(-(octaves**2) / 2) * low_pass  # 0 at DC
    off = angle - radius.new_tensor(range(6))[:, None, None] * math.pi / 6
    distance = torch.atan2(off.sin(), off.cos()).abs()  # 0 to pi
    orientations = ((3 * distance).clamp(max=math.pi).cos() + 1) / 2
    return orientations[:, None] * scales


def gray_levels(image):
    """uint8 (H, W, 3) -> int64 (H, W), ITU-R 601 luma in PIL's integer arithmetic (mode "L")."""
    r, g, b = tensor(image).long().unbind(-1)
    return (19595 * r + 38470 * g + 7471 * b + 32768) >> 16


def entropy_bits(keys):
    """Shannon entropy of how often each non-negative integer occurs."""
    p = torch.bincount(keys.flatten()).double() / keys.numel()
    return torch.special.entr(p).sum().item() / math.log(2)


def entropy_1d(image):
    """Shannon entropy, in bits (0 to 8), of the 256-bin histogram of the gray image."""
    return entropy_bits(gray_levels(image))


def entropy_2d(image, quantised=False):
    """Entropy, in bits, of pairs (gray level, mean of its 8 neighbours), zeros outside the image.
    The mean is not rounded: up to 256 x 2041 bins, about 14 bits on photos. That is the code in
    circulation and the paper's number. quantised: the textbook's 256 x 256 bins, about 11."""
    gray = gray_levels(image)
    block = F.avg_pool2d(gray[None].double(), 3, 1, padding=1, divisor_override=1)[0].long()
    around = block - gray  # the sum of 8 neighbours, 0 .. 2040
    if quantised:
        around = around // 8
    return entropy_bits(gray * 2048 + around)


FORMULAS = {  # as load_metric returns them: the metrics that need no weights
    "rmse": (tensor, rmse),
    "psnr": (tensor, psnr),
    "ssim": (tensor, ssim),
    "fsim": (fsim_maps, fsim_of_maps),
    "entropy_1d": (entropy_1d, None),
    "entropy_2d": (entropy_2d, None),
}


class LPIPS:
    """Distance of unit-normalised AlexNet features, weighted by 1,152 learned numbers. fp32.
    net.distance(net.features(a), net.features(b)) of two images of one size; 0 for the same."""

    MEAN, STD = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)

    def __init__(self, device, weights):
        self.device = device
        path = find_url(TRUNK, weights)
        self.trunk = build(alexnet, take(read_state(path), r"features\."), path, device)
        path = find_url(HEADS, weights)
        heads = renamed(read_state(path), {r"^lin(\d)\.model\.1": r"\1"})
        self.heads = build(lpips_heads, heads, path, device)

    def features(self, image):
        """uint8 (H, W, 3) -> five unit-normalised feature maps (1, C, h, w)."""
        x = tensor(image).to(self.device).float() / 127.5 - 1
        x = (x - x.new_tensor(self.MEAN)) / x.new_tensor(self.STD)
        x = x.permute(2, 0, 1)[None]
        maps = []
        for number, convolution in self.trunk.items():
            if number in ("3", "6"):
                x = F.max_pool2d(x, 3, 2)
            x = F.relu(convolution(x))
            maps.append(F.normalize(x, eps=1e-10))
        return maps

    def distance(self, maps_a, maps_b):
        layers = zip(self.heads, maps_a, maps_b)
        return sum(head((a - b) ** 2).mean().item() for head, a, b in layers)


def alexnet():
    """The convolutions of AlexNet, numbered as torchvision's features."""
    layers = {  # inputs, outputs, kernel, stride, padding
        "0": (3, 64, 11, 4, 2),
        "3": (64, 192, 5, 1, 2),
        "6": (192, 384, 3, 1, 1),
        "8": (384, 256, 3, 1, 1),
        "10": (256, 256, 3, 1, 1),
    }
    return nn.ModuleDict({number: nn.Conv2d(*sizes) for number, sizes in layers.items()})


def lpips_heads():
    return nn.ModuleList(nn.Conv2d(c, 1, 1, bias=False) for c in (64, 192, 384, 256, 256))
