"""Weights and prompts: found in a folder or on the hub (parts/hub.py), read and built strictly.

A folder of weights (--weights DIR) has one subfolder per hub id, named by its last part, as
`hf download xswu/HPSv2 HPS_v2_compressed.pt --local-dir DIR/HPSv2` makes it; single files may
lie in DIR itself. Files are safetensors, or torch files of which only tensors are ever unpickled.
"""

import functools
import logging
import os
import re
import sys
import warnings
import zipfile
from pathlib import Path

import torch
from safetensors.torch import load_file

from parts import hub
from parts.common import UserError, read_json
from parts.hub import WeightsMissing, find_url, first_line, from_hub

SD15 = "stable-diffusion-v1-5/stable-diffusion-v1-5"  # runwayml's is gone; this copy lives
FP16_MAX = 65504
TOY = str(Path(__file__).resolve().parents[1] / "toy")


def find(repo, file=None, weights=None, repo_type="model"):
    """Path of a hub file or, with file None, of the folder of a whole model. Raises WeightsMissing.
    weights: a folder; then nothing but DIR/<last part of repo>[/file] and DIR/file is looked at."""
    command = f"hf download {repo} {file or ''} --repo-type {repo_type}"
    if weights:
        folder = f"{weights}/{repo.split('/')[-1]}"
        places = [f"{folder}/{file}", f"{weights}/{file}"] if file else [folder]
        for place in places:
            if os.path.exists(place):
                return place
        raise WeightsMissing(f"{places[0]} is not there: {command} --local-dir {folder}")
    if file is None:
        return from_hub(repo, hub.MODEL, has_weights)

    def is_there(folder):
        return os.path.exists(f"{folder}/{file}")

    return f"{from_hub(repo, re.escape(file), is_there, repo_type, command)}/{file}"


def read_state(path):
    """{name: tensor} of a .safetensors or a torch file. Nothing but tensors is ever unpickled."""
    path = str(path)
    try:
        if path.endswith(".safetensors"):
            return load_file(path)
        mapped = zipfile.is_zipfile(path)  # files from before torch 1.6 are not, and cannot be
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except Exception as error:  # torch raises many types for a damaged archive
        raise UserError(f"{path} {what_it_is(path)} ({type(error).__name__})") from error
    if isinstance(state, dict):
        state = state.get("state_dict", state)
    if not isinstance(state, dict) or not all(torch.is_tensor(v) for v in state.values()):
        raise UserError(f"{path} is not a checkpoint: it should hold one tensor per name")
    return state


def weight_files(folder):
    """The shards of a model's folder, as safetensors if there are any."""
    form = r"(diffusion_)?(pytorch_)?model(\.fp16)?(-\d+-of-\d+)?(\.fp16)?\.(safetensors|bin)"
    there = sorted(Path(folder).glob("*"))
    files = [file for file in there if re.fullmatch(form, file.name)]
    safe = [file for file in files if file.suffix == ".safetensors"]
    full = [file for file in safe or files if ".fp16." not in file.name]
    return [str(file) for file in full or safe or files]


def has_weights(folder):
    """Whether all shards are there, with their configuration."""
    files = weight_files(folder)
    shards = re.search(r"-of-(\d+)", files[0]) if files else None
    count = int(shards[1]) if shards else 1
    return len(files) >= count and os.path.exists(f"{folder}/config.json")


def read_folder(folder):
    """(config, {name: tensor} of all shards) of a model's folder."""
    files = weight_files(folder)
    if not files:
        raise WeightsMissing(f"no model*.safetensors or *.bin in {folder}: download it again")
    state = {}
    for file in files:
        state |= read_state(file)
    return read_config(folder), state


def read_config(folder, name="config.json"):
    return read_json(f"{folder}/{name}", "copy it there again")


def has_vocabulary(folder):
    """Whether a tokenizer's words are there: without them its class would take any text, and make
    the same token of every word."""
    there = {path.name for path in Path(folder).glob("*") if path.stat().st_size}
    alone = {"tokenizer.json", "vocab.txt", "spiece.model"}
    return not alone.isdisjoint(there) or {"vocab.json", "merges.txt"} <= there


def load_tokenizer(cls, repo, weights=None):
    if weights:
        folder = find(repo, None, weights)
    else:
        folder = from_hub(repo, hub.TOKENIZER, has_vocabulary)
    return read_tokenizer(cls, folder)


def read_tokenizer(cls, folder):
    """Raises WeightsMissing unless it has words, and the merges that make them of letters."""
    try:
        tokenizer = cls.from_pretrained(folder, local_files_only=True)
        words = len(tokenizer) - len(tokenizer.all_special_tokens)
        merges = Path(folder, "merges.txt")  # about one a word
        is_cut = merges.exists() and merges.read_bytes().count(b"\n") < words / 2
        if words <= 0 or is_cut or not has_vocabulary(folder):
            raise ValueError("words or merges are missing")
    except Exception as error:  # a dozen types
        files = "tokenizer.json, or vocab.json and merges.txt, vocab.txt or spiece.model"
        why = f"{folder} has no whole tokenizer ({first_line(error)})"
        raise WeightsMissing(f"{why}: copy {files} there again") from error
    return tokenizer


def check_keys(expected, state, path):
    """Raises UserError unless the two {name: tensor} have the same names and shapes, and the second
    holds numbers that fp16 holds: others (NaN, a flipped bit) would paint black pictures."""
    for name in sorted(expected.keys() ^ state.keys()):
        what = "lacks" if name in expected else "has a surplus"
        raise UserError(f"{path} {what} {name}: is it for this model?")
    for name, tensor in state.items():
        shape, wanted = tuple(tensor.shape), tuple(expected[name].shape)
        if shape != wanted:
            what = f"has {name} of shape {shape}, not {wanted}"
            raise UserError(f"{path} {what}: is it for this model?")
        if tensor.is_floating_point() and not (tensor.abs() <= FP16_MAX).all():
            what = "is not finite, or beyond what fp16 holds: copy it again, or train it anew"
            raise UserError(f"{path}: {name} {what}")


def build(make, state, path, device, dtype=torch.float32):
    """make() with `state` as its weights, frozen, in eval mode, or UserError naming a wrong key.
    Made on "meta": nothing is initialised only to be overwritten."""
    with torch.device("meta"):
        module = make()
    check_keys(module.state_dict(), state, path)
    cast = {k: v.to(dtype) if v.is_floating_point() else v for k, v in state.items()}
    module.load_state_dict(cast, assign=True)
    for part in module.modules():
        if hasattr(part, "position_ids"):  # 0, 1, 2, ...: a buffer that no checkpoint need hold
            shape = part.position_ids.shape
            part.position_ids = torch.arange(shape[-1]).expand(shape)
    return module.requires_grad_(False).eval().to(device)


def resolve_model(model):
    """(folder or hub id, why). "auto" is SD1.5 where there is CUDA, else the toy."""
    if model == "auto":
        return (SD15, "CUDA is here") if torch.cuda.is_available() else (TOY, "no CUDA here")
    return (TOY if model == "toy" else model), "asked for"


def is_sd15_id(model):
    """Whether it is SD1.5's hub id, of any revision."""
    return (model or "").split("@")[0] == SD15


def read_train_json(model):
    """What a model's folder says of training it: {flag: default}, with sections "pairs", "full"."""
    path = f"{resolve_model(model)[0]}/train.json"
    return read_json(path, "mend it") if os.path.exists(path) else {}


def find_prompts(where):
    """Path of the prompts that a model's folder brings, or None."""
    path = f"{where}/prompts.txt"
    return path if os.path.exists(path) else None


def find_training_prompts(model, path=None, weights=None):
    """Path of what to train on: --prompts, or the model's own, or SPO's. Raises UserError."""
    where, _ = resolve_model(model)
    path = path or find_prompts(where)
    if path is None and is_sd15_id(where):
        path = find_url(hub.SPO_PROMPTS_URL, weights)
    if path is None:
        what = f"{where!r} (of --model, or of the run's config.json)"
        raise UserError(f"{what} needs --prompts FILE: a text file with one prompt a line")
    return path


def what_it_is(file):
    """Of a file that holds no weights."""
    with open(file, "rb") as opened:
        head = opened.read(40)
    if head.startswith(b"version https://git-lfs"):
        return "is a Git LFS pointer: run git lfs pull there"
    if file.endswith(".safetensors") and head.startswith((b"PK", b"\x80")):
        return "is a pickle, not safetensors: give it its own ending, such as .bin"
    return "is damaged, or holds more than weights: copy it again"


def silence_libraries():
    """No progress bars of theirs between ours, no advice about parts that we do not use."""
    import transformers.utils.logging

    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()  # before diffusers imports what would warn
    import diffusers.utils.logging

    diffusers.utils.logging.disable_progress_bar()
    # of missing tensors, which load_part refuses
    logging.getLogger("diffusers.models.modeling_utils").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", message=".*local_dir_use_symlinks")


# ---- A Stable Diffusion --------------------------------------------------------------------------

CONFIG_FILES = ("model_index.json", "scheduler/scheduler_config.json")
CONFIG_FILES += ("unet/config.json", "vae/config.json", "text_encoder/config.json", "tokenizer")
PARTS = ("unet", "vae", "text_encoder")


def has_configs(folder):
    return all(os.path.exists(f"{folder}/{name}") for name in CONFIG_FILES)


def is_whole_model(folder):
    return has_configs(folder) and all(has_weights(f"{folder}/{part}") for part in PARTS)


def find_configs(where):
    """The folder of a model's configurations: where itself, or a hub id's, some kilobytes."""
    return where if os.path.isdir(where) else from_hub(where, hub.CONFIGS, has_configs)


def find_model(model):
    """(folder, None) of a whole model; of a single-file checkpoint (a folder with configurations
    for it, the file). Raises UserError, before a download, if not whole, or of another kind."""
    where, _ = resolve_model(model)
    if os.path.isfile(where):
        folder = os.path.dirname(os.path.abspath(where))
        if not has_configs(folder):  # so it does not lie in a whole model's folder
            folder = find_configs(SD15)
        check_kind(folder, where)
        return folder, where
    if os.path.isdir(where):
        lacking = [name for name in CONFIG_FILES if not os.path.exists(f"{where}/{name}")]
        lacking += [f"{part}'s weights" for part in PARTS if not has_weights(f"{where}/{part}")]
        if lacking:
            raise UserError(f"model folder {where!r} lacks {lacking[0]}: give a whole one")
        check_kind(where, where)
        return where, None
    if where.startswith((".", "/", "~")) or where.count("/") != 1:
        what = f"no model folder {where!r} (of --model, or of the run's config.json)"
        raise UserError(f"{what}: give a diffusers folder, or a hub id")
    check_kind(find_configs(where), where)
    return from_hub(where, hub.PIPELINE, is_whole_model), None


def check_kind(folder, where):
    """Raises UserError for a model that is not of Stable Diffusion 1's kind, by its configurations:
    one text encoder, latents of the VAE's channels, noise predicted, nothing distilled."""
    unet, vae, text_encoder = (read_config(f"{folder}/{part}") for part in PARTS)
    scheduler = read_config(f"{folder}/scheduler", "scheduler_config.json")
    kind, prediction = scheduler.get("_class_name", ""), scheduler.get("prediction_type", "epsilon")
    channels, latent = unet.get("in_channels", 4), vae.get("latent_channels", 4)
    widths = unet.get("cross_attention_dim"), text_encoder.get("hidden_size", 512)
    is_xl = unet.get("addition_embed_type") or widths[0] != widths[1]
    for is_so, fault in (
        (is_xl, "unet, text_encoder: not of Stable Diffusion 1's shape"),
        (unet.get("time_cond_proj_dim"), "its unet is distilled (LCM), with guidance built in"),
        (channels != latent, f"not a text-to-image model: UNet {channels} channels, VAE {latent}"),
        (re.search("FlowMatch|EDM", kind), f"{kind} has not Stable Diffusion 1's noise levels"),
        (prediction != "epsilon", f"only models that predict noise work, not {prediction}"),
        (scheduler.get("rescale_betas_zero_snr"), "zero-SNR betas: the first x_t has no signal"),
    ):
        if is_so:
            raise UserError(f"model {where!r}: {fault}")


def load_part(cls, folder, name, dtype):
    """A part of a model's folder, every tensor of it. The libraries would make up one that is
    missing, and only warn. Raises UserError, naming the first that is not as it should be."""
    path = f"{folder}/{name}"
    files = weight_files(path)
    options = dict(output_loading_info=True, ignore_mismatched_sizes=True, local_files_only=True)
    options |= dict(use_safetensors=files[0].endswith(".safetensors"), low_cpu_mem_usage=False)
    options["variant"] = "fp16" if ".fp16." in files[0] else None
    try:
        part, info = cls.from_pretrained(folder, subfolder=name, dtype=dtype, **options)
    except Exception as error:  # a dozen types, which do not name the file
        for file in files:
            read_state(file)  # which names a damaged one
        raise UserError(f"cannot load {path} ({first_line(error)}): copy it again") from error
    for kind in ("missing", "unexpected", "mismatched"):
        for tensor in sorted(map(str, info[f"{kind}_keys"])):
            raise UserError(f"{path}: {kind} {tensor}: copy the model again")
    check_keys(part.state_dict(), part.state_dict(), path)
    return part


def convert_part(cls, folder, name, dtype, file, checkpoint):
    """The same of a single-file checkpoint, {name: tensor}, by diffusers' own conversion; folder:
    of its configurations."""
    from diffusers.loaders import single_file_utils

    config = read_config(f"{folder}/{name}")
    if name == "text_encoder":
        make = functools.partial(cls, cls.config_class(**config))
        state = single_file_utils.convert_ldm_clip_checkpoint(checkpoint)
        state.pop("text_model.embeddings.position_ids", None)  # 0, 1, 2, ...
        with torch.device("meta"):
            is_flat = not hasattr(make(), "text_model")  # as of transformers 5.6
        if is_flat:
            state = {key.removeprefix("text_model."): value for key, value in state.items()}
    else:
        make = functools.partial(cls.from_config, config)
        convert = getattr(single_file_utils, f"convert_ldm_{name}_checkpoint")
        state = convert(checkpoint, config)
    return build(make, state, f"{file} ({name})", "cpu", dtype)


def ddim_scheduler(config):
    """A DDIM scheduler from any scheduler's config, corrected aloud: set_alpha_to_one and
    steps_offset 0 would make the last step's std 0, and log X infinite; "leading" is what
    t - T // num_steps assumes; clipped samples are not the Gaussian's."""
    from diffusers import DDIMScheduler

    needed = dict(clip_sample=False, thresholding=False, set_alpha_to_one=False)
    needed |= dict(steps_offset=1, timestep_spacing="leading")
    for name, value in needed.items():
        # what a config leaves unsaid was no choice (from_config would set clip_sample=True)
        if config.get(name, value) != value:
            print(f"scheduler corrected: {name} {config[name]} -> {value}", file=sys.stderr)
    scheduler = DDIMScheduler.from_config({**config, **needed})
    if not (scheduler.alphas_cumprod > 0).all():
        raise UserError("scheduler_config.json: its betas leave no signal, or are no numbers")
    return scheduler
