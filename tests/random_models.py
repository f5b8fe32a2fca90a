"""Stable Diffusion v1.5 and SPO's step-aware judge with random weights: for time and memory alone.

Nothing is downloaded. Their words are the toy's, with SD1.5's 77 tokens a prompt.
"""

import os
from unittest import mock

import torch
import torch.nn.functional as F

from parts.judges_clip import CLIP_H, StepAware
from parts.model import Policy
from parts.weights import TOY, silence_libraries

# of the judge where its published size would be too slow: same code, 0.6 M parameters
SMALL_TOWER = dict(
    hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4
)
SMALL_JUDGE = dict(
    projection_dim=64,
    text_config=SMALL_TOWER,
    vision_config=SMALL_TOWER | dict(image_size=224, patch_size=32),
)


def sd15(device="cpu", dtype=torch.float32):
    """A StableDiffusionPipeline of SD1.5's published size: 860 M, 84 M and 123 M parameters."""
    silence_libraries()
    from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline
    from diffusers import UNet2DConditionModel as UNet
    from diffusers.utils import logging
    from transformers import CLIPTextConfig, CLIPTextModel

    logging.set_verbosity_error()  # or .to(dtype) warns of layers to be kept in fp32: []
    text_config = CLIPTextConfig(
        vocab_size=49408,
        hidden_size=768,
        intermediate_size=3072,
        num_hidden_layers=12,
        num_attention_heads=12,
    )
    with torch.device(device):
        # diffusers' defaults are otherwise SD1.5's
        unet = UNet(sample_size=64, cross_attention_dim=768)
        vae = AutoencoderKL(
            block_out_channels=(128, 256, 512, 512),
            layers_per_block=2,
            down_block_types=["DownEncoderBlock2D"] * 4,
            up_block_types=["UpDecoderBlock2D"] * 4,
            sample_size=512,
            scaling_factor=0.18215,
        )
        text_encoder = CLIPTextModel(text_config)
    for part in (unet, vae, text_encoder):
        part.requires_grad_(False).eval().to(dtype)
    scheduler = DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
    )
    scheduler.alphas_cumprod = scheduler.alphas_cumprod.to(device)
    return StableDiffusionPipeline(
        unet=unet,
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=tokenizer(),
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def tokenizer():
    from transformers import CLIPTokenizer

    words = CLIPTokenizer.from_pretrained(os.path.join(TOY, "tokenizer"))
    words.model_max_length = 77
    return words


def step_aware(config, device="cpu", dtype=torch.float32):
    """The judge, frozen. config: StepAware.CONFIG (its published size) or SMALL_JUDGE."""
    from transformers import CLIPConfig, CLIPModel

    config = CLIPConfig(**config)
    judge = object.__new__(StepAware)  # its __init__ reads a checkpoint
    with torch.device(device):
        judge.clip = judge.extend(CLIPModel(config))
    judge.clip.requires_grad_(False).eval().to(dtype)
    judge.size, judge.tokenizer = config.vision_config.image_size, tokenizer()
    return judge


def save(folder, config=StepAware.CONFIG, make=sd15, device="cpu"):
    """What train.py --model FOLDER/sd15 --weights FOLDER/weights reads, in fp16: 5 GB; taesd, of
    random weights too, is for its --preview_decoder.

    make: of the pipeline, sd15 or (in a test) something small.
    """
    from diffusers import AutoencoderTiny

    pipe = make(device, torch.float16)
    pipe.save_pretrained(os.path.join(folder, "sd15"), safe_serialization=True)
    judge = step_aware(config, device, torch.float16)
    weights = os.path.join(folder, "weights")
    path = os.path.join(weights, StepAware.repo.split("/")[1], StepAware.file)
    os.makedirs(os.path.dirname(path), exist_ok=True)
    torch.save({f"model.{k}": v.cpu() for k, v in judge.clip.state_dict().items()}, path)
    judge.tokenizer.save_pretrained(os.path.join(weights, CLIP_H.split("/")[1]))
    blocks = len(pipe.vae.config.block_out_channels)
    widths = dict.fromkeys(
        ["encoder_block_out_channels", "decoder_block_out_channels"], [64] * blocks
    )
    counts = dict(
        num_encoder_blocks=[1, 3, 3, 3][:blocks], num_decoder_blocks=[3, 3, 3, 1][-blocks:]
    )
    AutoencoderTiny(**widths, **counts).save_pretrained(os.path.join(folder, "taesd"))


# --------------------------------------------------------------------------------------------------
# Memory, counted


class FusedAttention(torch.autograd.Function):
    """What fused attention keeps for its backward pass: q, k, v, its output and a number a row.

    There is no matrix of attention weights. Only for counting: it computes nothing.
    """

    @staticmethod
    def forward(ctx, q, k, v):
        out = torch.empty_like(q)
        row = q.new_empty(q.shape[:3], dtype=torch.float32)
        ctx.save_for_backward(q, k, v, out, row)
        return out


def fused_attention(q, k, v, **options):
    return FusedAttention.apply(q, k, v)


def held_gb(pairs, checkpointing):
    """GB that autograd holds between the forward and the backward pass of `pairs` guided pairs.

    The UNet of SD1.5's size runs on the meta device in bf16; every storage counts once, the weights
    not at all. Of checkpointed blocks the inputs count, not what is computed again.
    """
    unet = sd15("meta", torch.bfloat16).unet
    Policy(unet, rank=4)
    if checkpointing:
        unet.enable_gradient_checkpointing()
        unet.train()
    rows = 2 * pairs  # guidance
    x = torch.empty(rows, 4, 64, 64, device="meta", dtype=torch.bfloat16)
    t = torch.empty(rows, device="meta", dtype=torch.int64)
    text = torch.empty(rows, 77, 768, device="meta", dtype=torch.bfloat16)
    saved = []  # kept alive, so that no storage's address is used twice

    def keep(tensor):
        saved.append(tensor)
        return tensor

    with mock.patch.object(F, "scaled_dot_product_attention", fused_attention):
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            unet(x, t, text)
    storages = {s._cdata: s.nbytes() for s in (tensor.untyped_storage() for tensor in saved)}
    for weight in unet.parameters():
        storages.pop(weight.untyped_storage()._cdata, None)
    return sum(storages.values()) / 1e9


def half_gb(*modules):
    """GB of the weights in half precision."""
    return sum(2 * p.numel() for module in modules for p in module.parameters()) / 1e9


def count_memory(settings=((10, False), (4, False), (1, False), (10, True), (1, True))):
    """settings: (pairs a backward pass, gradient checkpointing?)."""
    pipe = sd15("meta", torch.bfloat16)
    judge = step_aware(StepAware.CONFIG, "meta", torch.bfloat16)
    unet, others = half_gb(pipe.unet), half_gb(pipe.vae, pipe.text_encoder)
    frozen = unet + others + half_gb(judge.clip)
    print(f"counted, not measured. Frozen weights in half precision: UNet {unet:.2f} GB, ", end="")
    print(f"VAE and text encoder {others:.2f} GB, judge {half_gb(judge.clip):.2f} GB\n")
    print("| --train_batch_size | --gradient_checkpointing | held for backward, GB ", end="")
    print("| with the weights, GB |")
    print("|---|---|---|---|")
    for pairs, checkpointing in settings:
        held, answer = held_gb(pairs, checkpointing), "yes" if checkpointing else "no"
        print(f"| {pairs} | {answer} | {held:.1f} | {held + frozen:.1f} |")
