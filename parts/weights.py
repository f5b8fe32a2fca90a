"""Weights and prompts: find them in a folder or on the hub, download once, read and build strictly.

A folder of weights (--weights DIR) has one subfolder per hub id, named by its last part, as
`hf download xswu/HPSv2 HPS_v2_compressed.pt --local-dir DIR/HPSv2` makes it; single files may
lie in DIR itself. Files are safetensors, or torch files of which only tensors are ever unpickled.
"""

import glob
import hashlib
import os
import re
import socket
import sys
import warnings
import zipfile
from urllib.parse import unquote, urlsplit
from urllib.request import getproxies

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file

from parts.common import UserError, read_json

SD15 = "stable-diffusion-v1-5/stable-diffusion-v1-5"  # runwayml's is gone; this copy lives
TOY = os.path.join(os.path.dirname(os.path.dirname(os.path.realpath(__file__))), "toy")
SPO_PROMPTS_URL = (
    "https://raw.githubusercontent.com/RockeyCoss/SPO/main/"
    "spo_training_and_inference/assets/prompts/4k_training_prompts.json"
)
SPO_PROMPTS_SHA256 = "804018fcb30bc9bed28a2a0518855bffd386675a3c5138f96b925071cbae6fc4"


class WeightsMissing(UserError):
    """Weights that cannot be had here: not in the folder, or not downloaded and no hub in reach."""


def hub_out_of_reach():
    """True if only earlier downloads can be used; asked first, so that nobody waits for retries."""
    from huggingface_hub import constants

    hub = urlsplit(constants.ENDPOINT)
    if constants.HF_HUB_OFFLINE or hub.scheme in getproxies():
        return constants.HF_HUB_OFFLINE  # behind a proxy only the real request can tell
    try:
        socket.create_connection((hub.hostname, hub.port or 443), timeout=5).close()
        return False
    except OSError:
        return True


def find(repo, file=None, weights=None, repo_type="model"):
    """Path of a hub file or, with file None, of the folder of a whole model. Raises WeightsMissing.

    weights: a folder; then nothing but DIR/<last part of repo>[/file] and DIR/file is looked at.
    """
    name = repo.split("/")[-1]
    command = f"hf download {repo} {file or ''} --repo-type {repo_type}"
    if weights:
        folder = os.path.join(weights, name)
        places = [os.path.join(folder, file), os.path.join(weights, file)] if file else [folder]
        for place in places:
            if os.path.exists(place):
                return place
        raise WeightsMissing(f"{places[0]} is not there: {command} --local-dir {folder}")
    from huggingface_hub import hf_hub_download, snapshot_download

    offline = hub_out_of_reach()
    options = dict(repo_type=repo_type, local_files_only=offline)
    try:
        if file:
            return hf_hub_download(repo, file, **options)
        for kind in ("*.safetensors", "*.bin"):  # many hold both, twice the download
            wanted = dict(allow_patterns=["*.json", kind], ignore_patterns=["open_clip*"])
            folder = snapshot_download(repo, **wanted, **options)
            if weight_files(folder):
                return folder
        raise FileNotFoundError("no weights in it")
    except Exception as error:  # no network, no such file, no permission: a dozen types
        why = "not downloaded, and the hub is out of reach" if offline else first_line(error)
        raise WeightsMissing(f"weights {repo} {file or ''}: {why}: {command}") from error


def find_url(url, weights=None, sha256=None):
    """Path of a file from a plain address, kept where torch.hub keeps its downloads."""
    name = unquote(url.split("/")[-1])
    path = os.path.join(weights or os.path.join(torch.hub.get_dir(), "checkpoints"), name)
    command = f"curl -L -o '{path}' '{url}'"
    if not os.path.exists(path):
        if weights:
            raise WeightsMissing(f"{path} is not there: {command}")
        try:
            os.makedirs(os.path.dirname(path), exist_ok=True)
            torch.hub.download_url_to_file(url, path, progress=False)
        except OSError as error:
            raise WeightsMissing(f"cannot download {name} ({error}): {command}") from error
    if sha256:
        with open(path, "rb") as file:
            if hashlib.file_digest(file, "sha256").hexdigest() != sha256:
                raise UserError(f"{path} is another file (its checksum differs): {command}")
    return path


def first_line(error):
    """The first line of what an exception says, or its type where it says nothing."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0][:160]


def read_state(path):
    """{name: tensor} of a .safetensors or a torch file. Nothing but tensors is ever unpickled."""
    path = str(path)
    try:
        if path.endswith(".safetensors"):
            return load_file(path)
        mapped = zipfile.is_zipfile(path)  # files from before torch 1.6 are not, and cannot be
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except Exception as error:  # torch raises many types for a damaged archive
        why = f"damaged, or a pickle that runs code ({type(error).__name__}: {first_line(error)})"
        raise UserError(f"{path} cannot be read as pure weights: {why}") from error
    if isinstance(state, dict):
        state = state.get("state_dict", state)
    if not isinstance(state, dict) or not all(torch.is_tensor(v) for v in state.values()):
        raise UserError(f"{path} is not a checkpoint: it should hold one tensor per name")
    return state


def weight_files(folder):
    """The shards of a model's folder, as safetensors if there are any."""
    pattern = re.compile(r"(pytorch_)?model(-\d+-of-\d+)?\.(safetensors|bin)")
    names = sorted(name for name in os.listdir(folder) if pattern.fullmatch(name))
    safe = [name for name in names if name.endswith(".safetensors")]
    return [os.path.join(folder, name) for name in safe or names]


def read_folder(folder):
    """{name: tensor} of all shards in a model's folder."""
    files = weight_files(folder)
    if not files:
        raise WeightsMissing(f"no model*.safetensors or *.bin in {folder}: download it again")
    state = {}
    for file in files:
        state |= read_state(file)
    return state


def read_config(folder):
    return read_json(os.path.join(folder, "config.json"), "download it again")


def load_tokenizer(cls, repo, weights=None):
    where = find(repo, None, weights) if weights else repo
    try:
        return cls.from_pretrained(where, local_files_only=bool(weights) or hub_out_of_reach())
    except Exception as error:
        hint = f"hf download {repo} --exclude '*.bin' '*.safetensors'"
        hint += f" --local-dir {where}" if weights else ""
        raise WeightsMissing(f"no tokenizer at {where}: {hint}") from error


def check_keys(expected, state, path):
    """Raises UserError unless the two {name: tensor} have the same names and shapes."""
    for name in sorted(expected.keys() | state.keys()):
        if name not in state:
            what = f"lacks {name}"
        elif name not in expected:
            what = f"has a surplus {name}"
        elif expected[name].shape != state[name].shape:
            shape, wanted = tuple(state[name].shape), tuple(expected[name].shape)
            what = f"has {name} of shape {shape}, not {wanted}"
        else:
            continue
        raise UserError(f"{path} {what}: is it for this model?")


def build(make, state, path, device, dtype=torch.float32):
    """make() with `state` as its weights, frozen, in eval mode, or UserError naming a wrong key.

    Made on "meta": nothing is initialised only to be overwritten.
    """
    with torch.device("meta"):
        module = make()
    check_keys(module.state_dict(), state, path)
    cast = {k: v.to(dtype) if v.is_floating_point() else v for k, v in state.items()}
    module.load_state_dict(cast, assign=True)
    for part in module.modules():
        for name, buffer in part.named_buffers(recurse=False):
            # 0, 1, 2, ... of the position embeddings: a buffer that no checkpoint holds
            if buffer.is_meta and name == "position_ids":
                setattr(part, name, torch.arange(buffer.shape[-1]).expand(buffer.shape))
    return module.requires_grad_(False).eval().to(device)


def resolve_model(model):
    """(folder or hub id, why). "auto" is SD1.5 where there is CUDA, else the toy."""
    if model == "auto":
        return (SD15, "CUDA is here") if torch.cuda.is_available() else (TOY, "no CUDA here")
    return (TOY if model == "toy" else model), "asked for"


def read_train_json(where):
    """What a model's folder says of training it: {flag: default}, with sections "pairs", "full"."""
    path = os.path.join(where, "train.json")
    return read_json(path, "mend it") if os.path.exists(path) else {}


def find_prompts(where):
    """Path of the prompts that a model's folder brings, or None."""
    path = os.path.join(where, "prompts.txt")
    return path if os.path.exists(path) else None


def find_training_prompts(model, path=None, weights=None):
    """Path of what to train on: --prompts, or the model's own, or SPO's. Raises UserError."""
    where, _ = resolve_model(model)
    path = path or find_prompts(where)
    if path is None and where == SD15:
        path = find_url(SPO_PROMPTS_URL, weights, SPO_PROMPTS_SHA256)
    if path is None:
        raise UserError("this model needs --prompts FILE: a text file with one prompt a line")
    return path


def silence_libraries():
    """No progress bars of theirs between ours, no advice about parts that we do not use."""
    import transformers.utils.logging

    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()  # before diffusers imports what would warn
    import diffusers.utils.logging

    diffusers.utils.logging.disable_progress_bar()
    warnings.filterwarnings("ignore", message=".*local_dir_use_symlinks")


def check_folder(folder):
    """Raises UserError, naming the part, where the libraries would say less (of a tokenizer that is
    missing: nothing)."""
    for name in ("model_index.json", "unet", "vae", "text_encoder", "tokenizer", "scheduler"):
        if not os.path.exists(os.path.join(folder, name)):
            raise UserError(f"model folder {folder!r} lacks {name}: give a whole diffusers folder")
    for file in glob.glob(os.path.join(glob.escape(folder), "*", "*.safetensors")):
        try:
            safe_open(file, "pt")  # reads the header and checks the file's length
        except (SafetensorError, OSError) as error:
            raise UserError(f"{file} is damaged ({error}): copy it again") from error


def load_part(cls, where, name, **options):
    """A part of a model, every tensor of it. The libraries would make up one that is missing, and
    only warn. Raises UserError, naming the first tensor that is not as it should be."""
    options |= dict(output_loading_info=True, ignore_mismatched_sizes=True)
    files = [os.path.basename(f) for f in glob.glob(f"{glob.escape(where)}/{name}/*.safetensors")]
    if files and all(".fp16." in file for file in files):
        options["variant"] = "fp16"  # a folder that holds nothing else
    try:
        part, info = cls.from_pretrained(where, subfolder=name, **options)
    except Exception as error:  # a dozen types, which do not name the part
        raise OSError(f"{name}: {first_line(error)}") from error
    faults = {"missing": "lacks", "unexpected": "has a surplus", "mismatched": "has a misshapen"}
    for kind, what in faults.items():
        for tensor in sorted(map(str, info[f"{kind}_keys"])):
            raise UserError(f"{where}/{name} {what} {tensor}: copy the model again")
    for tensor, value in part.state_dict().items():
        if not value.isfinite().all():
            raise UserError(f"{where}/{name}: {tensor} is not finite: copy the model again")
    return part


def ddim_scheduler(config):
    """A DDIM scheduler from any scheduler's config, corrected aloud, or UserError.

    set_alpha_to_one and steps_offset 0 would make the last step's std 0, and log X infinite;
    "leading" is what t - T // num_steps assumes; clipped samples are not the Gaussian's.
    """
    from diffusers import DDIMScheduler

    kind = config.get("_class_name", "")
    if "FlowMatch" in kind or "EDM" in kind:  # their noise levels are others
        raise UserError(f"a model of {kind} is not one of Stable Diffusion 1's kind")
    prediction = config.get("prediction_type", "epsilon")
    if prediction != "epsilon" or config.get("rescale_betas_zero_snr"):
        why = f"not {prediction}, nor with zero-SNR"
        raise UserError(f"only noise-predicting models (prediction_type epsilon) work here: {why}")
    needed = dict(clip_sample=False, thresholding=False, set_alpha_to_one=False)
    needed |= dict(steps_offset=1, timestep_spacing="leading")
    for name, value in needed.items():
        # what a config leaves unsaid was no choice (from_config would set clip_sample=True)
        if config.get(name, value) != value:
            print(f"scheduler corrected: {name} {config[name]} -> {value}", file=sys.stderr)
    return DDIMScheduler.from_config({**config, **needed})


def check_shape(pipe, where):
    unet, vae = pipe.unet.config, pipe.vae.config
    if unet.addition_embed_type or unet.cross_attention_dim != pipe.text_encoder.config.hidden_size:
        raise UserError(f"{where!r} is not of Stable Diffusion 1's shape (one text encoder)")
    if unet.time_cond_proj_dim:
        raise UserError(f"{where!r} is distilled (LCM): its UNet has guidance built in")
    if unet.in_channels != vae.latent_channels:
        channels = f"UNet {unet.in_channels} channels, VAE {vae.latent_channels}"
        raise UserError(f"{where!r} is not a text-to-image model: {channels}")
