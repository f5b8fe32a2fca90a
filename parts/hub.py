"""The way of the weights: from the hub or a plain address, once, and said before the first byte.

What is in the hub's cache (HF_HOME) or torch's (TORCH_HOME) is used without a request. For what is
missing the hub is asked once; only weights in one form are taken of the several that lie there.
"""

import functools
import hashlib
import os
import re
import socket
import sys
from pathlib import Path
from urllib.parse import unquote, urlsplit
from urllib.request import getproxies

import torch

from parts.common import UserError

# What is taken of a repository, as patterns of its files' names.
MODEL = r"[^/]+\.(json|safetensors|bin)"
TOKENIZER = r"[^/]+\.(json|txt|model)"
CONFIGS = r"model_index\.json|(unet|vae|text_encoder|tokenizer|scheduler)/[^/]+\.(json|txt)"
PIPELINE = r"(unet|vae|text_encoder)/[^/]+\.(safetensors|bin)|" + CONFIGS
SPO_PROMPTS_URL = (
    "https://raw.githubusercontent.com/RockeyCoss/SPO/main/"
    "spo_training_and_inference/assets/prompts/4k_training_prompts.json"
)
# Of files from plain addresses: how their sha256 begins.
SHA256 = {
    "4k_training_prompts.json": "804018fcb30bc9bed28a2a0518855bffd386675a3c5138f96b925071cbae6fc4",
    "alexnet-owt-7be5be79.pth": "7be5be79",
    "alex.pth": "df73285e35b2",
    "sac+logos+ava1-l14-linearMSE.pth": "21dd590f3ccd",
}


class WeightsMissing(UserError):
    """Weights that cannot be had here: not in the folder, or not downloaded and no hub in reach."""


@functools.cache
def hub_out_of_reach():
    """True if only earlier downloads can be used; asked first, so that nobody waits for retries."""
    from huggingface_hub import constants

    hub = urlsplit(constants.ENDPOINT)
    if constants.HF_HUB_OFFLINE or getproxies().keys() & {hub.scheme, "all"}:
        return constants.HF_HUB_OFFLINE  # behind a proxy only the real request can tell
    try:
        port = hub.port or {"http": 80, "https": 443}[hub.scheme]
        socket.create_connection((hub.hostname, port), timeout=5).close()
        return False
    except OSError:
        return True


def from_hub(repo, wanted, is_whole, repo_type="model", fix=""):
    """A folder with a hub repository's files whose names fit `wanted`, a pattern: the cache's if
    is_whole(it), else downloaded. repo: owner/name[@revision]. Raises WeightsMissing."""
    from huggingface_hub import HfApi, constants, snapshot_download
    from huggingface_hub.utils import disable_progress_bars, enable_progress_bars

    fix = fix or "is the id right? Where the hub is in reach the same command fills HF_HOME"
    repo_id, _, revision = repo.partition("@")
    place = dict(repo_id=repo_id, repo_type=repo_type, revision=revision or None)
    try:
        folder = snapshot_download(**place, local_files_only=True, allow_patterns=[])
        if is_whole(folder):
            return folder
    except OSError:  # nothing, or a part, is there
        pass
    try:
        if hub_out_of_reach():
            raise OSError("not downloaded, and the hub is out of reach")
        names = [file.rfilename for file in HfApi().repo_info(**place).siblings]
        place["allow_patterns"] = choose_files(names, wanted)
        plan = snapshot_download(**place, dry_run=True)
        sizes = [file.file_size for file in plan if file.will_download]
        what = f"downloading {repo}: {len(sizes)} files, {sum(sizes) / 1e6:,.2f} MB"
        print(f"{what}, to {constants.HF_HUB_CACHE} (HF_HOME)", file=sys.stderr, flush=True)
        enable_progress_bars()
        try:
            folder = snapshot_download(**place)
        finally:
            disable_progress_bars()  # the next plan has none
        if not is_whole(folder):
            raise OSError("the repository lacks a part of it")
        return folder
    except Exception as error:  # no network, no such file, no permission, no space: a dozen types
        why = causes(error)
        if getattr(getattr(error, "response", None), "status_code", 0) in (401, 403):
            why += f"; ask to be let in at https://huggingface.co/{repo_id}, then hf auth login"
        raise WeightsMissing(f"{repo} cannot be had ({why}): {fix}") from error


def choose_files(names, wanted):
    """Of all forms in which weights lie in a repository, one: safetensors, neither half nor EMA."""
    chosen = []
    for name in names:
        plain = re.sub(r"\.(fp16|non_ema)(?=[.-])", "", name)
        safe = os.path.dirname(name) + r"/?[^/]+\.safetensors"
        is_copy = plain != name and plain in names
        is_copy |= name.endswith(".bin") and any(re.fullmatch(safe, other) for other in names)
        if re.fullmatch(wanted, name) and not is_copy and "open_clip" not in name:
            chosen.append(name)
    return chosen


def causes(error):
    """What an exception says and what its causes say, in one line: the library's own first line
    seldom tells a full disk from a lost network."""
    said = []
    while error is not None and len(said) < 4:
        line = first_line(error)
        if not any(line in other for other in said):
            said.append(line)
        error = error.__cause__ or error.__context__
    return "; ".join(said)


def first_line(error):
    """The first line of what an exception says, or its type where it says nothing."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0][:160]


def find_url(url, weights=None):
    """Path of a file from a plain address, kept where torch.hub keeps its downloads, and fetched
    again if its checksum is another. weights: as of find. Raises WeightsMissing."""
    name = unquote(url.split("/")[-1])
    path = f"{weights or torch.hub.get_dir() + '/checkpoints'}/{name}"
    command = f"curl -L -o '{path}' '{url}'"
    if weights:
        if not os.path.exists(path):
            raise WeightsMissing(f"{path} is not there: {command}")
        return path
    if os.path.exists(path):
        digest = hashlib.sha256(Path(path).read_bytes()).hexdigest()
        if digest.startswith(SHA256[name]):
            return path
    print(f"downloading {name} to {path} (TORCH_HOME)", file=sys.stderr, flush=True)
    patience = socket.getdefaulttimeout()
    try:
        os.makedirs(os.path.dirname(path), exist_ok=True)
        socket.setdefaulttimeout(30)  # seconds without a byte
        # to another name, which is changed once the checksum is right
        torch.hub.download_url_to_file(url, path, SHA256[name])
    except (OSError, RuntimeError) as error:  # of the network, of the checksum
        raise WeightsMissing(f"cannot download {name} ({causes(error)}): {command}") from error
    finally:
        socket.setdefaulttimeout(patience)
    return path
