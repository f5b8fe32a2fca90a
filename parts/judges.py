"""Every model that scores an image against a prompt, behind one interface.

    judge = load_judge(name, device)      # load_judge(name, device, weights=DIR): not from the hub
    text = judge.encode(prompts)          # a tensor with one row per prompt, asked for once
    scores = judge(images, text, t=None)  # (N, 3, H, W) in [0, 1], (N, ...), (N,) timesteps -> (N,)

    name         scale           SD1.5 *  size     licence     hub id, file
    taste        about -11 .. 18  -        0        MIT         none: a formula (toy/world.py)
    step_aware   ~100 * cosine   -        5.2 GB   not checked (below)
    clipscore    cosine          0.352    3.9 GB   MIT         laion/CLIP-ViT-H-14-laion2B-s32B-b79K
    vqascore     probability     0.601    22.9 GB  Apache-2.0  zhiqiulin/clip-flant5-xxl
    aesthetic    about 1 .. 10   5.648    1.7 GB   MIT, Apache openai/clip-vit-large-patch14 + head
    imagereward  mean 0, std 1   0.173    1.8 GB   Apache-2.0  THUDM/ImageReward, ImageReward.pt
    pickscore    ~100 * cosine   20.908   3.9 GB   MIT (code)  yuvalkirstain/PickScore_v1
    hps          100 * cosine    26.933   2.0 GB   Apache-2.0  xswu/HPSv2, HPS_v2_compressed.pt

    * the paper's Table 2. step_aware is SPO-Diffusion-Models/Step-Aware_Preference_Models,
      sd-v1-5_step-aware_preference_model.bin; aesthetic's head is a file of LAION's on GitHub.

Which resize and which constant make a published number, and how --weights DIR is laid out:
docs/metrics.md. The models: judges_clip.py, judges_language.py. Your own judge is a class, here

    import torch

    class Bright:
        reads_prompt = False
        def __init__(self, device, weights):
            pass
        def encode(self, prompts):
            return torch.zeros(len(prompts), 0)
        def __call__(self, images, text, t=None):
            return 10 * images.mean((1, 2, 3))

and a line in JUDGES: "bright": Bright. reads_prompt = False lets it score images whose prompts are
not known; with unclamped = True its images may overshoot [0, 1], as the VAE's do. It may offer
report(images, prompts) -> {name: (N,)}, more figures for the tables, and compile(size). Scores that
are logits suit --threshold: a pair is trained on if softmax([best, worst]) differs by more than it.
"""

from parts.common import UserError
from parts.judges_clip import HPS, Aesthetic, CLIPScore, PickScore, StepAware
from parts.judges_language import ImageReward, VQAScore
from toy.world import Taste

JUDGES = {
    "taste": Taste,
    "step_aware": StepAware,
    "clipscore": CLIPScore,
    "pickscore": PickScore,
    "hps": HPS,
    "aesthetic": Aesthetic,
    "imagereward": ImageReward,
    "vqascore": VQAScore,
}


def load_judge(name, device="cpu", weights=None):
    """The judge called `name`, on `device`. weights: a folder to take them from, not the hub.
    Raises UserError for an unknown name or a wrong checkpoint, WeightsMissing for none."""
    if name not in JUDGES:
        raise UserError(f"unknown judge {name!r}: choose one of {', '.join(JUDGES)}")
    judge = JUDGES[name](device, weights)
    judge.name = name
    return judge
