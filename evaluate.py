"""
How a policy is measured: the same prompts, the same seeds, with and without its LoRA; a judge's score, and diversity.

So far the table at the end of train.py: the judge, what it reports besides, and of Table 3 rmse and entropy_1d.
"""
import contextlib
import itertools
import math

import numpy as np
import torch

from sample import generate, lora_off, to_pil


def rmse(a, b, max_p=4095):
    """Root mean squared error of two images as image-similarity-measures 0.3.6 has it, whose numbers the paper prints:
    per channel, of pixels divided by max_p, then the mean over the channels. max_p 4095 is that package's default,
    meant for 12-bit satellite images; 255 gives the textbook value, 16 times larger. Raises ValueError for two sizes."""
    if a.shape != b.shape:
        raise ValueError(f"images of different sizes: {a.shape} and {b.shape}")
    d = (a.astype(np.float64) - b.astype(np.float64)) / max_p
    return float(np.sqrt((d ** 2).mean((0, 1))).mean())


def entropy_1d(image):
    """Shannon entropy, in bits (0 to 8), of the 256-bin histogram of the gray image (ITU-R 601 luma, as PIL's "L")."""
    r, g, b = (image[..., c].astype(np.int64) for c in range(3))
    gray = (19595 * r + 38470 * g + 7471 * b + 32768) >> 16
    p = np.bincount(gray.ravel(), minlength=256) / gray.size
    return float(-(p[p > 0] * np.log2(p[p > 0])).sum())


# ---------------------------------------------------------------------------------------------------------------
# Protocol: K images of every prompt, seeds shared by all models, pairs within a prompt, statistics over prompts

def paint(pipe, prompts, count, args, reference=False, progress=None):
    """(P, count, 3, H, W) in [0, 1]: `count` images of every prompt by DDIM, eta 0; the seeds are the same for all
    policies. reference: with the LoRA off. args: num_inference_steps and guidance_scale."""
    each = [p for p in prompts for _ in range(count)]
    seeds = list(range(10_000, 10_000 + len(each)))
    with lora_off(pipe.unet) if reference else contextlib.nullcontext():
        images = generate(pipe, each, seeds, args.num_inference_steps, args.guidance_scale, progress=progress)
    return images.view(len(prompts), count, *images.shape[1:])


def per_prompt(judge, prompts, images):
    """{figure: (P,)} for images (P, K, 3, H, W): means over a prompt's K images, or over their K (K-1) / 2 pairs."""
    P, K = images.shape[:2]
    flat, each = images.flatten(0, 1), [p for p in prompts for _ in range(K)]
    text = judge.encode(prompts).repeat_interleave(K, 0)
    figures = {f"{judge.name} (the judge)": torch.cat([judge(x, y).float().cpu() for x, y in zip(flat.split(16), text.split(16))])}
    if hasattr(judge, "report"):
        figures |= judge.report(flat, each)
    out = {k: v.view(P, K).nanmean(1) for k, v in figures.items()}
    eight_bit = [[np.asarray(to_pil(x)) for x in row] for row in images]
    if K > 1:
        out["diversity: RMSE between images of a prompt"] = torch.tensor(
            [np.mean([rmse(a, b, 255) for a, b in itertools.combinations(row, 2)]) for row in eight_bit])
    out["diversity: entropy of an image, bits"] = torch.tensor([np.mean([entropy_1d(a) for a in row]) for row in eight_bit])
    return out


def before_after(before, after, count):
    """(Markdown table, {figure: {before, after, change, se}}) of two per_prompt results on the same prompts and seeds.

    +- is the standard error over prompts; that of the change is of the paired difference.
    """
    def stats(v):
        v = v.double()[~v.isnan()]
        return v.mean().item(), v.std().item() / math.sqrt(len(v)) if len(v) > 1 else float("nan")
    n = len(next(iter(before.values())))
    lines = [f"| {n} held-out prompts x {count} images | before | after | change | change / its error |", "|---|---|---|---|---|"]
    figures = {}
    for k in before:
        (b, b_se), (a, a_se), (d, d_se) = stats(before[k]), stats(after[k]), stats(after[k].double() - before[k].double())
        lines.append(f"| {k} | {b:.3f} +- {b_se:.3f} | {a:.3f} +- {a_se:.3f} | {d:+.3f} +- {d_se:.3f} | "
                     + (f"{d / d_se:+.1f} |" if d_se > 0 else "- |"))
        figures[k] = {"before": b, "after": a, "change": d, "se": d_se}
    return "\n".join(lines) + "\n", figures
