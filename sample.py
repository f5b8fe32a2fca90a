"""
Everything that paints: load a Stable Diffusion, LoRA, the DDIM step, images from seeds, and preference pairs.

    python sample.py "a red sun over a sea"                              the toy where there is no CUDA, else SD1.5
    python sample.py "a red sun over a sea" --model toy --lora out/toy-js    a run's LoRA, the reference row above it
    python sample.py --prompts my.txt --model DIR_OR_HUB_ID --seeds 0 1 2 3

Writes one PNG per image and a labelled grid to --output_dir. Seed k gives the same picture at any batch size.
The parts are used by train.py and evaluate.py; this file knows no loss and no judge's inside.
"""
import argparse
import contextlib
import copy
import os
import sys
import warnings
from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F

from loss import ddim_mean_std  # noqa: F401
from parts.common import (  # noqa: F401
    Parser, UserError, labelled_grid, make_folder, pick_device, progress_bar, read_prompts, run_cli, to_pil, write_file, write_png)
from parts.weights import hub_out_of_reach

SD15 = "stable-diffusion-v1-5/stable-diffusion-v1-5"  # the living copy; runwayml/stable-diffusion-v1-5 is gone
TOY = os.path.join(os.path.dirname(os.path.realpath(__file__)), "toy")
LORA_FILE = "pytorch_lora_weights.safetensors"        # the name that diffusers looks for in a folder
FULL_FILE = os.path.join("unet", "diffusion_pytorch_model.safetensors")


# ---------------------------------------------------------------------------------------------------------------
# Loading

def resolve_model(model):
    """"auto" -> SD1.5 where there is CUDA, the toy where there is none; "toy" -> its folder. Returns (where, why)."""
    if model == "auto":
        cuda = torch.cuda.is_available()
        return (SD15, "CUDA is here") if cuda else (TOY, "no CUDA here")
    return (TOY, "asked for") if model == "toy" else (model, "asked for")


def load_pipeline(model, device="cpu", dtype=torch.float32):
    """A StableDiffusionPipeline with a DDIM scheduler fit for training; safety checker off, weights frozen.

    model: a diffusers folder, a hub id, "toy" or "auto". dtype: of the frozen weights (LoRA stays fp32); a dict such as
    {"default": torch.bfloat16, "unet": torch.float32} names parts.
    Only safetensors are read. The scheduler is made from the model's own config; settings under which DDIM's last
    step has no noise (log-ratios would be infinite) or clips samples are corrected, and said on stderr.
    Raises UserError for a missing, incomplete, damaged or unsuitable model.
    """
    from transformers.utils import logging
    logging.disable_progress_bar()
    logging.set_verbosity_error()  # its advice about image processors, which no text-to-image model has a use for
    from diffusers import DDIMScheduler, StableDiffusionPipeline
    from diffusers.utils import logging
    logging.disable_progress_bar()
    warnings.filterwarnings("ignore", message=".*local_dir_use_symlinks")  # diffusers 0.42 against huggingface_hub 2
    where, _ = resolve_model(model)
    if os.path.isdir(where):
        check_folder(where)
    elif os.path.exists(where) or where.startswith((".", "/", "~")) or where.count("/") != 1:
        raise UserError(f"no model folder {where!r}: give a diffusers folder, a hub id such as {SD15}, or 'toy'")
    local = os.path.isdir(where) or hub_out_of_reach()
    try:
        scheduler = _ddim(DDIMScheduler.load_config(where, subfolder="scheduler", local_files_only=local))
        pipe = StableDiffusionPipeline.from_pretrained(
            where, scheduler=scheduler, dtype=dtype, local_files_only=local, use_safetensors=True, safety_checker=None,
            requires_safety_checker=False, feature_extractor=None, image_encoder=None, low_cpu_mem_usage=False)
    except UserError:
        raise
    except Exception as e:  # hub, disk and config errors come as a dozen types; each is one wrong model
        first = str(e).strip().splitlines()[0] if str(e).strip() else type(e).__name__
        hint = "check the folder" if os.path.isdir(where) else \
            "is the id right and the hub in reach? A folder (--model DIR) or an earlier download needs no network"
        raise UserError(f"cannot load model {where!r}: {hint} ({first[:200]})") from e
    if pipe.unet.config.addition_embed_type or pipe.unet.config.cross_attention_dim != pipe.text_encoder.config.hidden_size:
        raise UserError(f"model {where!r} is not of Stable Diffusion 1's shape (one text encoder, no added conditions)")
    if pipe.unet.config.in_channels != pipe.vae.config.latent_channels:
        raise UserError(f"model {where!r} is not a text-to-image model: its UNet takes {pipe.unet.config.in_channels} "
                        f"channels, its VAE makes {pipe.vae.config.latent_channels}")
    for part in (pipe.unet, pipe.vae, pipe.text_encoder):
        part.requires_grad_(False).eval().to(device)
    scheduler.alphas_cumprod = scheduler.alphas_cumprod.to(device)  # or every step would copy it, and wait for the copy
    pipe.set_progress_bar_config(disable=True)
    return pipe


def load_preview(where, pipe):
    """A tiny autoencoder (TAESD: madebyollin/taesd) that decodes what the judge sees, at a twentieth of the VAE's cost.

    Raises UserError if it cannot be had, or its latents or images are not of the pipeline's shape.
    """
    from diffusers import AutoencoderTiny
    try:
        vae = AutoencoderTiny.from_pretrained(where, dtype=pipe.vae.dtype, use_safetensors=True,
                                              local_files_only=os.path.isdir(where) or hub_out_of_reach())
    except Exception as e:  # as in load_pipeline: a dozen types, one wrong model
        first = str(e).strip().splitlines()[0] if str(e).strip() else type(e).__name__
        raise UserError(f"cannot load the preview decoder {where!r}: give an AutoencoderTiny's folder or hub id, such as madebyollin/taesd ({first[:160]})") from e
    vae.requires_grad_(False).eval().to(pipe.unet.device)
    shapes = [(v.config.latent_channels, 2 ** (len(v.config.get("decoder_block_out_channels", v.config.get("block_out_channels"))) - 1))
              for v in (vae, pipe.vae)]
    if shapes[0] != shapes[1]:
        raise UserError(f"the preview decoder {where!r} takes {shapes[0][0]} channels and enlarges {shapes[0][1]} times, the model's VAE "
                        f"{shapes[1][0]} and {shapes[1][1]}: give one made for this model")
    return vae


def check_folder(folder):
    """Raises UserError, naming the part, unless folder holds every part of a Stable Diffusion, whole."""
    from safetensors import SafetensorError, safe_open
    for part in ("model_index.json", "unet/config.json", "vae/config.json", "text_encoder/config.json",
                 "tokenizer", "scheduler/scheduler_config.json"):
        if not os.path.exists(os.path.join(folder, part)):
            raise UserError(f"model folder {folder!r} lacks {part}: it must be a whole diffusers Stable Diffusion folder")
    for part in ("unet", "vae", "text_encoder"):
        files = [f for f in os.listdir(os.path.join(folder, part)) if f.endswith(".safetensors")]
        if not files:
            raise UserError(f"model folder {folder!r} has no .safetensors in {part}/: save it with safe_serialization=True")
        for name in files:
            try:
                safe_open(os.path.join(folder, part, name), "pt")  # reads the header and checks the file's length
            except (SafetensorError, OSError) as e:
                raise UserError(f"{os.path.join(folder, part, name)} is damaged ({e}): copy or download it again") from e


def _ddim(config):
    """A DDIM scheduler from any scheduler's config; corrections are said aloud, what cannot be corrected is refused."""
    from diffusers import DDIMScheduler
    if config.get("prediction_type", "epsilon") != "epsilon" or config.get("rescale_betas_zero_snr"):
        raise UserError("only noise-predicting models (prediction_type epsilon, no zero-SNR rescaling) can be aligned "
                        f"here; this one's scheduler says prediction_type {config.get('prediction_type')}")
    # set_alpha_to_one or steps_offset 0 make the last step's std 0; "leading" is what t - T/num_steps assumes. What the
    # config leaves unsaid is not a choice: DDIMScheduler.from_config would fill in clip_sample=True, for one.
    needed = dict(clip_sample=False, thresholding=False, set_alpha_to_one=False, steps_offset=1,
                  timestep_spacing="leading")
    changed = {k: v for k, v in needed.items() if k in config and config[k] != v}
    if changed:
        print("scheduler corrected: " + ", ".join(f"{k} {config[k]} -> {v}" for k, v in changed.items()), file=sys.stderr)
    return DDIMScheduler.from_config({k: v for k, v in config.items() if k not in needed}, **needed)


def latent_shape(pipe):
    """(C, h, w) of one latent: (4, 64, 64) for SD1.5."""
    size = pipe.unet.config.sample_size
    h, w = (size, size) if isinstance(size, int) else size
    return pipe.unet.config.in_channels, h, w


# ---------------------------------------------------------------------------------------------------------------
# LoRA: W x + B A x with A (r, in), B (out, r) and alpha = r, so that the scale is 1

TARGETS = ("to_q", "to_k", "to_v", "to_out.0")  # of every attention of the UNet, as SPO trains them


class LoRALinear(nn.Linear):
    """A frozen linear layer and a trainable low-rank one beside it. Shares the base layer's weight, copies nothing."""

    def __init__(self, base, rank):
        super().__init__(base.in_features, base.out_features, bias=base.bias is not None, device="meta")
        self.weight, self.bias, self.on = base.weight, base.bias, True
        # fp32 whatever the base: a bf16 parameter of 1e-2 cannot take a step of 6e-5 (only 5 % of them moved in SPO)
        self.lora_A = nn.Parameter(torch.empty(rank, base.in_features, device=base.weight.device))
        self.lora_B = nn.Parameter(torch.zeros(base.out_features, rank, device=base.weight.device))
        nn.init.normal_(self.lora_A, std=1 / rank)

    def forward(self, x):  # (..., in) -> (..., out)
        y = F.linear(x, self.weight, self.bias)
        if self.on:
            y = y + F.linear(F.linear(x, self.lora_A.to(x.dtype)), self.lora_B.to(x.dtype))
        return y


def lora_layers(unet):
    """[(name, LoRALinear)], in the UNet's order."""
    return [(name, m) for name, m in unet.named_modules() if isinstance(m, LoRALinear)]


def add_lora(unet, rank):
    """Puts a LoRA of `rank` on every attention projection; B = 0, so the output is unchanged. Returns its parameters.

    A list, not an iterator: an iterator handed to the optimiser is empty when clip_grad_norm_ gets it (SPO, LPO).
    """
    if lora_layers(unet):
        raise ValueError("this UNet already carries a LoRA")
    for name, module in list(unet.named_modules()):
        if isinstance(module, nn.Linear) and name.endswith(TARGETS):
            parent, child = name.rsplit(".", 1)
            setattr(unet.get_submodule(parent), child, LoRALinear(module, rank))
    return [p for _, m in lora_layers(unet) for p in (m.lora_A, m.lora_B)]


@contextlib.contextmanager
def lora_off(unet):
    """Inside, the UNet IS the reference policy: the same weights without their LoRA, no second copy in memory."""
    layers = [m for _, m in lora_layers(unet)]
    was = [m.on for m in layers]
    for m in layers:
        m.on = False
    try:
        yield unet
    finally:
        for m, on in zip(layers, was):
            m.on = on


def train_all(pipe, dtype=None):
    """--full: every weight of the UNet trains, in fp32; its frozen copy is the reference. Returns the parameters, a list.

    dtype: what both compute in (see predict_noise), by default the UNet's. Both have fp32 weights, which can take a small step, and
    the same autocast: if only one had it, its normalisations would round otherwise, and X would not be 1 at the start.
    """
    pipe.unet.compute_dtype = dtype or pipe.unet.dtype
    pipe.unet.float()
    pipe.frozen_unet = copy.deepcopy(pipe.unet)
    return list(pipe.unet.requires_grad_(True).parameters())


@contextlib.contextmanager
def as_reference(pipe):
    """Inside, pipe.unet IS the reference policy: with its LoRA off or, where all of it trains, its frozen copy."""
    policy = pipe.unet
    pipe.unet = getattr(pipe, "frozen_unet", policy)
    try:
        with lora_off(pipe.unet):
            yield
    finally:
        pipe.unet = policy


def policy_state(pipe):
    """{name: tensor} of all that trains."""
    if hasattr(pipe, "frozen_unet"):
        return {k: v.detach().cpu().contiguous() for k, v in pipe.unet.state_dict().items()}
    return lora_state(pipe.unet)


def set_policy(pipe, state, path):
    """Copies policy_state's tensors back, strictly: raises UserError if they are of another model."""
    if not hasattr(pipe, "frozen_unet"):
        return set_lora(pipe.unet, state, path)
    mine = pipe.unet.state_dict()
    odd = sorted(mine.keys() ^ state.keys()) or [k for k in mine if mine[k].shape != state[k].shape]
    if odd:
        raise UserError(f"the UNet in {path} is of another model: {len(odd)} of its tensors differ, such as {odd[0]}")
    pipe.unet.load_state_dict(state)


def save_policy(pipe, folder, state):
    """For others: the LoRA, or the whole UNet as folder/unet, which UNet2DConditionModel.from_pretrained reads. state: policy_state's."""
    if not hasattr(pipe, "frozen_unet"):
        return save_lora(pipe.unet, folder)
    from safetensors.torch import save
    os.makedirs(os.path.join(folder, "unet"), exist_ok=True)
    write_file(os.path.join(folder, "unet", "config.json"), pipe.unet.to_json_string().encode())
    write_file(os.path.join(folder, FULL_FILE), save(state, metadata={"format": "pt"}))


def policy_file(folder):
    """The file that holds a run's policy, LoRA or UNet; None if there is none. A file is its own; a whole model is no run."""
    files = [LORA_FILE] + ([] if os.path.exists(os.path.join(folder, "model_index.json")) else [FULL_FILE, os.path.basename(FULL_FILE)])
    return next((f for f in [folder, *(os.path.join(folder, f) for f in files)] if os.path.isfile(f)), None)


def load_policy(pipe, folder):
    """A run's policy into the pipeline, whose own UNet stays the reference: see as_reference. Raises UserError."""
    path = policy_file(folder)
    state = read_policy(path, folder)
    if not any(k in state for k in ("conv_in.weight", "conv_in.bias")):
        return load_lora(pipe.unet, path)
    dtype = pipe.unet.dtype
    train_all(pipe)
    set_policy(pipe, state, path)
    for unet in (pipe.unet.requires_grad_(False), pipe.frozen_unet):
        unet.to(dtype)


def lora_state(unet):
    """{name: tensor} under the names that diffusers and peft read."""
    return {f"unet.{name}.{part}.weight": getattr(m, part).detach().cpu().contiguous()
            for name, m in lora_layers(unet) for part in ("lora_A", "lora_B")}


def save_lora(unet, folder):
    """Writes folder/pytorch_lora_weights.safetensors, which pipe.load_lora_weights(folder) reads in plain diffusers."""
    from safetensors.torch import save
    write_file(os.path.join(folder, LORA_FILE), save(lora_state(unet), metadata={"format": "pt"}))


def load_lora(unet, folder):
    """Loads a run's LoRA (a folder, or the file itself) into the UNet, adding it if need be. Returns its parameters.

    Raises UserError if there is none, it is damaged, or its rank or its layers are not this UNet's.
    """
    path = os.path.join(folder, LORA_FILE) if os.path.isdir(folder) else folder
    state = read_policy(path, folder)
    ranks = {v.shape[0] for k, v in state.items() if k.endswith("lora_A.weight")}
    if not ranks:
        raise UserError(f"{path} holds no LoRA in diffusers' names (unet. ... .lora_A.weight)")
    if not lora_layers(unet):
        add_lora(unet, min(ranks))
    set_lora(unet, state, path)
    return [p for _, m in lora_layers(unet) for p in (m.lora_A, m.lora_B)]


def read_policy(path, given):
    """{name: tensor} of a LoRA's or a UNet's safetensors file; given: how the user named it. Raises UserError."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file
    if path is None or not os.path.isfile(path):
        raise UserError(f"no LoRA at {given!r}: give a run's folder, with {LORA_FILE} or (of --full) unet/ in it, or such a file")
    try:
        return load_file(path)
    except (SafetensorError, OSError) as e:
        raise UserError(f"{path} is damaged ({e}): train again or copy it again") from e


def set_lora(unet, state, path):
    """Copies {name: tensor} into the UNet's LoRA, strictly: same layers, same shapes. path is for the message."""
    mine = lora_state(unet)
    odd = sorted(set(mine) ^ set(state))
    if odd:
        raise UserError(f"the LoRA in {path} was made for another model: {len(odd)} layers differ, such as {odd[0]}")
    wrong = [k for k in mine if mine[k].shape != state[k].shape]
    if wrong:
        raise UserError(f"the LoRA in {path} has another rank or size: {wrong[0]} is {tuple(state[wrong[0]].shape)}, "
                        f"here it is {tuple(mine[wrong[0]].shape)}")
    with torch.no_grad():
        for name, m in lora_layers(unet):
            m.lora_A.copy_(state[f"unet.{name}.lora_A.weight"])
            m.lora_B.copy_(state[f"unet.{name}.lora_B.weight"])


# ---------------------------------------------------------------------------------------------------------------
# One denoising step

@torch.no_grad()
def encode_prompts(pipe, prompts):
    """(N, 77, C) text states, padded to the model's length; longer prompts are cut, as everywhere in diffusers."""
    ids = pipe.tokenizer(list(prompts), padding="max_length", truncation=True,
                         max_length=pipe.tokenizer.model_max_length, return_tensors="pt").input_ids
    return pipe.text_encoder(ids.to(pipe.text_encoder.device))[0]


def predict_noise(unet, x_t, t, text, null, guidance):
    """Classifier-free guided noise prediction in fp32: null + guidance (text - null); two UNet rows per image.

    x_t: (N, C, h, w) fp32; t: (N,); text: (N, L, C); null: (1, L, C), the empty prompt. guidance <= 1 asks for no
    guidance, diffusers' convention: one row per image. A frozen UNet runs in its own dtype, without autocast, which
    would keep every normalisation's input in fp32 (twice the memory of a training step); one that trains (train_all) has
    fp32 weights and needs it.
    """
    held = unet.conv_in.weight.dtype
    half = getattr(unet, "compute_dtype", held)
    with torch.autocast(x_t.device.type, half) if half != held else contextlib.nullcontext():
        x = x_t.to(half)
        if guidance <= 1:
            return unet(x, t, text, return_dict=False)[0].float()
        rows = torch.cat([x, x]), torch.cat([t, t]), torch.cat([null.expand_as(text), text])
        eps_null, eps_text = unet(*rows, return_dict=False)[0].float().chunk(2)
        return eps_null + guidance * (eps_text - eps_null)


def in_slices(f, size, *rows, fill=False):
    """f(*rows) by slices of `size` rows, joined again. fill: a short last slice is filled up with copies of its first
    row, so that f meets one shape and one layout alone: torch.compile makes code anew for every other."""
    out = []
    for part in zip(*(x.split(size) for x in rows)):
        short = size - len(part[0])
        if fill:
            part = [torch.cat([x, x[:1].expand(short, *x.shape[1:])]).contiguous() for x in part]
        out.append(f(*part)[:size - short])
    return torch.cat(out)


def compile_at(f, *sizes):
    """torch.compile of a function of rows that will meet batches of exactly these sizes, whatever it is given: of the
    sizes that which wastes the fewest rows, the larger if equal."""
    fast = torch.compile(f, dynamic=False)
    def call(*rows):
        n = len(rows[0])
        size = min(sizes, key=lambda s: (-(-n // s) * s, -s))
        return in_slices(fast, size, *rows, fill=True)
    return call


def compile_pipeline(pipe, *unet_rows):
    """Compiles UNet and VAE decoder; unet_rows: the batch sizes that the UNet will meet (rows, two an image if guided)."""
    def compile_unet(unet):
        forward = unet.forward
        noise = compile_at(lambda x, t, text: forward(x, t, text, return_dict=False)[0], *unet_rows)
        unet.forward = lambda x, t, text, return_dict=False: (noise(x, t, text),)
    compile_unet(pipe.unet)
    if hasattr(pipe, "frozen_unet"):
        compile_unet(pipe.frozen_unet)
    pipe.vae.decoder.forward = compile_at(pipe.vae.decoder.forward, decode_size(pipe))


def decode_size(pipe):
    """How many images the VAE decodes at once: about a megapixel, since more is no faster and the VAE is the memory's peak."""
    _, h, w = latent_shape(pipe)
    return max(1, min(16, 2 ** 20 // (h * w * pipe.vae_scale_factor ** 2)))


@torch.no_grad()
def decode(pipe, latents, vae=None):
    """Latents (N, 4, h, w) -> images (N, 3, H, W) fp32 in [0, 1]. vae: a tiny autoencoder in place of the pipeline's own."""
    vae = vae or pipe.vae
    scaled = (latents / vae.config.scaling_factor).to(vae.dtype)
    return in_slices(lambda z: (vae.decode(z).sample.float() / 2 + 0.5).clamp(0, 1), decode_size(pipe), scaled)


@torch.no_grad()
def generate(pipe, prompts, seeds, num_steps=20, guidance=5.0, eta=0.0, batch_size=16, progress=None):
    """Images (N, 3, H, W) in [0, 1], on the CPU, from N prompts and N seeds; DDIM, eta 0 as SPO is evaluated.

    One generator per image, always on the CPU: seed k is the same picture at any batch size and on any device.
    progress: called with the number of images done after each batch.
    """
    if len(prompts) != len(seeds):
        raise ValueError(f"{len(prompts)} prompts but {len(seeds)} seeds")
    pipe.scheduler.set_timesteps(num_steps)
    timesteps, table = pipe.scheduler.timesteps.tolist(), pipe.scheduler.alphas_cumprod
    device, shape, null = pipe.unet.device, latent_shape(pipe), encode_prompts(pipe, [""])
    images = []
    for i in range(0, len(prompts), batch_size):
        text = encode_prompts(pipe, prompts[i:i + batch_size])
        generators = [torch.Generator().manual_seed(s) for s in seeds[i:i + batch_size]]
        noise = lambda: torch.stack([torch.randn(shape, generator=g) for g in generators]).to(device)
        x = noise()  # (B, 4, h, w)
        for t in timesteps:
            t = torch.full((len(x),), t, device=device)
            mean, std, _ = ddim_mean_std(predict_noise(pipe.unet, x, t, text, null, guidance), x, t, table, num_steps, eta)
            x = mean + std * noise() if eta > 0 else mean
        images.append(decode(pipe, x).cpu())
        if progress:
            progress(len(x))
    return torch.cat(images)


# ---------------------------------------------------------------------------------------------------------------
# Preference pairs: SPO's step-wise pool

@dataclass
class Pairs:
    """M pairs (x_t, t, prompt, x_w, x_l): two children of one x_t, of which the judge prefers x_w, clearly."""
    x_t: torch.Tensor      # (M, 4, h, w) fp32
    x_w: torch.Tensor      # (M, 4, h, w)
    x_l: torch.Tensor      # (M, 4, h, w)
    t: torch.Tensor        # (M,) int64, the timestep of x_t
    prompt: torch.Tensor   # (M,) int64, a row of text
    text: torch.Tensor     # (P, 77, C) text states of the P prompts of the rollout
    scores: dict           # of the judge: mean, std over every judged child; final: mean of the finished images
    candidates: int        # how many pairs were judged; M of them were clear enough

    def __len__(self):
        return len(self.t)


@torch.no_grad()
def collect_pairs(pipe, judge, prompts, generator, num_children=4, first_step=4, threshold=0.3, num_steps=20, eta=1.0,
                  guidance=5.0, progress=None, preview=None):
    """One rollout of SPO (arXiv 2406.04314, sec. 3): a trajectory per prompt, judged step by step. Returns Pairs.

    From step `first_step` on, every x_t gets num_children = K children x_{t-1}. The UNet's next predictions tell each
    child's x0, which is decoded and judged at the child's own timestep (the last children are images, judged at 0).
    Best and worst are a pair if softmax([best, worst]) differs by more than threshold, i.e. best - worst >
    2 atanh(threshold) (0.619 logits for 0.3). A RANDOM child goes on, so the judge does not steer the trajectory, and
    its prediction, already made to judge it, is its step's: 130 UNet rows per prompt at the default settings, in batches
    of 2 P rows with children and without, so that memory and compiled code know one size.
    judge: encode(prompts) -> text, one row per prompt, asked once; judge(images, text, t) -> (N,) scores. A NaN or
    infinite score makes its pair invalid. generator: of the CPU; the pairs are a function of its seed and the policy.
    progress: called after each of the num_steps steps. preview: a tiny autoencoder that decodes for the judge; at every
    fourth judged step the VAE does as well, and scores["preview_agreement"] is the share of children's pairs that both
    order alike (it is not equivalent: 1/2 would be no relation at all).
    """
    if num_children < 2:
        raise ValueError("num_children must be at least 2: a pair needs two children")
    if not 0 <= first_step < num_steps:
        raise ValueError(f"first_step must lie in 0..{num_steps - 1}, before the sampler ends, got {first_step}")
    if eta <= 0:
        raise ValueError("eta must be positive: without noise all children are the same")
    P, K, device = len(prompts), num_children, pipe.unet.device
    pipe.scheduler.set_timesteps(num_steps)
    timesteps, table = pipe.scheduler.timesteps.tolist(), pipe.scheduler.alphas_cumprod
    text, null = encode_prompts(pipe, prompts), encode_prompts(pipe, [""])
    judge_text = judge.encode(prompts)
    randn = lambda *shape: torch.randn(*shape, *latent_shape(pipe), generator=generator).to(device)
    found = {k: [] for k in ("x_t", "x_w", "x_l", "t", "prompt")}
    all_scores, agreement, rows = [], [], torch.arange(P, device=device)

    def judge_children(x0, t_child, parent, children, t):
        """x0, children: (P, K, 4, h, w). Keeps the clear pairs of this step; returns nothing."""
        look = lambda vae: judge(decode(pipe, x0.flatten(0, 1), vae), judge_text.repeat_interleave(K, 0),
                                 torch.full((P * K,), t_child, device=device)).float().view(P, K)
        s = look(preview)
        if preview is not None and len(all_scores) % 4 == 0:
            i, j = torch.triu_indices(K, K, 1, device=device)
            order, full = (v[:, i] - v[:, j] for v in (s, look(None)))
            agreement.append(((order > 0) == (full > 0)).float().mean())
        all_scores.append(s)
        (best, w), (worst, l) = s.max(1), s.min(1)
        ok = s.isfinite().all(1) & (torch.tanh((best - worst) / 2) > threshold)  # = softmax gap of the two
        for k, v in (("x_t", parent), ("x_w", children[rows, w]), ("x_l", children[rows, l]),
                     ("t", torch.full((P,), t, device=device)), ("prompt", rows)):
            found[k].append(v[ok])

    x = randn(P)                    # (P, 4, h, w), or the K children of every prompt, flat: (P K, 4, h, w)
    parent = children = None
    for i, t in enumerate(timesteps):
        n = len(x) // P
        tt = torch.full((len(x),), t, device=device)
        eps = in_slices(lambda *rows: predict_noise(pipe.unet, *rows, null, guidance), P, x, tt, text.repeat_interleave(n, 0))
        mean, std, x0 = ddim_mean_std(eps, x, tt, table, num_steps, eta)
        if children is not None:    # x are children of `parent`, made at the step before
            judge_children(x0.view(P, K, *x0.shape[1:]), t, parent, children, timesteps[i - 1])
            pick = torch.randint(K, (P,), generator=generator).to(device)
            x, mean, std = (v.view(P, K, *v.shape[1:])[rows, pick] for v in (x, mean, std))
        if i < first_step:
            x = mean + std * randn(P)
        else:
            parent = x
            children = mean[:, None] + std[:, None] * randn(P, K)  # (P, K, 4, h, w)
            x = children.flatten(0, 1)
        if progress:
            progress()
    judge_children(children, 0, parent, children, timesteps[-1])
    s = torch.stack(all_scores)     # (steps, P, K)
    finite = s[s.isfinite()]
    scores = {"mean": finite.mean().item(), "std": finite.std().item() if len(finite) > 1 else float("nan"), "final": s[-1][s[-1].isfinite()].mean().item()}
    if agreement:
        scores["preview_agreement"] = torch.stack(agreement).mean().item()
    return Pairs(**{k: torch.cat(v) for k, v in found.items()}, text=text, scores=scores, candidates=len(all_scores) * P)


# ---------------------------------------------------------------------------------------------------------------
# Command line

def main():
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("prompt", nargs="*", help="prompts, each in quotes")
    parser.add_argument("--prompts", metavar="FILE", help="a file of prompts, one a line, instead or as well")
    parser.add_argument("--model", default="auto", help="auto, toy, a diffusers folder or a hub id (default: auto)")
    parser.add_argument("--lora", metavar="RUN", help="a run's folder (of a --full run as well), or a LoRA file; the reference is drawn above it")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4, 5], help="one image per prompt and seed")
    parser.add_argument("--num_inference_steps", type=int, default=20)
    parser.add_argument("--guidance_scale", type=float, default=5.0)
    parser.add_argument("--eta", type=float, default=0.0, help="0 is deterministic DDIM, 1 is what training samples with")
    parser.add_argument("--batch_size", type=int, default=16)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--output_dir", default="out/samples")
    args = parser.parse_args()
    prompts = args.prompt + (read_prompts(args.prompts) if args.prompts else [])
    if not prompts:
        raise UserError('nothing to paint: give a prompt in quotes ("a red sun over a sea") or --prompts FILE')
    if not 1 <= args.num_inference_steps <= 500 or args.batch_size < 1 or not args.eta >= 0:
        raise UserError("--num_inference_steps must lie in 1..500, --batch_size be at least 1, --eta at least 0")
    device = pick_device(args.device)
    where, why = resolve_model(args.model)
    print(f"model: {where} ({why}), on {device}")
    pipe = load_pipeline(where, device, torch.float16 if device.startswith("cuda") else torch.float32)
    policies = ["reference"]
    if args.lora:
        load_policy(pipe, args.lora)
        policies.append("aligned")
    make_folder(args.output_dir)
    each = [p for p in prompts for _ in args.seeds]
    rows = {}
    with progress_bar(total=len(each) * len(policies), unit="image") as bar:
        for policy in policies:
            with as_reference(pipe) if policy == "reference" else contextlib.nullcontext():
                images = generate(pipe, each, args.seeds * len(prompts), args.num_inference_steps, args.guidance_scale,
                                  args.eta, args.batch_size, bar.update)
            rows[policy] = images.view(len(prompts), len(args.seeds), *images.shape[1:])
    last = policies[-1]  # single files are of the model asked for; the grid shows the reference as well
    for i, images in enumerate(rows[last]):
        for seed, image in zip(args.seeds, images):
            write_png(to_pil(image), os.path.join(args.output_dir, f"{i:03d}_seed{seed}.png"))
    grid = [(f"{prompt}   [{policy}]" if args.lora else prompt, rows[policy][i])
            for i, prompt in enumerate(prompts) for policy in policies]
    labelled_grid(grid, os.path.join(args.output_dir, "grid.png"), cell=128 if images.shape[-1] < 128 else 256)
    print(f"{len(each)} images and grid.png in {args.output_dir}")


if __name__ == "__main__":
    run_cli(main)
