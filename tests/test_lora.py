"""LoRA files as people have them: the picture of plain diffusers with the same file."""

import json
import math

import pytest
import torch
from conftest import PROMPTS, shake
from diffusers.utils import convert_state_dict_to_kohya
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from parts.common import UserError
from parts.lora import KOHYA_FILE, read_lora
from parts.model import LORA_FILE, Policy, load_pipeline, load_policy
from sample import generate

RANK = 4


@pytest.fixture(scope="module")
def own(micro, tmp_path_factory):
    """{name: tensor} of a LoRA in diffusers' own names, whose B is not 0."""
    policy = Policy(load_pipeline(micro).unet, RANK)
    shake(policy, scale=0.3)
    folder = tmp_path_factory.mktemp("own")
    policy.save(str(folder), {"div": "js"})
    return load_file(folder / LORA_FILE)


def renamed(state, *changes):
    for old, new in changes:
        state = {name.replace(old, new): tensor for name, tensor in state.items()}
    return state


def processors(state):
    """Attention processors' names, diffusers' of 2023."""
    for target in ("to_q", "to_k", "to_v", "to_out"):
        place = "to_out.0" if target == "to_out" else target
        for old, new in (("lora_A", "down"), ("lora_B", "up")):
            state = renamed(state, (f".{place}.{old}.", f".processor.{target}_lora.{new}."))
    return state


def kohya(state, alpha):
    state = convert_state_dict_to_kohya(dict(state))
    return {k: torch.tensor(alpha) if k.endswith(".alpha") else v for k, v in state.items()}


def header(**config):
    names = {f"unet.{key}": value for key, value in config.items()}
    return {"format": "pt", "lora_adapter_metadata": json.dumps(names)}


CONFIG = dict(r=RANK, target_modules=["to_q", "to_k", "to_v", "to_out.0"])
DIALECTS = {
    "diffusers": (lambda s: s, None),
    ".down .up": (
        lambda s: renamed(s, (".lora_A.", ".lora.down."), (".lora_B.", ".lora.up.")),
        None,
    ),
    "processor": (processors, None),
    "kohya, alpha = rank": (lambda s: kohya(s, float(RANK)), None),
    "kohya, alpha 1": (lambda s: kohya(s, 1.0), None),
    "kohya, alpha 16": (lambda s: kohya(s, 16.0), None),
    "metadata, alpha 8": (lambda s: s, header(lora_alpha=8, **CONFIG)),
    "metadata, rslora": (lambda s: s, header(lora_alpha=8, use_rslora=True, **CONFIG)),
    "q and v alone": (lambda s: {k: v for k, v in s.items() if "to_q" in k or "to_v" in k}, None),
}


def picture(pipe):
    return generate(pipe, PROMPTS[:2], [0, 1], num_steps=3)


@pytest.mark.parametrize("dialect", DIALECTS)
def test_a_dialect_gives_the_picture_of_plain_diffusers(micro, own, tmp_path, dialect):
    change, metadata = DIALECTS[dialect]
    file = tmp_path / "lora.safetensors"
    tensors = {name: tensor.contiguous() for name, tensor in change(own).items()}
    save_file(tensors, file, metadata or {"format": "pt"})
    theirs = load_pipeline(micro)
    theirs.load_lora_weights(str(file))
    ours = load_pipeline(micro)
    before = picture(ours)
    load_policy(ours.unet, str(file))
    difference = (picture(ours) - picture(theirs)).abs().max()
    assert difference < 1e-4 < 0.01 < (picture(ours) - before).abs().max()


PEFTS = {
    ".default.": lambda s: renamed(
        s, ("lora_A.", "lora_A.default."), ("lora_B.", "lora_B.default.")
    ),
    ".default_0.": lambda s: renamed(
        s, ("lora_A.", "lora_A.default_0."), ("lora_B.", "lora_B.default_0.")
    ),
    "peft": lambda s: {"base_model.model." + k.removeprefix("unet."): v for k, v in s.items()},
}


@pytest.mark.parametrize("dialect", PEFTS)
@pytest.mark.parametrize("alpha, rslora", [(None, False), (2 * RANK, False), (RANK, True)])
def test_pefts_names_are_the_same_tensors(own, tmp_path, dialect, alpha, rslora):
    """Plain diffusers reads these wrongly or not at all; alpha is in adapter_config.json."""
    file = tmp_path / "adapter_model.safetensors"
    save_file(PEFTS[dialect](own), file)
    if alpha:
        config = {"lora_alpha": alpha, "use_rslora": rslora}
        (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    scale = (alpha or RANK) / (math.sqrt(RANK) if rslora else RANK)
    layers = read_lora(str(file), load_file(file))
    assert len(layers) == len(own) / 2
    for layer, (A, B) in layers.items():
        assert torch.equal(A, own[f"unet.{layer}.lora_A.weight"])
        assert torch.allclose(B, scale * own[f"unet.{layer}.lora_B.weight"])


def test_a_damaged_header_names_the_file(own, tmp_path):
    file = tmp_path / "lora.safetensors"
    save_file(own, file, {"format": "pt", "lora_adapter_metadata": '{"lora_alpha": '})
    with pytest.raises(UserError, match="lora.safetensors holds no LoRA"):
        read_lora(str(file), load_file(file))


def first(own):
    return sorted(own)[0].removesuffix(".lora_A.weight")


BAD = {
    "text encoder": (
        lambda s: s | {"text_encoder.q_proj.lora_A.weight": torch.zeros(4, 8)},
        "text_encoder.q_proj.lora_A.weight: only a LoRA of the UNet alone",
    ),
    "convolution": (
        lambda s: (
            s
            | {
                "unet.conv_in.lora_A.weight": torch.zeros(4, 4, 3, 3),
                "unet.conv_in.lora_B.weight": torch.zeros(16, 4, 1, 1),
            }
        ),
        "changes conv_in, a convolution",
    ),
    "DoRA": (
        lambda s: s | {f"{first(s)}.lora_magnitude_vector": torch.ones(4)},
        "only plain LoRA is read",
    ),
    "DoRA in kohya's names": (
        lambda s: kohya(s, 4.0) | {"lora_unet_conv_in.dora_scale": torch.ones(4)},
        "is a DoRA",
    ),
    "LoHa": (
        lambda s: {f"lora_unet_{i}.hada_w1_a": torch.zeros(1) for i in range(999)},
        "holds no LoRA",
    ),
    "NaN": (
        lambda s: s | {f"{first(s)}.lora_A.weight": torch.full((4, 16), math.nan)},
        "not finite",
    ),
    "half": (lambda s: {k: v for k, v in s.items() if "lora_A" in k}, "lacks unet."),
    "nothing": (lambda s: {"other": torch.zeros(1)}, "holds other: only a LoRA"),
}


@pytest.mark.parametrize("fault", BAD)
def test_what_cannot_be_held_is_said(micro, own, tmp_path, fault):
    change, words = BAD[fault]
    file = tmp_path / "lora.safetensors"
    save_file(change(own), file)
    with pytest.raises(UserError, match=words) as error:
        load_policy(load_pipeline(micro).unet, str(file))
    assert len(str(error.value)) < 500


def without_prefix(own):
    return {k.removeprefix("unet."): v for k, v in processors(own).items()}


def with_its_unet(own):
    """accelerate's checkpoint-N/model.safetensors: peft's UNet, base weights and LoRA in one."""
    state = {k.removeprefix("unet."): v for k, v in PEFTS[".default."](own).items()}
    return state | {f"{first(own).removeprefix('unet.')}.base_layer.weight": torch.zeros(16, 16)}


FOLDERS = {
    "d3po's": ("pytorch_lora_weights.bin", without_prefix),
    "another name": ("spo_lora.safetensors", lambda s: s),
    "accelerate's": ("model.safetensors", with_its_unet),
}


@pytest.mark.parametrize("kind", FOLDERS)
def test_a_folder_with_one_lora_of_another_name(micro, own, tmp_path, kind):
    """RockeyCoss/SPO#24, yk7333/d3po#18, diffusers#6252."""
    name, change = FOLDERS[kind]
    save = torch.save if name.endswith(".bin") else save_file
    save(change(own), tmp_path / name)
    policy = load_policy(load_pipeline(micro).unet, str(tmp_path))
    for key, tensor in policy.state().items():
        assert torch.equal(tensor, own[key])
    (tmp_path / name).rename(tmp_path / KOHYA_FILE)  # a copy, of a run whose own file is gone
    with pytest.raises(UserError, match="no LoRA at"):
        load_policy(load_pipeline(micro).unet, str(tmp_path))


def test_a_run_writes_kohyas_names_too(micro, tmp_path):
    """Every layer, with its alpha; the metadata of both files."""
    policy = Policy(load_pipeline(micro).unet, RANK)
    policy.save(str(tmp_path), {"div": "js", "seed": "0"})
    ours, theirs = load_file(tmp_path / LORA_FILE), load_file(tmp_path / KOHYA_FILE)
    assert len(theirs) == 3 * len(ours) / 2
    for name in ours:
        if name.endswith("lora_A.weight"):
            layer = name.removesuffix(".lora_A.weight").replace(".", "_")
            assert torch.equal(theirs[f"lora_{layer}.lora_down.weight"], ours[name])
            assert theirs[f"lora_{layer}.alpha"].item() == RANK
    for file in (KOHYA_FILE, LORA_FILE):
        with safe_open(tmp_path / file, "pt") as opened:
            assert opened.metadata()["div"] == "js" and opened.metadata()["seed"] == "0"
