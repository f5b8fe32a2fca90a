"""
Every model that scores an image against a prompt, behind one interface:

    judge = load_judge(name, device)      # weights from the hub, or from a folder: load_judge(name, device, weights=DIR)
    text = judge.encode(prompts)          # a tensor with one row per prompt, so that text[i] is prompt i; asked once
    scores = judge(images, text, t=None)  # images (N, 3, H, W) in [0, 1], text (N, ...), t (N,) timesteps -> (N,)

    name         what it is                            hub id, file                                        size     licence        scale            SD1.5 in the paper
    taste        the toy's: warm light in the sky      none: a formula (toy/world.py)                            0        MIT            about -5 .. 10   -
    step_aware   PickScore's CLIP, told the timestep   SPO-Diffusion-Models/Step-Aware_Preference_Models   5.2 GB   not checked    ~100 * cosine    -
    clipscore    CLIP ViT-H-14, as published           laion/CLIP-ViT-H-14-laion2B-s32B-b79K               3.9 GB   MIT            cosine           0.352
    vqascore     FLAN-T5-xxl shown the image: "Yes"?   zhiqiulin/clip-flant5-xxl                           22.9 GB  Apache-2.0     probability      0.601
    aesthetic    a linear head on CLIP ViT-L/14        openai/clip-vit-large-patch14 + LAION's file        1.7 GB   MIT, Apache    about 1 .. 10    -
    imagereward  BLIP, tuned on rankings               THUDM/ImageReward, ImageReward.pt                   1.8 GB   Apache-2.0     mean 0, std 1    -
    pickscore    CLIP ViT-H-14 tuned on Pick-a-Pic     yuvalkirstain/PickScore_v1                          3.9 GB   MIT (code)     ~100 * cosine    20.908
    hps          CLIP ViT-H-14 tuned on HPD v2 (v2.0)  xswu/HPSv2, HPS_v2_compressed.pt                    2.0 GB   Apache-2.0     100 * cosine     26.933

("-": the value is not at hand.) Which checkpoint, which scale and which resize make a published number: README, "The
fourteen metrics". A folder of weights (--weights DIR) has one subfolder per hub id, named by its last part, as
`hf download xswu/HPSv2 HPS_v2_compressed.pt --local-dir DIR/HPSv2` makes it; single files may lie in DIR itself.

Your own judge is a class with these two methods, made as Judge(device, weights), and a line in JUDGES. Scores that are logits suit `--threshold`:
a pair is trained on if softmax([best, worst]) differs by more than it. A judge may offer report(images, prompts) ->
{name: (N,)}, further figures for the tables, and compile(size), for --compile.
"""
import functools
import math
import os
import re

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

from parts.common import UserError
from parts.weights import WeightsMissing, build, find, find_url, load_tokenizer, read_config, read_folder, read_state  # noqa: F401
from parts.fast import compile_at

CLIP_MEAN, CLIP_STD = (.48145466, .4578275, .40821073), (.26862954, .26130258, .27577711)
CLIP_H = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"
AESTHETIC_HEAD = ("https://github.com/christophschuhmann/improved-aesthetic-predictor/raw/main/"
                  "sac%2Blogos%2Bava1-l14-linearMSE.pth")


# ---------------------------------------------------------------------------------------------------------------
# Preprocessing, in torch. Half of a score's convention is how the image was shrunk.

@functools.lru_cache(maxsize=8)
def _pil_bicubic(n, m):
    """(m, n) integers / 2^22: Pillow's antialiased bicubic from n to m samples, in its own fixed point arithmetic."""
    scale = n / m
    support = 2 * max(scale, 1)
    centre = (np.arange(m)[:, None] + .5) * scale
    x = np.arange(n)[None]
    inside = (x >= np.floor(np.maximum(centre - support + .5, 0))) & (x < np.floor(centre + support + .5))
    d = np.abs((x - centre + .5) / max(scale, 1))
    w = np.where(d < 1, (1.5 * d - 2.5) * d * d + 1, np.where(d < 2, ((d - 5) * d + 8) * d * -.5 + 2, 0)) * inside
    w = w / np.cumsum(w, 1)[:, -1:]                               # summed in order, as the loop in C does
    return torch.from_numpy(np.trunc(w * 2 ** 22 + np.copysign(.5, w)))


def pil_resize(pixels, height, width):
    """(N, 3, H, W) of 0..255 -> (N, 3, height, width): what PIL.Image.resize(BICUBIC) gives, to the last bit.

    Rows first, then columns, each rounded to 8 bits; sums below 2^53 are exact in fp64, on every device.
    """
    x = pixels.double()
    for n, m, turn in ((x.shape[3], width, False), (x.shape[2], height, True)):
        if n != m:
            x = x.mT if turn else x
            x = ((x @ _pil_bicubic(n, m).to(x.device).T + 2 ** 21) / 2 ** 22).floor().clamp(0, 255)
            x = x.mT if turn else x
    return x


def preprocess(images, size, how="pil", crop="round"):
    """(N, 3, H, W) in [0, 1] -> (N, 3, size, size): short side to `size`, centre crop, CLIP's mean and std.

    how: "pil" shrinks 8-bit pixels as Pillow does (open_clip, OpenAI's CLIP, transformers); "tensor" shrinks floats, with
    antialias and without a clamp (torchvision on a tensor: HPSv2's and Diffusion-DPO's convention). The two differ by
    0.3 grey levels in the mean. crop: of an odd margin; "round" is torchvision's, "floor" is transformers'.
    """
    H, W = images.shape[-2:]
    short = min(H, W)
    h, w = (size if n == short else int(size * n / short) for n in (H, W))
    if how == "pil":
        x = pil_resize((images.float() * 255).round(), h, w).float() / 255
    else:
        x = F.interpolate(images.float(), size=(h, w), mode="bicubic", antialias=True, align_corners=False)
    top, left = (int(round((n - size) / 2)) if crop == "round" else (n - size) // 2 for n in (h, w))
    stat = lambda v: torch.tensor(v, device=x.device).view(3, 1, 1)
    return (x[..., top:top + size, left:left + size] - stat(CLIP_MEAN)) / stat(CLIP_STD)


# ---------------------------------------------------------------------------------------------------------------
# The CLIP family

def vit_h():
    """CLIPConfig of CLIP ViT-H-14. hidden_act gelu: the default, quick_gelu, gives plausible but wrong cosines."""
    from transformers import CLIPConfig
    both = dict(hidden_act="gelu", num_attention_heads=16)
    return CLIPConfig(projection_dim=1024, text_config=dict(hidden_size=1024, intermediate_size=4096, num_hidden_layers=24, **both),
                      vision_config=dict(hidden_size=1280, intermediate_size=5120, num_hidden_layers=32, patch_size=14, **both))


def from_open_clip(state):
    """open_clip's names and layouts -> transformers' CLIPModel's: in_proj split into q, k, v; projections transposed."""
    out, embed = {}, "embeddings."
    plain = {"token_embedding.weight": f"text_model.{embed}token_embedding.weight",
             "positional_embedding": f"text_model.{embed}position_embedding.weight", "logit_scale": "logit_scale",
             "visual.class_embedding": f"vision_model.{embed}class_embedding",
             "visual.positional_embedding": f"vision_model.{embed}position_embedding.weight",
             "visual.conv1.weight": f"vision_model.{embed}patch_embedding.weight"}
    turned = {"text_projection": "text_projection.weight", "visual.proj": "visual_projection.weight"}
    norms = {"ln_final": "text_model.final_layer_norm", "visual.ln_pre": "vision_model.pre_layrnorm",  # sic
             "visual.ln_post": "vision_model.post_layernorm"}
    inner = {"ln_1": "layer_norm1", "ln_2": "layer_norm2", "mlp.c_fc": "mlp.fc1", "mlp.c_proj": "mlp.fc2",
             "attn.out_proj": "self_attn.out_proj"}
    for k, v in state.items():
        block = re.fullmatch(r"(visual\.)?transformer\.resblocks\.(\d+)\.(.+?)[._](weight|bias)", k)
        stem, _, kind = k.rpartition(".")
        if k in plain:
            out[plain[k]] = v
        elif k in turned:
            out[turned[k]] = v.T.contiguous()
        elif stem in norms:
            out[f"{norms[stem]}.{kind}"] = v
        elif block and (block[3] in inner or block[3] == "attn.in_proj"):
            layer = f"{'vision' if block[1] else 'text'}_model.encoder.layers.{block[2]}."
            if block[3] in inner:
                out[f"{layer}{inner[block[3]]}.{block[4]}"] = v
            else:
                for name, part in zip("qkv", v.chunk(3)):
                    out[f"{layer}self_attn.{name}_proj.{block[4]}"] = part
        elif k != "attn_mask":
            out[k] = v  # not open_clip's: build() will name it
    return out


class CLIP:
    """Cosines of CLIP's image and text embeddings, in the four ways that are published under four names.

    clipscore, pickscore: a folder in transformers' format; hps: open_clip's names; aesthetic: no text, a head on the
    image embedding. Half precision on CUDA where the reference runs so (hps, aesthetic), fp32 elsewhere.
    """
    #            weights                              tokenizer  resize    odd crop  times                 fp16 on CUDA
    WAYS = {
        "clipscore": (CLIP_H, CLIP_H, "tensor", "round", 1, False),
        "pickscore": ("yuvalkirstain/PickScore_v1", CLIP_H, "pil", "floor", None, False),  # None: exp(logit_scale)
        "hps": ("xswu/HPSv2", CLIP_H, "tensor", "round", 100, True),
        "aesthetic": ("openai/clip-vit-large-patch14", None, "pil", "round", None, True)}
    HPS_FILE = "HPS_v2_compressed.pt"  # v2.0; HPS_v2.1_compressed.pt scores SD1.5 about 1.6 lower

    def __init__(self, name, device="cpu", weights=None):
        from transformers import CLIPConfig, CLIPModel, CLIPTokenizer
        repo, tokenizer, self.how, self.crop, self.times, half = self.WAYS[name]
        self.name = name
        dtype = torch.float16 if half and str(device).startswith("cuda") else torch.float32
        if name == "hps":
            self.where = find(repo, self.HPS_FILE, weights)
            config, state = vit_h(), from_open_clip(read_state(self.where))
        else:
            self.where = find(repo, None, weights)
            config, state = CLIPConfig(**read_config(self.where)), read_folder(self.where)
        self.tokenizer = load_tokenizer(CLIPTokenizer, tokenizer, weights) if tokenizer else None
        state = {k: v for k, v in state.items() if not k.endswith("position_ids")}  # old files hold 0, 1, 2, ... as well
        self.clip = build(lambda: CLIPModel(config), state, self.where, device, dtype)
        self.size = config.vision_config.image_size
        if name == "aesthetic":
            path = find_url(AESTHETIC_HEAD, weights)
            head = {k.removeprefix("layers."): v for k, v in read_state(path).items()}
            self.head = build(lambda: linear_head(config.projection_dim), head, path, device)

    @torch.no_grad()
    def encode(self, prompts):
        """(P, D) unit vectors; 77 tokens at most, the end token kept. (P, 0) for aesthetic, which reads no prompt."""
        if self.tokenizer is None:
            return torch.zeros(len(prompts), 0, device=self.clip.device)
        ids = self.tokenizer(list(prompts), padding="max_length", truncation=True, return_tensors="pt",
                             max_length=self.clip.config.text_config.max_position_embeddings).input_ids
        return torch.cat([self.encode_ids(x) for x in ids.split(64)])

    def compile(self, size):
        """torch.compile of the vision tower, for `size` images at a time."""
        self.embed_pixels = compile_at(self.embed_pixels, size)

    @torch.no_grad()
    def encode_ids(self, ids):
        return F.normalize(self.clip.get_text_features(ids.to(self.clip.device)).pooler_output.float(), dim=-1)

    @torch.no_grad()
    def embed(self, images):
        """(N, 3, H, W) in [0, 1] -> (N, D) unit vectors; their products are the image-image CLIPScore."""
        return self.embed_pixels(preprocess(images.to(self.clip.device), self.size, self.how, self.crop))

    @torch.no_grad()
    def embed_pixels(self, pixels):
        return F.normalize(self.clip.get_image_features(pixels.to(self.clip.dtype)).pooler_output.float(), dim=-1)

    @torch.no_grad()
    def __call__(self, images, text, t=None):
        image = self.embed(images)
        if self.name == "aesthetic":  # without the normalisation the same file gives other, plausible numbers
            return self.head(image)[:, 0]
        times = self.clip.logit_scale.float().exp() if self.times is None else self.times
        return times * (image * text.to(image.device)).sum(-1)


def linear_head(width):
    """The score head of both LAION's aesthetic predictor and ImageReward: five linear layers with nothing in between.
    Dropouts hold the places 1, 3 and 5, so that the layers have their checkpoints' numbers."""
    sizes = [width, 1024, 128, 64, 16, 1]
    layers = [nn.Linear(a, b) for a, b in zip(sizes, sizes[1:])]
    return nn.Sequential(layers[0], nn.Dropout(.2), layers[1], nn.Dropout(.2), layers[2], nn.Dropout(.1), layers[3], layers[4])


# ---------------------------------------------------------------------------------------------------------------
# The step-aware preference model (SPO, Liang et al. 2024): PickScore's CLIP, told how noisy its image is

class StepAware(CLIP):
    """Scores the x0 prediction decoded at a denoising step t: exp(logit_scale) * cosine, as PickScore, but every layer of the
    vision tower is modulated by t (adaLN, Peebles & Xie 2023). With gates 1, shifts and scales 0 it is plain CLIP.

    fp16 on CUDA (the reference: fp32). Images are shrunk without antialias, unlike everywhere else, since the checkpoint was
    trained so; t None is 0, a finished image.
    """
    REPO, FILE = "SPO-Diffusion-Models/Step-Aware_Preference_Models", "sd-v1-5_step-aware_preference_model.bin"

    def __init__(self, device="cpu", weights=None):
        from transformers import CLIPModel, CLIPTokenizer
        self.name, self.times = "step_aware", None
        self.where = find(self.REPO, self.FILE, weights)
        state = {k.removeprefix("model."): v for k, v in read_state(self.where).items() if not k.endswith("position_ids")}
        config = vit_h()
        dtype = torch.float16 if str(device).startswith("cuda") else torch.float32
        self.clip = build(lambda: add_time(CLIPModel(config)), state, self.where, device, dtype)
        self.tokenizer = load_tokenizer(CLIPTokenizer, CLIP_H, weights)
        self.size = config.vision_config.image_size

    @torch.no_grad()
    def __call__(self, images, text, t=None):
        images = images.to(self.clip.device)
        t = torch.zeros(len(images), device=images.device) if t is None else t.to(images.device)
        image = F.normalize(self.embed_at(self.shrink(images), t), dim=-1)
        return self.clip.logit_scale.float().exp() * (image * text.to(image.device)).sum(-1)

    def compile(self, size):
        self.embed_at = compile_at(self.embed_at, size)

    def shrink(self, images):
        """(N, 3, H, W) in [0, 1] -> (N, 3, 224, 224), normalised: torch's bicubic, not antialiased, then clamped."""
        short = min(images.shape[-2:])
        h, w = (int(n * self.size / short + .5) for n in images.shape[-2:])
        x = F.interpolate(images.float(), size=(h, w), mode="bicubic", align_corners=False)
        top, left = (int(round((n - self.size) / 2)) for n in (h, w))
        stat = lambda v: torch.tensor(v, device=x.device).view(3, 1, 1)
        return (x[..., top:top + self.size, left:left + self.size].clamp(0, 1) - stat(CLIP_MEAN)) / stat(CLIP_STD)

    def embed_at(self, pixels, t):
        """(N, 3, S, S), (N,) -> (N, D) fp32, not normalised."""
        clip, tower = self.clip, self.clip.vision_model
        c = clip.t_embedder.mlp(sinusoids(t).to(clip.dtype))                                 # (N, H)
        modulate = lambda x, shift, scale: x * (1 + scale[:, None]) + shift[:, None]
        x = tower.pre_layrnorm(tower.embeddings(pixels.to(clip.dtype)))                      # (N, 257, H)
        for layer in tower.encoder.layers:
            shift, scale, gate, shift2, scale2, gate2 = layer.adaLN_modulation(c).chunk(6, 1)
            x = x + gate[:, None] * layer.self_attn(modulate(layer.layer_norm1(x), shift, scale), attention_mask=None)[0]
            x = x + gate2[:, None] * layer.mlp(modulate(layer.layer_norm2(x), shift2, scale2))
        shift, scale = tower.adaLN_modulation(c).chunk(2, 1)
        x = tower.post_layernorm(x[:, 0]) * (1 + scale) + shift
        return clip.visual_projection(x).float()


def add_time(clip):
    """Hangs the time conditioning's modules into a CLIPModel, under the public checkpoint's names."""
    H = clip.config.vision_config.hidden_size
    modulation = lambda n: nn.Sequential(nn.SiLU(), nn.Linear(H, n * H))
    for layer in clip.vision_model.encoder.layers:
        layer.adaLN_modulation = modulation(6)
    clip.vision_model.adaLN_modulation = modulation(2)
    clip.t_embedder = nn.Module()
    clip.t_embedder.mlp = nn.Sequential(nn.Linear(256, H), nn.SiLU(), nn.Linear(H, H))
    return clip


def sinusoids(t, width=256):
    """(N,) timesteps -> (N, 256) fp64: cosines, then sines, of geometric frequencies 1 .. 1/10000 (DiT's convention)."""
    f = torch.exp(-math.log(10000) * torch.arange(width // 2, dtype=torch.float64, device=t.device) / (width // 2))
    angle = t.double()[:, None] * f
    return torch.cat([angle.cos(), angle.sin()], 1)


# ---------------------------------------------------------------------------------------------------------------
# ImageReward (Xu et al. 2023)

class ImageReward:
    """BLIP's text encoder reads the prompt while it looks at the image; a linear head on its [CLS] token is the reward,
    standardised over the authors' data (mean 0, std 1)."""
    name = "imagereward"
    MEAN, STD = .16717362830052426, 1.0333394966054072
    SIZES = dict(  # transformers' defaults differ from these in places, without a word
        vision=dict(hidden_size=1024, intermediate_size=4096, num_hidden_layers=24, num_attention_heads=16, image_size=224,
                    patch_size=16, hidden_act="gelu", layer_norm_eps=1e-6),
        text=dict(vocab_size=30524, hidden_size=768, encoder_hidden_size=1024, intermediate_size=3072, num_hidden_layers=12,
                  num_attention_heads=12, layer_norm_eps=1e-12, max_position_embeddings=512, hidden_act="gelu"))

    def __init__(self, device="cpu", weights=None):
        from transformers import BertTokenizer, BlipTextConfig, BlipTextModel, BlipVisionConfig, BlipVisionModel
        sizes = self.SIZES
        self.where, self.device = find("THUDM/ImageReward", "ImageReward.pt", weights), device
        self.tokenizer = load_tokenizer(BertTokenizer, "google-bert/bert-base-uncased", weights)
        vision, text, head = self.split(read_state(self.where))
        # is_decoder makes the cross-attention layers; forward leaves its own is_decoder False, so attention is bidirectional
        self.text = build(lambda: BlipTextModel(BlipTextConfig(**sizes["text"], is_decoder=True), add_pooling_layer=False),
                          text, self.where, device)
        self.vision = build(lambda: BlipVisionModel(BlipVisionConfig(**sizes["vision"])), vision, self.where, device)
        self.head = build(lambda: linear_head(sizes["text"]["hidden_size"]), head, self.where, device)

    @staticmethod
    def split(state):
        """The checkpoint's keys -> those of BlipVisionModel, BlipTextModel and the head. BLIP's projections, made for
        its contrastive loss, and the table of positions 0, 1, 2, ... are not used."""
        part = lambda prefix: {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}
        used = ("blip.visual_encoder.", "blip.text_encoder.", "mlp.layers.", "blip.vision_proj.", "blip.text_proj.")
        surplus = {k: v for k, v in state.items() if not k.startswith(used)}
        vision = {}
        for k, v in part(used[0]).items():
            for old, new in (("cls_token", "embeddings.class_embedding"), ("pos_embed", "embeddings.position_embedding"),
                             ("patch_embed.proj.", "embeddings.patch_embedding."), ("attn.qkv.", "self_attn.qkv."),
                             ("attn.proj.", "self_attn.projection."), ("blocks.", "encoder.layers."),
                             ("norm1.", "layer_norm1."), ("norm2.", "layer_norm2.")):
                k = k.replace(old, new)
            vision[re.sub(r"^norm\.", "post_layernorm.", k)] = v
        text = {k: v for k, v in part(used[1]).items() if k != "embeddings.position_ids"}
        return vision, text, part(used[2]) | surplus

    def encode(self, prompts):
        """(P, 2, 35): BERT's token ids and their mask; the text cannot be encoded before the image is seen."""
        x = self.tokenizer(list(prompts), padding="max_length", truncation=True, max_length=35, return_tensors="pt")
        return torch.stack([x.input_ids, x.attention_mask], 1)

    def __call__(self, images, text, t=None):
        return self.reward(preprocess(images.to(self.device), self.vision.config.image_size), text.to(self.device))

    @torch.no_grad()
    def reward(self, pixels, text):
        seen = self.vision(pixels).last_hidden_state                                   # (N, 197, 1024)
        state = self.text(input_ids=text[:, 0], attention_mask=text[:, 1], encoder_hidden_states=seen,
                          encoder_attention_mask=torch.ones(seen.shape[:2], device=seen.device)).last_hidden_state
        return (self.head(state[:, 0])[:, 0] - self.MEAN) / self.STD


# ---------------------------------------------------------------------------------------------------------------
# VQAScore (Lin et al. 2024)

class VQAScore:
    """'Does this figure show "{prompt}"? Please answer yes or no.' Image patches, through a projector, stand among the
    words that a FLAN-T5 reads; the score is sqrt(P("Yes") P(end | "Yes")), the reference's exp(-mean cross entropy).

    bf16 on CUDA, as the reference (scatter 1e-2), else fp32. clip-flant5-xl, a quarter of the size: --judges vqascore
    with a --weights folder in which clip-flant5-xxl is that model.
    """
    name = "vqascore"
    BEFORE = ("A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, "
              "detailed, and polite answers to the user's questions. USER: ")
    AFTER = '\nDoes this figure show "{}"? Please answer yes or no. ASSISTANT: '
    VISION = dict(hidden_size=1024, intermediate_size=4096, num_hidden_layers=24, num_attention_heads=16, image_size=336,
                  patch_size=14, projection_dim=768, hidden_act="quick_gelu")

    def __init__(self, device="cpu", weights=None):
        from transformers import AutoTokenizer, CLIPVisionConfig, CLIPVisionModel, T5Config, T5ForConditionalGeneration
        self.device, self.dtype = device, torch.bfloat16 if str(device).startswith("cuda") else torch.float32
        self.where = find("zhiqiulin/clip-flant5-xxl", None, weights)
        self.tokenizer = load_tokenizer(AutoTokenizer, "google/flan-t5-xl", weights)
        self.yes = self.tokenizer("Yes").input_ids
        if len(self.yes) != 2 or self.yes[1] != self.tokenizer.eos_token_id:
            raise UserError(f'the tokenizer of google/flan-t5-xl reads "Yes" as {self.yes}, not as one token and the end: '
                            "download it again")
        self.words = len(self.tokenizer)     # 32100 of the 32128 logits have a word; the reference cuts the rest off
        config = read_config(self.where)
        sizes = {k: config[k] for k in ("vocab_size", "d_model", "d_kv", "d_ff", "num_layers", "num_decoder_layers", "num_heads",
                                        "relative_attention_num_buckets", "relative_attention_max_distance") if k in config}
        # tie_word_embeddings must be said although T5Config ties anyway: here it means "do not scale the decoder's output"
        state = read_folder(self.where)
        if "shared.weight" in state:
            sizes["vocab_size"] = len(state["shared.weight"])  # 32128, or 32100 once the unused rows are cut; config.json may lag
        t5_config = T5Config(**sizes, feed_forward_proj="gated-gelu", tie_word_embeddings=False, decoder_start_token_id=0)
        t5, eye, projector = self.split(state)
        with torch.device("meta"):
            tied = T5ForConditionalGeneration(t5_config)
        # lm_head is a matrix of its own: while it is the same Parameter as shared, the last one loaded wins in silence
        tied.lm_head.weight = nn.Parameter(torch.empty_like(tied.lm_head.weight))
        self.t5 = build(lambda: tied, t5, self.where, device, self.dtype)
        self.t5.encoder.embed_tokens = self.t5.decoder.embed_tokens = self.t5.shared  # one matrix in memory, not three
        self.eye = build(lambda: CLIPVisionModel(CLIPVisionConfig(**self.VISION)), eye, self.where, device, self.dtype)
        width, d = self.eye.config.hidden_size, t5_config.d_model
        self.projector = build(lambda: nn.Sequential(nn.Linear(width, d), nn.GELU(), nn.Linear(d, d)), projector, self.where,
                               device, self.dtype)

    @staticmethod
    def split(state):
        """The checkpoint's keys -> those of T5ForConditionalGeneration, CLIPVisionModel (5.x: no prefix), the projector."""
        t5, eye, projector = {}, {}, {}
        for k, v in state.items():
            if "vision_tower." in k:
                k = re.sub(r"^.*vision_tower\.(vision_model\.)?", "", k)
                eye |= {} if k.endswith("position_ids") else {k: v}
            elif "mm_projector." in k:
                projector[re.sub(r"^.*mm_projector\.", "", k)] = v
            elif not k.endswith("embed_tokens.weight"):  # copies of shared.weight
                t5[k] = v
        if "shared.weight" in t5:
            t5 |= {f"{part}.embed_tokens.weight": t5["shared.weight"] for part in ("encoder", "decoder")}
        return t5, eye, projector

    def encode(self, prompts):
        """(P, L) token ids of what follows the image, with its end token; -1 fills up."""
        rows = [torch.tensor(self.tokenizer(self.AFTER.format(p), truncation=True, max_length=2048).input_ids) for p in prompts]
        return nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=-1)

    def __call__(self, images, text, t=None):
        images = images.to(self.device)
        H, W = images.shape[-2:]
        if H != W:  # padded to a square in CLIP's mean colour, cut to whole grey levels
            side, fill = max(H, W), torch.tensor([int(255 * m) / 255 for m in CLIP_MEAN], device=images.device)
            square = fill.view(1, 3, 1, 1).repeat(len(images), 1, side, side)
            top, left = (side - H) // 2, (side - W) // 2
            square[..., top:top + H, left:left + W] = images
            images = square
        before = torch.tensor(self.tokenizer(self.BEFORE).input_ids)
        return self.probability(preprocess(images, self.eye.config.image_size, crop="floor"), before, text)

    @torch.no_grad()
    def probability(self, pixels, before, after):
        """pixels (N, 3, S, S); before (A,), after (N, L) token ids around the image, each chunk with its own end token."""
        patches = self.eye(pixels.to(self.dtype), output_hidden_states=True).hidden_states[-2][:, 1:]  # (N, 576, 1024)
        word = lambda ids: self.t5.shared(ids.to(self.device))
        after = after.to(self.device)
        words = word(after.clamp(min=0)) * (after >= 0)[..., None]
        x = torch.cat([word(before)[None].expand(len(pixels), -1, -1), self.projector(patches), words], 1)
        mask = F.pad((after >= 0).long(), (x.shape[1] - after.shape[1], 0), value=1)
        said = torch.tensor([[self.t5.config.decoder_start_token_id, self.yes[0]]], device=self.device).expand(len(pixels), -1)
        logits = self.t5(inputs_embeds=x, attention_mask=mask, decoder_input_ids=said).logits[..., :self.words].float()
        wanted = torch.tensor(self.yes, device=self.device).view(1, 2, 1).expand(len(pixels), -1, -1)
        return logits.log_softmax(-1).gather(-1, wanted).mean((1, 2)).exp()


# ---------------------------------------------------------------------------------------------------------------

def taste(device, weights=None):
    from toy.world import Taste
    return Taste()


JUDGES = {"taste": taste, "step_aware": StepAware, **{name: functools.partial(CLIP, name) for name in ("clipscore", "pickscore", "hps", "aesthetic")},
          "imagereward": ImageReward, "vqascore": VQAScore}


def load_judge(name, device="cpu", weights=None):
    """The judge called `name`, on `device`. weights: a folder to take them from in place of the hub.

    Raises UserError for an unknown name or a wrong checkpoint, WeightsMissing if its weights cannot be had.
    """
    if name not in JUDGES:
        raise UserError(f"unknown judge {name!r}: choose one of {', '.join(JUDGES)}")
    if weights and not os.path.isdir(weights):
        raise UserError(f"no weights folder {weights!r}: make it, with one subfolder per hub id, or leave --weights out")
    return JUDGES[name](device, weights)
