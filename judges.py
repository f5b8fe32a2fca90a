"""
Every model that scores an image against a prompt, behind one interface:

    judge = load_judge(name, device)
    text = judge.encode(prompts)          # a tensor with one row per prompt, so that text[i] is prompt i; asked once
    scores = judge(images, text, t=None)  # images (N, 3, H, W) in [0, 1], text (N, ...), t (N,) timesteps -> (N,)

    name        what it is                                    weights                              scale
    taste       the toy's: warm light in the sky (toy.py)     none: a formula                      about -5 .. 10
    pickscore   CLIP ViT-H-14 tuned on Pick-a-Pic (MIT code)  yuvalkirstain/PickScore_v1, 3.9 GB   ~100 * cosine, SD1.5 20.9

Your own judge is a class with these two methods and a line in JUDGES. Scores that are logits suit `--threshold`:
a pair is trained on if softmax([best, worst]) differs by more than it. A judge may offer report(images, prompts) ->
{name: (N,)}, further figures for the table at the end of a run.
"""
import torch
import torch.nn.functional as F

from sample import UserError, hub_out_of_reach

CLIP_MEAN, CLIP_STD = (.48145466, .4578275, .40821073), (.26862954, .26130258, .27577711)


class PickScore:
    """exp(logit_scale) * cosine of CLIP ViT-H-14 embeddings (Kirstain et al. 2023); fp16 on CUDA, else fp32.

    Preprocessing in torch: antialiased bicubic to 224 on the short side, centre crop, CLIP's mean and std. The text is
    padded to 77 tokens and pooled at its end token. Any CLIPModel folder in transformers' format can take its place.
    """
    name = "pickscore"

    def __init__(self, device="cpu", where="yuvalkirstain/PickScore_v1",
                 tokenizer="laion/CLIP-ViT-H-14-laion2B-s32B-b79K"):
        from transformers import CLIPModel, CLIPTokenizer
        dtype = torch.float16 if str(device).startswith("cuda") else torch.float32
        local = hub_out_of_reach()
        try:
            self.tokenizer = CLIPTokenizer.from_pretrained(tokenizer, local_files_only=local)
            self.clip = CLIPModel.from_pretrained(where, dtype=dtype, use_safetensors=True, local_files_only=local)
        except (OSError, ValueError) as e:
            raise UserError(f"cannot load the judge {where!r}: is the hub in reach? An earlier download needs no network, "
                            f"and --judge taste no weights ({str(e).strip().splitlines()[0][:160]})") from e
        self.clip.requires_grad_(False).eval().to(device)
        self.size = self.clip.config.vision_config.image_size

    @torch.no_grad()
    def encode(self, prompts):
        ids = self.tokenizer(list(prompts), padding="max_length", truncation=True, return_tensors="pt",
                             max_length=self.clip.config.text_config.max_position_embeddings).input_ids
        return F.normalize(self.clip.get_text_features(ids.to(self.clip.device)).pooler_output.float(), dim=-1)

    @torch.no_grad()
    def __call__(self, images, text, t=None):
        pixels = preprocess(images.to(self.clip.device), self.size).to(self.clip.dtype)
        image = F.normalize(self.clip.get_image_features(pixels).pooler_output.float(), dim=-1)
        return self.clip.logit_scale.float().exp() * (image * text).sum(-1)


def preprocess(images, size):
    """(N, 3, H, W) in [0, 1] -> (N, 3, size, size), normalised as CLIP expects."""
    H, W = images.shape[-2:]
    short = min(H, W)
    new = (int(H * size / short), int(W * size / short))
    x = F.interpolate(images.float(), size=new, mode="bicubic", antialias=True, align_corners=False).clamp(0, 1)
    top, left = (new[0] - size) // 2, (new[1] - size) // 2
    stat = lambda v: torch.tensor(v, device=x.device).view(3, 1, 1)
    return (x[..., top:top + size, left:left + size] - stat(CLIP_MEAN)) / stat(CLIP_STD)


def taste(device):
    from toy import Taste
    return Taste()


JUDGES = {"taste": taste, "pickscore": PickScore}


def load_judge(name, device="cpu"):
    """The judge called `name`, its weights on `device`. Raises UserError for an unknown name or weights out of reach."""
    if name not in JUDGES:
        raise UserError(f"unknown judge {name!r}: choose one of {', '.join(JUDGES)}")
    return JUDGES[name](device)
