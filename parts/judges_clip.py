"""CLIP's family of judges: clipscore, pickscore, hps, aesthetic, and SPO's step-aware model.

All compare one embedding of the image with one of the prompt. They differ in the weights, in how
the image is shrunk, and in what the cosine is multiplied by; each class below says how.
"""

import math
import re

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

from loss import at_least_fp32
from parts.common import to_pil
from parts.fast import compile_at
from parts.images import to_pixels
from parts.weights import build, find, find_url, load_tokenizer, read_folder, read_state

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
CLIP_H = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"


def tower(width, layers, heads, activation="gelu", **others):
    """A transformer in the words of transformers' configurations, whose defaults differ in silence.
    So CLIPConfig's own activation, quick_gelu, would give plausible but wrong cosines here."""
    return dict(
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        hidden_act=activation,
        **others,
    )


VIT_H = dict(
    projection_dim=1024,
    text_config=tower(1024, 24, 16),
    vision_config=tower(1280, 32, 16, patch_size=14),
)


class CLIP:
    """scale * cosine of CLIP's embeddings of an image and a prompt. The subclasses fill this in.
    The weights are frozen (parts/weights.build), so that no graph is kept without torch.no_grad."""

    file = None  # None: the repo is a model's folder in transformers' format, with a config.json
    CONFIG = VIT_H  # where there is a file and so no config.json
    NAMES = {}  # {pattern: replacement}: the checkpoint's names -> transformers'
    resize = "pillow"  # see preprocess
    crop = round
    scale = None  # None: the checkpoint's own exp(logit_scale), about 100
    cuda_dtype = torch.float32  # fp16 where the reference runs in it
    reads_prompt = True

    def __init__(self, device, weights, dtype=None):
        from transformers import CLIPConfig, CLIPModel, CLIPTokenizer

        dtype = dtype or (self.cuda_dtype if "cuda" in str(device) else torch.float32)
        where = find(self.repo, self.file, weights)
        config, state = (self.CONFIG, read_state(where)) if self.file else read_folder(where)
        config, state = CLIPConfig(**config), self.rename(state)
        self.clip = build(lambda: self.extend(CLIPModel(config)), state, where, device, dtype)
        self.size = config.vision_config.image_size
        if self.reads_prompt:
            self.tokenizer = load_tokenizer(CLIPTokenizer, CLIP_H, weights)

    def rename(self, state):
        return renamed(state, self.NAMES)

    def extend(self, clip):  # StepAware hangs further modules into it
        return clip

    def encode(self, prompts):
        """(P, D) unit vectors. A long prompt is cut to 77 tokens, its end token kept."""
        limit = self.clip.config.text_config.max_position_embeddings
        ids = tokenize(self.tokenizer, prompts, limit)[:, 0]  # (P, 77)
        return torch.cat([self.encode_ids(some) for some in ids.split(64)])

    def encode_ids(self, ids):
        embedding = self.clip.get_text_features(ids.to(self.clip.device)).pooler_output
        return F.normalize(at_least_fp32(embedding), dim=-1)

    def __call__(self, images, text, t=None):
        return self.score(self.embed(images, t), text)

    def embed(self, images, t=None):
        """(N, 3, H, W) in [0, 1] -> (N, D) unit vectors: their products compare two images.
        t (N,): the timesteps, which StepAware alone reads; None is 0, finished images."""
        images = images.to(self.clip.device)
        pixels = preprocess(images, self.size, self.resize, self.crop)
        t = torch.zeros(len(images)) if t is None else t
        return F.normalize(self.features(pixels, t.to(images.device)), dim=-1)

    def features(self, pixels, t=None):
        """(N, 3, S, S), preprocessed -> (N, D), not normalised."""
        return at_least_fp32(self.clip.get_image_features(pixels.to(self.clip.dtype)).pooler_output)

    def score(self, image, text):
        """(N, D) and (N, D) unit vectors -> (N,)."""
        scale = self.scale or at_least_fp32(self.clip.logit_scale).exp()
        return scale * (image * text.to(image.device)).sum(-1)

    def compile(self, size):
        """torch.compile of the vision tower, for `size` images at a time."""
        self.features = compile_at(self.features, size)


class CLIPScore(CLIP):
    """The bare cosine of CLIP ViT-H-14, as Diffusion-DPO and those after it print it."""

    repo = CLIP_H
    resize = "tensor"
    scale = 1


class PickScore(CLIP):
    """CLIP ViT-H-14 tuned on Pick-a-Pic, with transformers' preprocessing."""

    repo = "yuvalkirstain/PickScore_v1"
    crop = math.floor


class HPS(CLIP):
    """Human preference score v2.0, as its tables print it: CLIP ViT-H-14 tuned on HPD v2."""

    repo = "xswu/HPSv2"
    file = "HPS_v2_compressed.pt"  # HPS_v2.1_compressed.pt scores SD1.5 about 1.6 lower
    resize = "tensor"
    scale = 100
    cuda_dtype = torch.float16
    NAMES = {  # of open_clip
        r"^transformer\.resblocks": "text_model.encoder.layers",
        r"^visual\.transformer\.resblocks": "vision_model.encoder.layers",
        r"\.ln_(\d)": r".layer_norm\1",
        r"\.mlp\.c_fc": ".mlp.fc1",
        r"\.mlp\.c_proj": ".mlp.fc2",
        r"\.attn": ".self_attn",
        r"^ln_final": "text_model.final_layer_norm",
        r"^token_embedding": "text_model.embeddings.token_embedding",
        r"^positional_embedding": "text_model.embeddings.position_embedding.weight",
        r"^text_projection": "text_projection.weight",
        r"^visual\.ln_pre": "vision_model.pre_layrnorm",  # sic
        r"^visual\.ln_post": "vision_model.post_layernorm",
        r"^visual\.conv1": "vision_model.embeddings.patch_embedding",
        r"^visual\.class_embedding": "vision_model.embeddings.class_embedding",
        r"^visual\.positional_embedding": "vision_model.embeddings.position_embedding.weight",
        r"^visual\.proj": "visual_projection.weight",
    }

    def rename(self, state):
        """New names; projections transposed; in_proj split into q, k and v."""
        translated = {}
        for name, value in super().rename(state).items():
            if name in ("text_projection.weight", "visual_projection.weight"):
                translated[name] = value.T.contiguous()
            elif ".in_proj_" in name:
                attention, kind = name.split("in_proj_")  # kind: weight or bias
                for letter, part in zip("qkv", value.chunk(3)):
                    translated[f"{attention}{letter}_proj.{kind}"] = part
            elif name != "attn_mask":
                translated[name] = value  # build() names it if it is not CLIP's
        return translated


class Aesthetic(CLIP):
    """LAION's head on the image embedding of OpenAI's CLIP ViT-L/14; the prompt is not read.
    The embedding is normalised: without that the same file gives other, plausible numbers."""

    repo = "openai/clip-vit-large-patch14"
    HEAD = (
        "https://github.com/christophschuhmann/improved-aesthetic-predictor/raw/main/"
        "sac%2Blogos%2Bava1-l14-linearMSE.pth"
    )
    cuda_dtype = torch.float16
    reads_prompt = False

    def __init__(self, device, weights, dtype=None):
        super().__init__(device, weights, dtype)
        path = find_url(self.HEAD, weights)
        state = renamed(read_state(path), {r"^layers\.": ""})
        width = self.clip.config.projection_dim
        self.head = build(lambda: linear_head(width), state, path, device, dtype or torch.float32)

    def encode(self, prompts):
        return torch.zeros(len(prompts), 0)

    def score(self, image, text):
        return self.head(image)[:, 0]


class StepAware(CLIP):
    """PickScore's CLIP, told how noisy its image is (SPO, Liang et al. 2024).

    It scores the x0 prediction decoded at a denoising step t. Every layer of the vision tower is
    modulated by t (adaLN, Peebles & Xie 2023): gates 1, shifts and scales 0 would be plain CLIP.
    fp16 on CUDA is our choice, the reference runs in fp32.
    """

    repo = "SPO-Diffusion-Models/Step-Aware_Preference_Models"
    file = "sd-v1-5_step-aware_preference_model.bin"
    NAMES = {r"^model\.": ""}
    resize = "vae"
    cuda_dtype = torch.float16
    unclamped = True  # images may overshoot [0, 1]

    def extend(self, clip):
        """Hangs the time conditioning's modules into a CLIPModel, under the checkpoint's names."""
        width = clip.config.vision_config.hidden_size

        def modulation(count):
            return nn.Sequential(nn.SiLU(), nn.Linear(width, count * width))

        for layer in clip.vision_model.encoder.layers:
            layer.adaLN_modulation = modulation(6)
        clip.vision_model.adaLN_modulation = modulation(2)
        clip.t_embedder = nn.ModuleDict({"mlp": two_layers(256, width, nn.SiLU)})
        return clip

    def features(self, pixels, t):
        """(N, 3, S, S), (N,) -> (N, D), not normalised."""
        clip, vision = self.clip, self.clip.vision_model
        time = clip.t_embedder.mlp(sinusoids(t).to(clip.dtype))  # (N, H)
        x = vision.pre_layrnorm(vision.embeddings(pixels.to(clip.dtype)))  # (N, 1 + patches, H)
        for layer in vision.encoder.layers:
            six = layer.adaLN_modulation(time)[:, None].chunk(6, dim=-1)  # each (N, 1, H)
            shift, scale, gate, mlp_shift, mlp_scale, mlp_gate = six
            y = layer.layer_norm1(x) * (1 + scale) + shift
            x = x + gate * layer.self_attn(y, attention_mask=None)[0]
            y = layer.layer_norm2(x) * (1 + mlp_scale) + mlp_shift
            x = x + mlp_gate * layer.mlp(y)
        shift, scale = vision.adaLN_modulation(time).chunk(2, dim=-1)  # (N, H)
        class_token = vision.post_layernorm(x[:, 0]) * (1 + scale) + shift
        return at_least_fp32(clip.visual_projection(class_token))


def sinusoids(t):
    """(N,) timesteps -> (N, 256) fp64: cosines, then sines, of frequencies 1 .. 1/10000."""
    steps = torch.arange(128, dtype=torch.float64, device=t.device) / 128
    angle = t.double()[:, None] * 10000**-steps
    return torch.cat([angle.cos(), angle.sin()], 1)


def two_layers(width, out, activation=nn.GELU):
    return nn.Sequential(nn.Linear(width, out), activation(), nn.Linear(out, out))


def linear_head(width):
    """The head of LAION's aesthetic predictor and of ImageReward: linear layers, nothing between.
    The layers bear their numbers in the checkpoints, where dropouts took some too."""
    widths = [width, 1024, 128, 64, 16, 1]
    head = nn.Sequential()
    for number, inputs, outputs in zip("02467", widths, widths[1:]):
        head.add_module(number, nn.Linear(inputs, outputs))
    return head


def preprocess(images, size, resize="pillow", crop=round):
    """(N, 3, H, W) in [0, 1] -> (N, 3, size, size): short side to `size`, centre crop, normalised.

    resize: "pillow" shrinks 8-bit pixels (open_clip, OpenAI's CLIP, transformers); "tensor" shrinks
    floats, with antialias and without a clamp (torchvision on a tensor: HPSv2's and Diffusion-DPO's
    way), 0.3 grey levels off in the mean; "vae" shrinks what the VAE made, beyond [0, 1] too,
    without antialias, and clamps only after that (SPO). All are bicubic.
    crop: half a pixel of margin is rounded (torchvision) or cut off (math.floor: transformers).
    """
    half = 0.5 if resize == "vae" else 0  # SPO rounds the long side, the others cut it off
    short = min(images.shape[-2:])
    height, width = [int(size * n / short + half) for n in images.shape[-2:]]
    if resize == "pillow":
        small = [to_pil(image).resize((width, height)) for image in images]  # bicubic by default
        x = to_pixels(torch.from_numpy(np.stack(small))).to(images.device)
    else:
        options = dict(mode="bicubic", antialias=resize == "tensor")
        x = F.interpolate(at_least_fp32(images), size=(height, width), **options)
    if resize == "vae":
        x = x.clamp(0, 1)
    top, left = crop((height - size) / 2), crop((width - size) / 2)
    centre = x[..., top : top + size, left : left + size]
    mean, std = x.new_tensor([CLIP_MEAN, CLIP_STD])[..., None, None]  # (3, 1, 1) each
    return (centre - mean) / std


def tokenize(tokenizer, texts, limit, padding="max_length"):
    """(P, 2, L) token ids and their mask, L <= limit, the end token kept."""
    options = dict(padding=padding, truncation=True, max_length=limit, return_tensors="pt")
    tokens = tokenizer(list(texts), **options)
    return torch.stack([tokens.input_ids, tokens.attention_mask], 1)


def renamed(state, names):
    """Every name after all {pattern: replacement}s. Old files' position_ids, 0, 1, 2, ..., go."""
    result = {}
    for name, value in state.items():
        for pattern, replacement in names.items():
            name = re.sub(pattern, replacement, name)
        if not name.endswith("position_ids"):
            result[name] = value
    return result


def take(state, start):
    """Moves what begins with a pattern out of `state`: {the rest of its name: tensor}."""
    names = [name for name in state if re.match(start, name)]
    return renamed({name: state.pop(name) for name in names}, {f"^{start}": ""})
