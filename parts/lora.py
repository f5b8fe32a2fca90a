"""LoRA files as people have them, and as other programs want them.

Read: every dialect that diffusers reads, by diffusers' own functions (its own names, .lora.down and
.up as in SPO's checkpoints, attention processors, kohya's with .alpha), and peft's, which they
leave as they are. Written, beside our own file: kohya's, which ComfyUI and A1111 take.
"""

import json
import math
import re
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save

from parts.common import UserError, read_json, write_file

KOHYA_FILE = "kohya.safetensors"


def read_lora(path, tensors):
    """{UNet layer: (A (r, in), B (out, r))}, B times alpha / r, so that the layer adds B A x, of
    what the file at path holds. Raises UserError if that is no LoRA of linear UNet layers alone."""
    from diffusers import StableDiffusionPipeline
    from diffusers.utils import convert_unet_state_dict_to_peft

    state = {}
    for name, tensor in tensors.items():
        if name.endswith(("dora_scale", "lora_magnitude_vector")):  # diffusers drops the former
            raise UserError(f"{path} is a DoRA ({name}): only plain LoRA is read here")
        # peft's names, which diffusers leaves alone: in front, and with the adapter's own name
        name = name.removeprefix("base_model.model.")
        name = re.sub(r"(lora_[AB])\.\w+\.weight", r"\1.weight", name)
        if re.match(r"(down|mid|up)_block", name):
            name = f"unet.{name}"
        state[name] = tensor
    try:
        config = adapter_config(path)
        state, alphas = StableDiffusionPipeline.lora_state_dict(state)
    except (ValueError, KeyError) as error:
        why = " ".join(str(error).split())[:160]
        raise UserError(f"{path} holds no LoRA that diffusers knows ({why})") from error
    for name in state:
        if not name.startswith("unet."):
            raise UserError(f"{path} holds {name}: only a LoRA of the UNet alone is read here")
    unet = convert_unet_state_dict_to_peft({k.removeprefix("unet."): v for k, v in state.items()})
    alphas = {k.removeprefix("unet."): float(v) for k, v in (alphas or {}).items()}
    alphas = convert_unet_state_dict_to_peft(alphas) if alphas else {}
    layers = {}
    for name, tensor in unet.items():
        layer, _, kind = name.partition(".lora_")
        if kind not in ("A.weight", "B.weight"):
            raise UserError(f"{path} holds {name}: only plain LoRA is read here")
        if tensor.ndim != 2:
            raise UserError(f"{path} changes {layer}, a convolution: only linear layers are read")
        layers.setdefault(layer, {})[kind[0]] = tensor
    for layer, both in layers.items():
        for kind in {"A", "B"} - both.keys():
            raise UserError(f"{path} lacks unet.{layer}.lora_{kind}.weight: copy it again")
        r = len(both["A"])
        alpha = config.get("alpha_pattern", {}).get(layer, config.get("lora_alpha", r))
        alpha = alphas.get(f"{layer}.lora_A.weight.alpha", alpha)  # kohya's
        scale = alpha / (math.sqrt(r) if config.get("use_rslora") else r)
        layers[layer] = both["A"], both["B"] * scale if scale != 1 else both["B"]
    if not layers:
        raise UserError(f"{path} holds no LoRA")
    return layers


def adapter_config(path):
    """alpha, its pattern and rslora: of the file's header (diffusers >= 0.34), or of peft's
    adapter_config.json beside it."""
    if str(path).endswith(".safetensors"):
        with safe_open(path, "pt") as file:
            header = (file.metadata() or {}).get("lora_adapter_metadata")
        if header:
            return {k.removeprefix("unet."): v for k, v in json.loads(header).items()}
    beside = Path(path).with_name("adapter_config.json")
    return read_json(beside, "mend it") if beside.exists() else {}


def write_kohya(folder, state, metadata):
    """kohya.safetensors: the same LoRA for ComfyUI, A1111 and kohya's scripts. state: our names."""
    from diffusers.utils import convert_state_dict_to_kohya

    tensors = convert_state_dict_to_kohya(dict(state))
    tensors = {name: torch.as_tensor(tensor).contiguous() for name, tensor in tensors.items()}
    write_file(f"{folder}/{KOHYA_FILE}", save(tensors, metadata=metadata))
