"""What is trained: a Stable Diffusion, the policy on its UNet, and the reference it stays near.

pipe = load_pipeline("toy")                 # or a diffusers folder, or a hub id
policy = Policy(pipe.unet, rank=4)          # a LoRA; Policy(pipe.unet, full=True): all weights
eps = predict_noise(pipe.unet, x_t, t, text, null, guidance)
with policy.reference():                    # the same UNet IS the reference in here
    eps_ref = predict_noise(pipe.unet, x_t, t, text, null, guidance)
policy.save("out/run")                      # diffusers' pipe.load_lora_weights("out/run") reads it
"""

import contextlib
import os
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from safetensors.torch import save

from parts import lora, weights
from parts.common import UserError, write_file

LORA_FILE = "pytorch_lora_weights.safetensors"  # the name that diffusers looks for in a folder
UNET_FILE = "diffusion_pytorch_model.safetensors"  # in unet/, of a --full run
TARGETS = ("to_q", "to_k", "to_v", "to_out.0")  # of every attention of the UNet, as SPO trains


def load_pipeline(model, device="cpu", dtype=torch.float32):
    """A StableDiffusionPipeline, frozen, with a DDIM scheduler that is fit for training.

    model: a diffusers folder, a single-file checkpoint, a hub id, "toy" or "auto". dtype: of the
    weights; a dict such as {"default": torch.bfloat16, "unet": torch.float32} names parts.
    Raises UserError for a missing, incomplete, damaged or unsuitable model.
    """
    weights.silence_libraries()
    from diffusers import AutoencoderKL, StableDiffusionPipeline, UNet2DConditionModel
    from transformers import CLIPTextModel, CLIPTokenizer

    folder, file = weights.find_model(model)
    scheduler = weights.read_config(f"{folder}/scheduler", "scheduler_config.json")
    parts = dict(scheduler=weights.ddim_scheduler(scheduler))
    parts["tokenizer"] = weights.read_tokenizer(CLIPTokenizer, f"{folder}/tokenizer")
    classes = dict(unet=UNet2DConditionModel, vae=AutoencoderKL, text_encoder=CLIPTextModel)
    checkpoint = weights.read_state(file) if file else None
    dtypes = dtype if isinstance(dtype, dict) else {"default": dtype}
    for name, cls in classes.items():
        source = cls, folder, name, dtypes.get(name, dtypes["default"])
        if file:
            parts[name] = weights.convert_part(*source, file, checkpoint)
        else:
            parts[name] = weights.load_part(*source)
    words = max(parts["tokenizer"].get_vocab().values()) + 1
    known = parts["text_encoder"].config.vocab_size
    if words > known:  # such as textual inversion's, not embedded
        raise UserError(f"{folder}: tokenizer of {words} words, text_encoder of {known}: copy both")
    nobody = dict(safety_checker=None, feature_extractor=None, requires_safety_checker=False)
    pipe = StableDiffusionPipeline(**parts, **nobody)
    for part in (pipe.unet, pipe.vae, pipe.text_encoder):
        part.requires_grad_(False).eval().to(device)
    # or every step would copy it, and wait for the copy
    pipe.scheduler.alphas_cumprod = pipe.scheduler.alphas_cumprod.to(device)
    return pipe


# ---- The policy ----------------------------------------------------------------------------------


class LoRALinear(nn.Linear):
    """W x + B A x: a frozen linear layer and a trainable one of low rank beside it.

    A (r, in), B (out, r), alpha = r, so that the scale is 1. Shares the base layer's weight. A, B
    are fp32 whatever the base is: bf16 numbers of 1e-2 cannot take a step of 6e-5 (in SPO's bf16
    runs 5 % of them moved). B = 0 at the start, so the output is the base layer's.
    """

    def __init__(self, base, rank):
        has_bias = base.bias is not None
        super().__init__(base.in_features, base.out_features, bias=has_bias, device="meta")
        self.weight, self.bias, self.on = base.weight, base.bias, True
        device = base.weight.device
        self.lora_A = nn.Parameter(torch.empty(rank, base.in_features, device=device))
        self.lora_B = nn.Parameter(torch.zeros(base.out_features, rank, device=device))
        nn.init.normal_(self.lora_A, std=1 / rank)

    def forward(self, x):  # (..., in) -> (..., out)
        y = F.linear(x, self.weight, self.bias)  # (..., out)
        if self.on:
            y = y + F.linear(F.linear(x, self.lora_A.to(x.dtype)), self.lora_B.to(x.dtype))
        return y


class Policy:
    """p_theta, and p_ref inside the same UNet: no second UNet runs, or lies in memory for a LoRA.

    rank: of a LoRA on every attention projection (or {layer: rank}, for a LoRA that was made
    elsewhere); full: all weights train, in fp32, and a frozen copy of them is the reference.
    parameters is a list: an iterator would be used up by the optimiser, and clip_grad_norm_ would
    clip nothing (so it was in SPO and LPO).
    """

    def __init__(self, unet, rank=4, full=False):
        self.unet, self.full, self.layers = unet, full, {}
        self.swapped = False  # True where the UNet is the reference
        if full:
            # fp32: a bf16 weight cannot take a small step
            unet.float().requires_grad_(True)
            self.parameters = list(unet.parameters())
            self.frozen = [p.detach().clone() for p in self.parameters]  # p_ref
            return
        # a list, since the tree changes on the way
        modules = list(unet.named_modules())
        # a LoRA made elsewhere says which layers it has, and each layer's rank
        ranks = rank
        if not isinstance(rank, dict):
            ranks = {name: rank for name, _ in modules if name.endswith(TARGETS)}
        for name, module in modules:
            assert not isinstance(module, LoRALinear), "this UNet carries a policy already"
            if isinstance(module, nn.Linear) and name in ranks:
                parent, child = name.rsplit(".", 1)
                self.layers[name] = LoRALinear(module, ranks[name])
                setattr(unet.get_submodule(parent), child, self.layers[name])  # in place
        self.parameters = [p for m in self.layers.values() for p in (m.lora_A, m.lora_B)]

    @contextlib.contextmanager
    def reference(self):
        """Inside, the UNet is the reference policy, and no gradient is recorded."""
        assert not self.swapped, "inside reference() the UNet is the reference already"
        self._swap()
        try:
            with torch.no_grad():
                yield
        finally:
            self._swap()

    def predict_both(self, *inputs):
        """(eps, eps_ref): predict_noise(unet, *inputs) of the policy and of the reference."""
        eps = predict_noise(self.unet, *inputs)
        with self.reference():
            return eps, predict_noise(self.unet, *inputs)

    def _swap(self):
        self.swapped = not self.swapped
        for layer in self.layers.values():
            layer.on = not self.swapped
        if self.full:
            # .data, so that autograd, which holds the parameter itself, never notices: backward
            # runs outside of reference(), when the policy's own numbers are back
            for i, parameter in enumerate(self.parameters):
                parameter.data, self.frozen[i] = self.frozen[i], parameter.data

    def _tensors(self):
        """{name: tensor} of all that trains, a LoRA in the names that diffusers and peft read."""
        if self.full:
            return self.unet.state_dict()
        tensors = {}
        for name, layer in self.layers.items():
            tensors[f"unet.{name}.lora_A.weight"] = layer.lora_A
            tensors[f"unet.{name}.lora_B.weight"] = layer.lora_B
        return tensors

    def state(self):
        """{name: tensor} on the CPU."""
        return {k: v.detach().cpu().contiguous() for k, v in self._tensors().items()}

    @torch.no_grad()
    def load_state(self, state, path):
        """Copies state()'s tensors back. Raises UserError if their names or shapes differ."""
        mine = self._tensors()
        weights.check_keys(mine, state, path)
        for name, tensor in mine.items():
            tensor.copy_(state[name])

    def save(self, folder, metadata=None):
        """For others: folder/pytorch_lora_weights.safetensors, or a whole UNet as folder/unet.
        metadata: {str: str}, kept in the file's header."""
        # safetensors: header and tensors, no code
        state, metadata = self.state(), {"format": "pt", **(metadata or {})}
        data = save(state, metadata=metadata)
        if not self.full:
            lora.write_kohya(folder, state, metadata)
            return write_file(f"{folder}/{LORA_FILE}", data)
        os.makedirs(f"{folder}/unet", exist_ok=True)
        write_file(f"{folder}/unet/config.json", self.unet.to_json_string())
        write_file(f"{folder}/unet/{UNET_FILE}", data)


def policy_file(path):
    """The file that holds a policy: path, or what a run left in that folder; None if none."""
    candidates = [path, f"{path}/{LORA_FILE}"]  # the path itself may be a file of any name
    is_model = os.path.exists(f"{path}/model_index.json")  # a whole one, whose UNet is no policy
    if not is_model:
        candidates += [f"{path}/unet/{UNET_FILE}", f"{path}/{UNET_FILE}"]
    for candidate in candidates:
        if os.path.isfile(candidate):
            return candidate
    # a LoRA of any name, if it is the only one, but for the copy in kohya's names
    others = [*Path(path).glob("*.safetensors"), *Path(path).glob("pytorch_lora_weights.bin")]
    others = [str(file) for file in others if file.name != lora.KOHYA_FILE]
    return others[0] if len(others) == 1 and not is_model else None


def load_policy(unet, path):
    """A run's policy (its folder, or the file) onto a UNet whose own weights are the reference.
    Returns a frozen Policy. Raises UserError if there is none, or one of another model."""
    file = policy_file(path)
    if file is None:
        raise UserError(f"no LoRA at {path!r}: give a folder with {LORA_FILE} or unet/ in it")
    state = weights.read_state(file)
    if any(".base_layer." in name for name in state):  # accelerate's: UNet and LoRA in one file
        state = {name: tensor for name, tensor in state.items() if ".lora_" in name}
    # a LoRA leaves the convolutions alone: with this one the file is a whole UNet
    if "conv_in.weight" in state:
        policy = Policy(unet, full=True)
    else:
        # B comes times alpha / rank: the layers' own scale is 1
        layers, state = lora.read_lora(file, state), {}
        for name, (A, B) in layers.items():
            state |= {f"unet.{name}.lora_A.weight": A, f"unet.{name}.lora_B.weight": B}
        policy = Policy(unet, {name: len(A) for name, (A, _) in layers.items()})
    policy.load_state(state, file)
    # for painting alone: nothing trains
    unet.requires_grad_(False)
    return policy


def latent_shape(pipe):
    """(C, h, w) of one latent: (4, 64, 64) for SD1.5."""
    size = pipe.unet.config.sample_size or 64  # diffusers' own, where a config says nothing
    h, w = (size, size) if isinstance(size, int) else size
    return pipe.unet.config.in_channels, h, w


def text_length(pipe):
    """Tokens of a text: 77 for SD1.5. Some tokenizers' files do not say it."""
    return min(pipe.tokenizer.model_max_length, pipe.text_encoder.config.max_position_embeddings)


def say_cut(pipe, prompts):
    """Says how many prompts the text encoder will cut: two that begin alike are one to it."""
    longest = text_length(pipe)
    cut = sum(len(pipe.tokenizer(p, verbose=False).input_ids) > longest for p in prompts)
    if cut:
        print(f"{cut} of {len(prompts)} prompts have over {longest} tokens, and are cut there")


@torch.no_grad()
def encode_prompts(pipe, prompts):
    """(N, 77, C) text states, padded to the text encoder's length; longer prompts are cut there."""
    options = dict(max_length=text_length(pipe), padding="max_length", truncation=True)
    ids = pipe.tokenizer(list(prompts), return_tensors="pt", **options).input_ids  # (N, 77)
    return pipe.text_encoder(ids.to(pipe.text_encoder.device))[0]


def predict_noise(unet, x_t, t, text, null, guidance):
    """Classifier-free guidance: null + guidance (text - null), two UNet rows per image.

    x_t: (N, C, h, w); t: (N,); text: (N, L, C); null: (1, L, C), the empty prompt. guidance <= 1 is
    none, as in diffusers: one row per image. Returned in x_t's dtype (fp32, or fp64 in tests). The
    UNet computes in the text's dtype; if its weights are wider (--full keeps them in fp32), under
    autocast. No autocast where dtypes agree: it would keep every normalisation's input in fp32.
    """
    compute_dtype, autocast = text.dtype, contextlib.nullcontext()
    if unet.conv_in.weight.dtype != compute_dtype:
        autocast = torch.autocast(x_t.device.type, compute_dtype)
    with autocast:
        x = x_t.to(compute_dtype)  # latents stay fp32 outside: in half they lose 1 % of a small std
        if guidance <= 1:
            return unet(x, t, text, return_dict=False)[0].to(x_t.dtype)
        both = torch.cat([null.expand_as(text), text])  # (2N, L, C): without, with the prompt
        eps = unet(torch.cat([x, x]), torch.cat([t, t]), both, return_dict=False)[0]
    # back in x_t's dtype before the difference is scaled by the guidance
    eps_null, eps_text = eps.to(x_t.dtype).chunk(2)
    return eps_null + guidance * (eps_text - eps_null)


def in_slices(f, size, *rows, fill=False):
    """f(*rows) by slices of `size` rows, joined again. fill: a short last slice is filled up with
    copies of its first row, so that f meets one size (parts/fast.py)."""
    results = []
    for start in range(0, len(rows[0]), size):
        part = [x[start : start + size] for x in rows]
        count = len(part[0])
        if fill and count < size:
            part = [torch.cat([x, x[:1].expand(size - count, *x.shape[1:])]) for x in part]
        results.append(f(*part)[:count])
    return torch.cat(results)


def decode_batch(pipe):
    """Images that the VAE decodes at once: a megapixel. More is no faster, and more memory."""
    _, h, w = latent_shape(pipe)
    return max(1, min(16, 2**20 // (h * w * pipe.vae_scale_factor**2)))


@torch.no_grad()
def decode(pipe, latents, vae=None):
    """Latents (N, 4, h, w) -> images (N, 3, H, W), in [0, 1] but for the VAE's overshoot.
    vae: a tiny autoencoder in place of the pipeline's own."""
    vae = vae or pipe.vae
    scaled = (latents / vae.config.scaling_factor).to(vae.dtype)  # SD1.5: 0.18215

    def decode_slice(z):
        return vae.decode(z).sample.to(latents.dtype) / 2 + 0.5

    return in_slices(decode_slice, decode_batch(pipe), scaled)
