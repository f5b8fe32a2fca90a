"""What is about time alone: fixed batches for torch.compile, a tiny decoder for the judge."""

import math
import os

import torch

from parts.common import UserError
from parts.hub import MODEL, first_line, from_hub
from parts.model import decode, decode_batch, in_slices, latent_shape
from parts.weights import has_weights


def make_fast(pipe, judge, unet_batches, judge_batch):
    """torch.compile of UNet, VAE decoder and judge. unet_batches: the UNet's batch sizes, in rows.
    It rounds differently with the LoRA on and off: in half precision X begins near 1, not at 1."""
    forward = pipe.unet.forward

    def noise(x, t, text):
        return forward(x, t, text, return_dict=False)[0]

    compiled = compile_at(noise, *unet_batches)
    pipe.unet.forward = lambda x, t, text, return_dict=False: (compiled(x, t, text),)
    pipe.vae.decoder.forward = compile_at(pipe.vae.decoder.forward, decode_batch(pipe))
    if hasattr(judge, "compile"):
        judge.compile(judge_batch)


def compile_at(f, *sizes):
    """torch.compile of a function of rows, for batches of exactly these sizes: it would compile
    anew for every other. A batch of another size is cut and filled to the least wasteful of them.
    """
    compiled = torch.compile(f, dynamic=False)

    def call(*rows):
        def rows_computed(size):
            return math.ceil(len(rows[0]) / size) * size, -size

        return in_slices(compiled, min(sizes, key=rows_computed), *rows, fill=True)

    return call


def load_preview(where, pipe):
    """A tiny autoencoder that decodes for the judge, at a twentieth of the VAE's cost.
    Raises UserError if it cannot be had, or is not for the pipeline's latents."""
    from diffusers import AutoencoderTiny

    try:
        folder = where if os.path.isdir(where) else from_hub(where, MODEL, has_weights)
        options = dict(dtype=pipe.vae.dtype, local_files_only=True)
        vae = AutoencoderTiny.from_pretrained(folder, **options)
        vae.requires_grad_(False).eval().to(pipe.unet.device)
        latents = torch.zeros(1, *latent_shape(pipe), device=pipe.unet.device)
        sizes = [decode(pipe, latents, v).shape for v in (vae, pipe.vae)]
        assert sizes[0] == sizes[1], f"images of {tuple(sizes[0])}, not {tuple(sizes[1])}"
    except Exception as error:
        hint = "give an AutoencoderTiny for this model, such as madebyollin/taesd"
        why = f"cannot use the preview decoder {where!r}: {hint} ({first_line(error)})"
        raise UserError(why) from error
    return vae
