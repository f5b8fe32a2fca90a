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


def test_a_folder_brings_its_flags_and_prompts(tmp_path):
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
        (dict(rescale_betas_zero_snr=True), "zero-SNR"),
    ],
)
def test_unsuitable_schedulers_are_refused(micro, tmp_path, wrong, words):
    folder = edited_copy(micro, tmp_path / "m", "scheduler/scheduler_config.json", **wrong)
    with pytest.raises(UserError, match=words):
        load_pipeline(folder)


@pytest.mark.parametrize("part", ("unet", "vae", "text_encoder"))
@pytest.mark.parametrize("fault", ("lacks", "has a surplus", "has a misshapen", "not finite"))
def test_a_part_that_is_not_whole_is_refused(micro, tmp_path, part, fault):
    """cases.md 1 and 7: the libraries make a random layer of what is missing, and NaN is loaded."""
    folder = shutil.copytree(micro, tmp_path / "model")
    (file,) = (folder / part).glob("*.safetensors")
    state = load_file(file)
    name = sorted(state)[5]
    if fault == "lacks":
        del state[name]
    elif fault == "has a surplus":
        state["extra.weight"] = torch.zeros(2)
        name = "extra.weight"
    elif fault == "has a misshapen":
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


KINDS = ("FlowMatchEulerDiscreteScheduler", "EDMEulerScheduler", "FlowMatchHeunDiscreteScheduler")


@pytest.mark.parametrize("kind", KINDS)
def test_models_of_another_kind_are_refused(micro, tmp_path, kind):
    file = "scheduler/scheduler_config.json"
    with pytest.raises(UserError, match=f"a model of {kind} is not one of"):
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
