"""The way of the weights, against a hub on the loopback: once, whole, and said; its every fault.

CUTS=200 python -m pytest tests/test_hub.py -k cut_anywhere      so many cut downloads
"""

import hashlib
import itertools
import json
import os
import random
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path
from urllib.parse import unquote

import pytest
import torch
from child import ranks
from conftest import PROMPTS, paint_nothing, shrink_judges
from huggingface_hub import constants
from safetensors.torch import load_file, save_file
from stand_in_hub import StandInHub
from weights import tiny_clip

from parts import diversity
from parts import hub as hub_module
from parts.common import UserError
from parts.hub import SHA256, WeightsMissing, choose_files, find_url
from parts.judges_clip import CLIP_H, Aesthetic, StepAware
from parts.model import load_pipeline
from parts.weights import SD15, find, find_model, load_tokenizer

BIN = str(Path(sys.executable).parent)
TEMPLATE = "{repo_id}/resolve/{revision}/{filename}"
WEIGHTS = ("unet/diffusion_pytorch_model", "vae/diffusion_pytorch_model", "text_encoder/model")


@pytest.fixture
def hub(micro, tmp_path, monkeypatch):
    """A hub with one model, and a cache with nothing in it."""
    repo = shutil.copytree(micro, tmp_path / "repo")
    shutil.copy(repo / f"{WEIGHTS[0]}.safetensors", repo / f"{WEIGHTS[0]}.fp16.safetensors")
    (repo / f"{WEIGHTS[0]}.bin").write_bytes(b"the same, as a pickle")
    (repo / "v1-5-pruned.ckpt").write_bytes(b"all of it once more")
    with StandInHub({"some/model": repo}) as server:
        monkeypatch.setattr(constants, "ENDPOINT", server.address)
        template = f"{server.address}/{TEMPLATE}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(torch.hub, "_hub_dir", str(tmp_path / "torch"))
        monkeypatch.setattr(time, "sleep", lambda seconds: None)  # before the hub's retries
        monkeypatch.setattr(hub_module, "SHA256", dict(hub_module.SHA256))
        hub_module.hub_out_of_reach.cache_clear()
        server.repo = repo
        yield server
    hub_module.hub_out_of_reach.cache_clear()


def fetched(hub):
    return sorted(
        path.split("/", 5)[5]
        for method, path in hub.requests
        if method == "GET" and "/resolve/" in path
    )


def assert_whole(hub):
    folder, _ = find_model("some/model")
    for name in WEIGHTS:
        file = f"{name}.safetensors"
        assert Path(folder, file).read_bytes() == (hub.repo / file).read_bytes()


# ---- What comes, and what does not ---------------------------------------------------------------


def test_a_first_start_takes_each_file_once_and_says_what_comes(hub, capsys):
    pipe = load_pipeline("some/model")
    said = capsys.readouterr().err
    files = fetched(hub)
    assert len(files) == len(set(files)) and len(files) == 10, files
    assert not [name for name in files if "fp16" in name or name.endswith((".bin", ".ckpt"))]
    size = sum((hub.repo / f"{name}.safetensors").stat().st_size for name in WEIGHTS) / 1e6
    assert f"downloading some/model: 3 files, {size:.2f} MB, to " in said and "(HF_HOME)" in said
    for name, tensor in load_file(hub.repo / f"{WEIGHTS[0]}.safetensors").items():
        assert torch.equal(pipe.unet.state_dict()[name], tensor)


def test_a_full_cache_is_used_without_a_request(hub, monkeypatch):
    find_model("some/model")
    hub.requests.clear()
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:9")
    hub.fault = dict(status=503)
    assert_whole(hub)
    hub_module.hub_out_of_reach.cache_clear()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    load_pipeline("some/model")
    assert hub.requests == []


def test_another_kind_of_model_is_refused_before_its_weights(hub):
    path = hub.repo / "unet" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"in_channels": 9}))
    with pytest.raises(UserError, match="not a text-to-image model"):
        find_model("some/model")
    assert not [name for name in fetched(hub) if name.endswith("safetensors")]


def test_a_folder_that_cannot_be_written_is_said_before_any_request(hub, command, tmp_path):
    (tmp_path / "file").write_text("")
    flags = ["--model", "some/model", "--output_dir", tmp_path / "file" / "run"]
    code, _, err = command("train.py", *flags, "--prompts", tmp_path / "file")
    assert code == 2 and "choose another --output_dir" in err and hub.requests == []


def test_two_at_once_take_each_file_once(hub):
    starts = [threading.Thread(target=find_model, args=["some/model"]) for _ in range(2)]
    for start in starts:
        start.start()
    for start in starts:
        start.join()
    assert_whole(hub)
    assert len(fetched(hub)) == len(set(fetched(hub)))


@pytest.fixture
def everything(hub, tiny_judges, monkeypatch):
    """All that SD1.5 asks for, tiny: the model, judges, HPDv2, four files of plain addresses."""
    names = [SD15, "ymhao/HPDv2", StepAware.repo, Aesthetic.repo, CLIP_H]
    hub.repos |= {name: Path(tiny_judges, name.split("/")[1]) for name in names}
    hub.repos[SD15], hub.repos["ymhao/HPDv2"] = hub.repo, hub.repo.parent / "HPDv2"
    hub.repos["ymhao/HPDv2"].mkdir()
    tested = json.dumps([{"prompt": prompt} for prompt in PROMPTS[:2]])
    Path(hub.repos["ymhao/HPDv2"], "test.json").write_text(tested)
    trained = json.dumps([{"caption": prompt} for prompt in PROMPTS[2:8]]).encode()
    addresses = (hub_module, "SPO_PROMPTS_URL"), (Aesthetic, "HEAD"), (diversity, "TRUNK")
    for place, attribute in (*addresses, (diversity, "HEADS")):
        name = unquote(getattr(place, attribute)).split("/")[-1]
        path = Path(tiny_judges, name)
        hub.files[f"/files/{name}"] = data = path.read_bytes() if path.exists() else trained
        monkeypatch.setattr(place, attribute, f"{hub.address}/files/{name}")
        hub_module.SHA256[name] = hashlib.sha256(data).hexdigest()
    return hub


def start_all(command, folder):
    """A training step, a picture, a judge and a metric of SD1.5; what they print."""
    run, printed = f"{folder}/run", ""
    train = ["train.py", "--div", "js", "--model", SD15, "--output_dir", run]
    train += ["--num_eval_prompts", 1, "--num_inference_steps", 5, "--sample_batch_size", 2]
    train += ["--num_epochs", 1, "--images_per_prompt", 2]
    sample = ["sample.py", "a sun", "--lora", run, "--output_dir", f"{folder}/samples"]
    evaluate = ["evaluate.py", run, "--judges", "aesthetic", "--metrics", "lpips"]
    evaluate += ["--images_per_prompt", 2, "--output_dir", f"{folder}/evaluation"]
    for words in (train, sample, evaluate):
        code, out, err = command(*words)
        assert code == 0, err
        printed += out + err
    return printed


def test_every_command_starts_with_the_hub_and_then_without(everything, command, monkeypatch):
    printed = start_all(command, "first")
    names = [SD15, StepAware.repo, CLIP_H, Aesthetic.repo, "ymhao/HPDv2", *SHA256]
    assert all(printed.count(f"downloading {name}") for name in names)
    assert "evaluate.py first/run      Tables 2 and 3 (36.5 GB of judges)" in printed
    files = [path for method, path in everything.requests if method == "GET"]
    files = [path for path in files if not path.startswith("/api")]
    assert len(files) == len(set(files))

    everything.requests.clear()
    everything.fault = dict(status=503)
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:9")
    hub_module.hub_out_of_reach.cache_clear()
    assert "downloading" not in start_all(command, "second")
    assert everything.requests == []


def from_stand_in():
    """In a rank of its own: the hub and the cache of the test."""
    constants.ENDPOINT = os.environ["HF_ENDPOINT"]
    constants.HUGGINGFACE_CO_URL_TEMPLATE = f"{constants.ENDPOINT}/{TEMPLATE}"
    constants.HF_HUB_CACHE, constants.HF_HUB_OFFLINE = os.environ["HF_HUB_CACHE"], False
    shrink_judges(setattr, os.environ["TINY_JUDGES"])
    paint_nothing()


def test_two_ranks_download_once(everything, tiny_judges, prompts_file, tmp_path):
    environment = {"HF_ENDPOINT": everything.address, "TINY_JUDGES": tiny_judges}
    environment["HF_HUB_CACHE"] = constants.HF_HUB_CACHE
    flags = ["--model", SD15, "--prompts", prompts_file, "--num_inference_steps", 5]
    flags += ["--sample_batch_size", 2, "--num_epochs", 1, "--num_eval_prompts", 1]
    flags += ["--images_per_prompt", 1, "--output_dir", tmp_path / "run"]
    ended = ranks("train.py", *flags, change=from_stand_in, environment=environment)
    assert [code for code, _ in ended] == [0, 0], ended
    assert len(fetched(everything)) == len(set(fetched(everything))) > 10


def test_a_revision_is_asked_for(hub):
    with pytest.raises(WeightsMissing):
        hub.fault, hub.where = dict(status=404), "/revision/v2"
        find_model("some/model@v2")
    assert any(path.endswith("/revision/v2") for _, path in hub.requests)


@pytest.mark.parametrize(
    "names, chosen",
    [
        ("model.safetensors pytorch_model.bin config.json", "model.safetensors config.json"),
        ("pytorch_model-00001-of-00002.bin pytorch_model-00002-of-00002.bin", ""),
        ("model.fp16.safetensors config.json", ""),
        ("model.safetensors model.fp16.safetensors", "model.safetensors"),
        ("model.non_ema.safetensors model.safetensors", "model.safetensors"),
        ("open_clip_model.safetensors model.safetensors", "model.safetensors"),
        ("onnx/model.json tf_model.h5 model.safetensors", "model.safetensors"),
    ],
)
def test_of_several_forms_one_is_taken(names, chosen):
    names = names.split()
    assert choose_files(names, hub_module.MODEL) == (chosen.split() or names)


# ---- Faults --------------------------------------------------------------------------------------

FAULTS = {
    "401": (dict(status=401), "then hf auth login"),
    "403": (dict(status=403), "then hf auth login"),
    "404": (dict(status=404), "404"),
    "503": (dict(status=503), "503"),
    "a page": (dict(html=True), "cannot be had"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_is_one_line_and_the_next_start_goes_on(hub, command, name):
    hub.fault, words = FAULTS[name]
    code, _, err = command("sample.py", "a sun", "--model", "some/model", "--output_dir", "never")
    assert code == 2 and err.count("\n") == 1 and words in err and "some/model" in err, err
    hub.fault = None
    assert_whole(hub)


def test_cut_anywhere_the_next_start_goes_on_to_the_same_bytes(hub):
    choose = random.Random(0)
    names = [f"{name}.safetensors" for name in WEIGHTS] + ["unet/config.json"]
    for name, _ in zip(itertools.cycle(names), range(int(os.environ.get("CUTS", 4)))):
        size = (hub.repo / name).stat().st_size
        hub.fault, hub.where = dict(cut=choose.randrange(size)), f"/{name}"
        with pytest.raises(WeightsMissing, match="some/model cannot be had"):
            find_model("some/model")
        hub.fault = None
        assert_whole(hub)
        shutil.rmtree(constants.HF_HUB_CACHE)


def test_a_slow_hub_is_waited_for(hub):
    hub.fault = dict(slow=0.05)
    assert_whole(hub)


def test_with_no_hub_the_message_names_a_command_that_runs(hub, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    hub_module.hub_out_of_reach.cache_clear()
    with pytest.raises(WeightsMissing, match="out of reach") as error:
        find("some/model", "vae/config.json")
    command = str(error.value).rsplit("): ", 1)[1]
    # the command itself, against this hub
    environment = {"HF_ENDPOINT": hub.address, "HF_HOME": constants.HF_HUB_CACHE, "PATH": BIN}
    done = subprocess.run(
        [*command.split(), "--dry-run"], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0 and "config.json" in done.stdout, done.stderr


def test_the_probe(monkeypatch):
    """A proxy for all schemes; an address without a port."""
    for address, proxies, expected in (
        ("http://127.0.0.1", {}, ("127.0.0.1", 80)),
        ("https://hub.example", {}, ("hub.example", 443)),
        ("https://hub.example", {"all": "socks5://127.0.0.1:1"}, None),
    ):
        asked = []
        monkeypatch.setattr(constants, "ENDPOINT", address)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(hub_module, "getproxies", lambda proxies=proxies: proxies)

        def connect(place, timeout, asked=asked):
            asked.append(place)
            raise OSError("nobody")

        monkeypatch.setattr(hub_module.socket, "create_connection", connect)
        hub_module.hub_out_of_reach.cache_clear()
        assert hub_module.hub_out_of_reach() == (expected is not None)
        assert asked == ([expected] if expected else [])
    hub_module.hub_out_of_reach.cache_clear()


# ---- Tokenizers: none is taken without its words -------------------------------------------------


def no_vocabulary(folder):
    (folder / "tokenizer.json").unlink()


def empty_vocabulary(folder):
    (folder / "tokenizer.json").write_text("")


def a_page(folder):
    (folder / "tokenizer.json").write_text("<html>")


def no_merges(folder):
    tokenizer = json.loads((folder / "tokenizer.json").read_text())["model"]
    (folder / "tokenizer.json").unlink()
    (folder / "vocab.json").write_text(json.dumps(tokenizer["vocab"]))
    (folder / "merges.txt").write_text("#version: 0.2\n")


@pytest.mark.parametrize("damage", [no_vocabulary, empty_vocabulary, a_page, no_merges])
def test_a_tokenizer_without_words_is_refused(micro, tmp_path, damage):
    from transformers import CLIPTokenizer

    folder = shutil.copytree(micro, tmp_path / "model")
    damage(folder / "tokenizer")
    with pytest.raises(UserError, match="tokenizer has no whole tokenizer"):
        load_pipeline(str(folder))
    shutil.copytree(folder / "tokenizer", tmp_path / "weights" / "name")
    with pytest.raises(UserError, match="name has no whole tokenizer"):
        load_tokenizer(CLIPTokenizer, "some/name", str(tmp_path / "weights"))


def test_a_judges_tokenizer_comes_from_the_hub(hub, tmp_path):
    from transformers import CLIPTokenizer

    tiny_clip(tmp_path / "clip")
    hub.repos["some/clip"] = tmp_path / "clip"
    assert len(load_tokenizer(CLIPTokenizer, "some/clip")) > 100
    assert "model.safetensors" not in fetched(hub)
    find("some/clip")
    assert "model.safetensors" in fetched(hub)
    hub.requests.clear()
    find("some/clip")
    assert hub.requests == []


# ---- Plain addresses -----------------------------------------------------------------------------


def test_a_file_of_a_plain_address_gets_its_name_when_its_checksum_is_right(hub, tmp_path):
    data = tmp_path / "head.pth"
    save_file({"x": torch.arange(9999.0)}, data)
    data = data.read_bytes()
    hub.files["/files/head.pth"] = data
    hub_module.SHA256["head.pth"] = hashlib.sha256(data).hexdigest()[:12]
    address = f"{hub.address}/files/head.pth"
    for fault in (dict(cut=700), dict(html=True), dict(status=503)):
        hub.fault = fault
        with pytest.raises(WeightsMissing, match="cannot download head.pth .*curl -L -o"):
            find_url(address)
        assert not list((tmp_path / "torch").rglob("head.pth"))
    hub.fault = None
    path = Path(find_url(address))
    assert path.read_bytes() == data
    path.write_bytes(data[:700])  # a download of another program, cut
    assert Path(find_url(address)).read_bytes() == data
    hub.requests.clear()
    find_url(address)
    assert hub.requests == []
