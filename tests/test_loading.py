"""Which model is meant, and its loading: what is corrected aloud, what is refused."""

import json
import math
import os
import re
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from loss import ddim_mean_std
from parts.common import UserError
from parts.model import encode_prompts, latent_shape, load_pipeline
from parts.weights import (
    SD15,
    TOY,
    find_prompts,
    find_training_prompts,
    read_train_json,
    resolve_model,
)


def edited_copy(folder, new, file, **changes):
    """A copy of a model's folder with changes in one JSON file."""
    shutil.copytree(folder, new)
    path = new / file
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    return str(new)


# --------------------------------------------------------------------------------------------------
# Which model, which prompts


def test_auto_is_sd15_where_there_is_cuda_else_the_toy(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert resolve_model("auto") == (SD15, "CUDA is here")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert resolve_model("auto") == (TOY, "no CUDA here")
    assert resolve_model("toy") == (TOY, "asked for")
    assert resolve_model("some/model") == ("some/model", "asked for")


def test_a_folder_brings_its_flags_and_prompts(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert read_train_json("toy")["judge"] == "taste"  # wherever one stands
    assert read_train_json(str(tmp_path)) == {} and find_prompts(str(tmp_path)) is None
    (tmp_path / "train.json").write_text('{"learning_rate": 0.5, "pairs": {"beta": 2}}')
    (tmp_path / "prompts.txt").write_text("a sun\n")
    assert read_train_json(str(tmp_path)) == {"learning_rate": 0.5, "pairs": {"beta": 2}}
    assert find_prompts(str(tmp_path)) == str(tmp_path / "prompts.txt")
    (tmp_path / "train.json").write_text('{"learning_rate":')
    with pytest.raises(UserError, match="train.json as JSON"):
        read_train_json(str(tmp_path))


def test_training_prompts_are_those_given_or_the_models_own(micro, tmp_path):
    assert find_training_prompts("toy", "mine.txt") == "mine.txt"
    assert find_training_prompts("toy") == os.path.join(TOY, "prompts.txt")
    with pytest.raises(UserError, match="needs --prompts FILE"):
        find_training_prompts(micro)
    with pytest.raises(UserError, match="4k_training_prompts.json is not there: curl"):
        find_training_prompts(SD15, weights=str(tmp_path))


# --------------------------------------------------------------------------------------------------
# Loading


def test_nothing_is_trainable_and_no_safety_checker_runs(pipe):
    assert pipe.safety_checker is None
    for part in (pipe.unet, pipe.vae, pipe.text_encoder):
        assert not part.training
        assert not any(parameter.requires_grad for parameter in part.parameters())


def test_sd15s_own_scheduler_becomes_ddim_in_silence(micro, tmp_path, capsys):
    """SD1.5 ships a PNDM scheduler, whose config leaves unsaid what DDIM would do wrong."""
    changes = dict(_class_name="PNDMScheduler", skip_prk_steps=True, trained_betas=None)
    path = "scheduler/scheduler_config.json"
    folder = edited_copy(micro, tmp_path / "m", path, **changes)
    config = json.loads((tmp_path / "m" / path).read_text())
    del config["clip_sample"]
    (tmp_path / "m" / path).write_text(json.dumps(config))
    index = tmp_path / "m" / "model_index.json"
    index.write_text(index.read_text().replace("DDIMScheduler", "PNDMScheduler"))
    pipe = load_pipeline(folder)
    assert capsys.readouterr().err == ""
    assert type(pipe.scheduler).__name__ == "DDIMScheduler"
    assert not pipe.scheduler.config.clip_sample


def test_a_scheduler_whose_last_step_is_silent_is_corrected_aloud(micro, tmp_path, capsys):
    wrong = dict(set_alpha_to_one=True, clip_sample=True, steps_offset=0)
    path = "scheduler/scheduler_config.json"
    pipe = load_pipeline(edited_copy(micro, tmp_path / "m", path, **wrong))
    err = capsys.readouterr().err
    for name in wrong:
        assert f"scheduler corrected: {name} " in err
    pipe.scheduler.set_timesteps(20)
    t = pipe.scheduler.timesteps
    assert t.tolist() == list(range(951, 0, -50))  # SPO's
    nothing = torch.zeros(20, 4, 1, 1)
    _, std, _ = ddim_mean_std(nothing, nothing, t, pipe.scheduler.alphas_cumprod, 20)
    assert (std > 0).all()


@pytest.mark.parametrize(
    "wrong, words",
    [
        (dict(prediction_type="v_prediction"), "not v_prediction"),
        (dict(rescale_betas_zero_snr=True), "zero-SNR betas"),
    ],
)
def test_unsuitable_schedulers_are_refused(micro, tmp_path, wrong, words):
    folder = edited_copy(micro, tmp_path / "m", "scheduler/scheduler_config.json", **wrong)
    with pytest.raises(UserError, match=words):
        load_pipeline(folder)


@pytest.mark.parametrize("part", ("unet", "vae", "text_encoder"))
@pytest.mark.parametrize("fault", ("missing", "unexpected", "mismatched", "not finite"))
def test_a_part_that_is_not_whole_is_refused(micro, tmp_path, part, fault):
    """cases.md 1 and 7: the libraries make a random layer of what is missing, and NaN is loaded."""
    folder = shutil.copytree(micro, tmp_path / "model")
    (file,) = (folder / part).glob("*.safetensors")
    state = load_file(file)
    name = sorted(state)[5]
    if fault == "missing":
        del state[name]
    elif fault == "unexpected":
        state["extra.weight"] = torch.zeros(2)
        name = "extra.weight"
    elif fault == "mismatched":
        state[name] = torch.zeros(3, 7)
    else:
        state[name].view(-1)[0] = math.nan
    save_file(state, file, {"format": "pt"})
    with pytest.raises(UserError, match=f"{part}:? {re.escape('' if 'not' in fault else fault)}"):
        load_pipeline(str(folder))
    with pytest.raises(UserError, match=re.escape(name)):
        load_pipeline(str(folder))


def test_folders_as_people_have_them(micro, tmp_path):
    """cases.md 12: fp16 files alone, a tokenizer that does not say its length, a UNet that does not
    say its size."""
    folder = shutil.copytree(micro, tmp_path / "model")
    plain = load_pipeline(micro)
    expected = encode_prompts(plain, ["a red sun " * 20])
    for part in ("unet", "vae", "text_encoder"):
        (file,) = (folder / part).glob("*.safetensors")
        file.rename(file.with_suffix(".fp16.safetensors"))
    path = folder / "tokenizer" / "tokenizer_config.json"
    config = json.loads(path.read_text())
    config.pop("model_max_length")
    path.write_text(json.dumps(config))
    pipe = load_pipeline(str(folder))
    assert pipe.tokenizer.model_max_length > 10**9
    assert torch.equal(encode_prompts(pipe, ["a red sun " * 20]), expected)
    for a, b in zip(pipe.unet.parameters(), plain.unet.parameters()):
        assert torch.equal(a, b)
    path = folder / "unet" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"sample_size": None}))
    assert latent_shape(load_pipeline(str(folder))) == (4, 64, 64)


NOT_WEIGHTS = {
    "a Git LFS pointer": b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n",
    "a pickle": b"PK\x03\x04 and so on",
    "damaged": b"\x00\x01",
}


@pytest.mark.parametrize("kind", NOT_WEIGHTS)
def test_what_lies_in_place_of_weights_is_told(micro, tmp_path, kind):
    folder = shutil.copytree(micro, tmp_path / "model")
    file = folder / "unet" / "diffusion_pytorch_model.safetensors"
    file.write_bytes(NOT_WEIGHTS[kind])
    with pytest.raises(UserError, match=f"{re.escape(str(file))} is {kind}"):
        load_pipeline(str(folder))


def test_a_word_that_the_text_encoder_does_not_know(micro, tmp_path):
    """huggingface/transformers#12763: a placeholder of textual inversion, not embedded."""
    folder = shutil.copytree(micro, tmp_path / "model")
    tokenizer = load_pipeline(micro).tokenizer
    tokenizer.add_tokens("<cat-toy>")
    tokenizer.save_pretrained(folder / "tokenizer")
    with pytest.raises(UserError, match="tokenizer of .* words, text_encoder of"):
        load_pipeline(str(folder))


# ---- A single-file checkpoint --------------------------------------------------------------------


def sd1_shaped(folder):
    """SD1.5's blocks, a hundredth of its width, with the toy's tokenizer."""
    import diffusers
    from transformers import CLIPTextConfig, CLIPTextModel

    from toy import make

    torch.manual_seed(0)
    words = make.tokenizer()
    text = CLIPTextConfig(
        vocab_size=len(words),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=16,
    )
    narrow = dict(block_out_channels=(8, 8, 16, 16), norm_num_groups=8)
    unet = dict(cross_attention_dim=16, attention_head_dim=8, sample_size=8)
    vae = dict(latent_channels=4, layers_per_block=2)
    vae |= dict(
        down_block_types=["DownEncoderBlock2D"] * 4, up_block_types=["UpDecoderBlock2D"] * 4
    )
    sampler = dict(clip_sample=False, set_alpha_to_one=False, steps_offset=1)
    diffusers.StableDiffusionPipeline(
        unet=diffusers.UNet2DConditionModel(**narrow, **unet),
        vae=diffusers.AutoencoderKL(**narrow, **vae),
        text_encoder=CLIPTextModel(text),
        tokenizer=words,
        scheduler=diffusers.DDIMScheduler(**sampler),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    ).save_pretrained(folder)


# names of diffusers -> of CompVis's checkpoints, by hand, the other way round than diffusers
INSIDE = {
    r"norm1\.": "in_layers.0.",
    r"conv1\.": "in_layers.2.",
    r"norm2\.": "out_layers.0.",
    r"conv2\.": "out_layers.3.",
    r"time_emb_proj\.": "emb_layers.1.",
    r"conv_shortcut\.": "skip_connection.",
}
AROUND = {
    "conv_in.": "input_blocks.0.0.",
    "conv_norm_out.": "out.0.",
    "conv_out.": "out.2.",
    "time_embedding.linear_1.": "time_embed.0.",
    "time_embedding.linear_2.": "time_embed.2.",
    "mid_block.resnets.0.": "middle_block.0.",
    "mid_block.attentions.0.": "middle_block.1.",
    "mid_block.resnets.1.": "middle_block.2.",
}


def compvis_unet(name):
    place = re.match(r"(down|up)_blocks\.(\d)\.(\w+)\.(\d)\.(.*)", name)
    if not place:
        old = next(old for old in AROUND if name.startswith(old))
        new, rest = AROUND[old], name.removeprefix(old)
        kind = "resnets" if "resnets" in old else ""
    else:
        side, block, kind, j, rest = place.groups()
        last = "samplers" in kind  # stands behind a block's two, or three, others
        number = 3 * int(block) + (2 if last else int(j)) + (1 if side == "down" else 0)
        slots = {"resnets": 0, "attentions": 1, "downsamplers": 0}
        slot = slots.get(kind, 1 if block == "0" else 2)
        rest = rest.replace("conv.", "op.") if kind == "downsamplers" else rest
        new = f"{'input' if side == 'down' else 'output'}_blocks.{number}.{slot}."
    if kind == "resnets":
        for old, other in INSIDE.items():
            rest = re.sub(f"^{old}", other, rest)
    return f"model.diffusion_model.{new}{rest}"


def compvis_vae(name):
    for old, new in {
        r"mid_block\.resnets\.0": "mid.block_1",
        r"mid_block\.resnets\.1": "mid.block_2",
        r"mid_block\.attentions\.0\.group_norm": "mid.attn_1.norm",
        r"mid_block\.attentions\.0\.to_out\.0": "mid.attn_1.proj_out",
        r"mid_block\.attentions\.0\.to_": "mid.attn_1.",
        r"down_blocks\.(\d)\.resnets": r"down.\1.block",
        r"down_blocks\.(\d)\.downsamplers\.0": r"down.\1.downsample",
        r"conv_norm_out": "norm_out",
        r"conv_shortcut": "nin_shortcut",
    }.items():
        name = re.sub(old, new, name)
    up = re.match(r"decoder\.up_blocks\.(\d)\.(resnets|upsamplers)\.?(\d?)(.*)", name)
    if up:
        block, kind, j, rest = up.groups()
        inner = f"block.{j}" if kind == "resnets" else "upsample"
        name = f"decoder.up.{3 - int(block)}.{inner}{rest}"
    return f"first_stage_model.{name}"


@pytest.fixture(scope="module")
def single(tmp_path_factory):
    """(a diffusers folder, the same weights as one file in CompVis's names)."""
    folder = tmp_path_factory.mktemp("sd1")
    sd1_shaped(folder / "folder")
    state = {}
    for name, x in load_file(folder / "folder/unet/diffusion_pytorch_model.safetensors").items():
        state[compvis_unet(name)] = x
    for name, x in load_file(folder / "folder/vae/diffusion_pytorch_model.safetensors").items():
        is_attention = "attentions" in name and x.ndim == 2
        state[compvis_vae(name)] = x[:, :, None, None] if is_attention else x
    for name, x in load_file(folder / "folder/text_encoder/model.safetensors").items():
        name = "text_model." + name.removeprefix("text_model.")
        state[f"cond_stage_model.transformer.{name}"] = x
    state["cond_stage_model.transformer.text_model.embeddings.position_ids"] = torch.arange(16)[
        None
    ]
    state["model_ema.decay"] = torch.ones(())
    save_file(state, folder / "folder" / "v1-5-pruned.safetensors")
    return folder / "folder", folder / "folder" / "v1-5-pruned.safetensors"


def test_a_single_file_is_the_model_of_its_folder(single):
    folder, file = single
    expected, pipe = load_pipeline(str(folder)), load_pipeline(str(file))
    for part in ("unet", "vae", "text_encoder"):
        theirs = getattr(expected, part).state_dict()
        for name, tensor in getattr(pipe, part).state_dict().items():
            assert torch.equal(tensor, theirs[name]), name
    text = encode_prompts(pipe, ["a sun"])
    assert torch.equal(text, encode_prompts(expected, ["a sun"]))


@pytest.mark.parametrize("part", ("model.diffusion_model", "first_stage", "cond_stage"))
def test_a_single_file_that_is_not_whole_is_refused(single, part, tmp_path):
    folder, file = single
    state = load_file(file)
    del state[[name for name in state if name.startswith(part) and "position" not in name][3]]
    own = shutil.copytree(folder, tmp_path / "own")
    save_file(state, own / "cut.safetensors")
    with pytest.raises(UserError, match="cut.safetensors .* lacks"):
        load_pipeline(str(own / "cut.safetensors"))


def test_a_single_file_alone_needs_sd15s_configurations(single, tmp_path):
    _, file = single
    shutil.copy(file, tmp_path)
    with pytest.raises(UserError, match="stable-diffusion-v1-5 cannot be had"):
        load_pipeline(str(tmp_path / file.name))


KINDS = ("FlowMatchEulerDiscreteScheduler", "EDMEulerScheduler", "FlowMatchHeunDiscreteScheduler")


@pytest.mark.parametrize("kind", KINDS)
def test_models_of_another_kind_are_refused(micro, tmp_path, kind):
    file = "scheduler/scheduler_config.json"
    with pytest.raises(UserError, match=f"{kind} has not Stable Diffusion 1's noise levels"):
        load_pipeline(edited_copy(micro, tmp_path / "model", file, _class_name=kind))


def test_a_distilled_model_is_refused(micro, tmp_path):
    from diffusers import UNet2DConditionModel

    folder = shutil.copytree(micro, tmp_path / "model")
    config = json.loads((folder / "unet" / "config.json").read_text())
    unet = UNet2DConditionModel.from_config(config | {"time_cond_proj_dim": 8})
    unet.save_pretrained(folder / "unet")
    with pytest.raises(UserError, match="is distilled"):
        load_pipeline(str(folder))


def test_parts_may_have_dtypes_of_their_own(micro):
    pipe = load_pipeline(micro, dtype={"default": torch.bfloat16, "unet": torch.float32})
    assert pipe.unet.conv_in.weight.dtype == torch.float32
    assert pipe.vae.dtype == pipe.text_encoder.dtype == torch.bfloat16
