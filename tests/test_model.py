"""The policy and its reference, saving and loading it, and what it computes.

Oracles: diffusers' and peft's own loading, a deep copy of the UNet, and the formulas written out.
"""

import copy
import gc
import math

import pytest
import torch
from conftest import PROMPTS, draw, overshoot, question, shake
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from parts import model
from parts.common import UserError
from parts.model import (
    LORA_FILE,
    Policy,
    decode,
    encode_prompts,
    in_slices,
    latent_shape,
    load_pipeline,
    load_policy,
    policy_file,
    predict_noise,
)
from parts.weights import TOY

both_kinds = pytest.mark.parametrize("full", (False, True), ids=("lora", "full"))


# --------------------------------------------------------------------------------------------------
# The policy and its reference


@both_kinds
def test_inside_reference_the_unet_is_the_untouched_one_bit_for_bit(pipe, full):
    untouched = copy.deepcopy(pipe.unet)
    where = question(pipe)
    with torch.no_grad():
        expected = predict_noise(untouched, *where, 5.0)
        policy = Policy(pipe.unet, rank=3, full=full)
        assert torch.equal(predict_noise(policy.unet, *where, 5.0), expected)  # before training
        shake(policy)
        moved = predict_noise(policy.unet, *where, 5.0)
        assert (moved - expected).abs().max() > 1e-2
        with policy.reference():
            assert torch.equal(predict_noise(policy.unet, *where, 5.0), expected)
        assert torch.equal(predict_noise(policy.unet, *where, 5.0), moved)


@both_kinds
def test_reference_records_no_gradient(pipe, full):
    policy = Policy(pipe.unet, full=full)
    with policy.reference():
        assert not predict_noise(policy.unet, *question(pipe), 5.0).requires_grad
    assert predict_noise(policy.unet, *question(pipe), 5.0).requires_grad


@both_kinds
@pytest.mark.parametrize("reference_first", (False, True))
def test_gradient_of_a_loss_of_both_is_that_with_a_separate_reference(pipe, full, reference_first):
    untouched = copy.deepcopy(pipe.unet)
    policy = Policy(pipe.unet, rank=3, full=full)
    shake(policy, scale=0.02)
    where = question(pipe)

    def reference():
        with policy.reference():
            return predict_noise(policy.unet, *where, 5.0)

    eps_ref = reference() if reference_first else None
    eps = predict_noise(policy.unet, *where, 5.0)
    eps_ref = eps_ref if reference_first else reference()
    ours = torch.autograd.grad(((eps - eps_ref) ** 3).sum(), policy.parameters)

    with torch.no_grad():
        eps_ref = predict_noise(untouched, *where, 5.0)
    eps = predict_noise(policy.unet, *where, 5.0)
    theirs = torch.autograd.grad(((eps - eps_ref) ** 3).sum(), policy.parameters)
    assert len(ours) == len(policy.parameters) > 0
    for a, b in zip(ours, theirs):
        assert torch.equal(a, b)
    assert any(gradient.abs().max() > 0 for gradient in ours)


@both_kinds
def test_an_exception_inside_reference_restores_the_policy(pipe, full):
    policy = Policy(pipe.unet, full=full)
    shake(policy)
    where = question(pipe)
    with torch.no_grad():
        before = predict_noise(policy.unet, *where, 5.0)
        with pytest.raises(KeyboardInterrupt), policy.reference():
            raise KeyboardInterrupt
        assert torch.equal(predict_noise(policy.unet, *where, 5.0), before)
    assert torch.is_grad_enabled()


@both_kinds
def test_parameters_are_a_list_of_fp32_leaves_and_all_that_trains(pipe, full):
    """A list, not an iterator that the optimiser uses up before clip_grad_norm_ sees it."""
    policy = Policy(pipe.unet, rank=3, full=full)
    assert isinstance(policy.parameters, list)
    assert all(p.dtype == torch.float32 and p.is_leaf for p in policy.parameters)
    trainable = {id(p) for p in pipe.unet.parameters() if p.requires_grad}
    assert trainable == {id(p) for p in policy.parameters}


def test_a_lora_brings_no_second_unet_into_memory(micro):
    def unets():
        return [thing for thing in gc.get_objects() if type(thing) is UNet2DConditionModel]

    def weights_in_memory():
        everything = [x for x in gc.get_objects() if type(x) is torch.nn.Parameter]
        return sum(x.numel() for x in everything)

    gc.collect()
    before = len(unets())
    pipe = load_pipeline(micro)
    with_pipe = weights_in_memory()
    policy = Policy(pipe.unet, rank=2)
    where = question(pipe)
    eps = predict_noise(policy.unet, *where, 5.0)
    with policy.reference():
        eps_ref = predict_noise(policy.unet, *where, 5.0)
    (eps - eps_ref).pow(2).sum().backward()
    assert len(unets()) == before + 1
    gc.collect()
    added = sum(p.numel() for p in policy.parameters)
    assert weights_in_memory() - with_pipe == added


def test_a_full_policy_keeps_one_frozen_copy_of_its_parameters(pipe):
    policy = Policy(pipe.unet, full=True)
    assert sum(x.numel() for x in policy.frozen) == sum(x.numel() for x in pipe.unet.parameters())


# --------------------------------------------------------------------------------------------------
# LoRA


def test_lora_sits_where_spo_puts_it_with_sd15s_count():
    """At SD1.5's real size (shapes only, no memory): 128 layers, 0.797 M parameters at rank 4."""
    with torch.device("meta"):
        unet = UNet2DConditionModel(sample_size=64, cross_attention_dim=768, attention_head_dim=8)
        policy = Policy(unet)
    assert len(policy.layers) == 128
    assert sum(p.numel() for p in policy.parameters) == 797_184
    ends = {name.split("attn")[1][2:] for name in policy.layers}
    assert ends == {"to_q", "to_k", "to_v", "to_out.0"}


@pytest.mark.parametrize("rank", (1, 4, 16))
def test_lora_starts_as_pefts_gaussian_with_std_one_over_rank(rank):
    """lora_A: standard deviation 1 / rank within 5 standard errors, as peft's; lora_B: zero."""
    from peft import LoraConfig, get_peft_model

    base = torch.nn.Sequential(torch.nn.Linear(20_000, 8))
    torch.manual_seed(0)
    ours = model.LoRALinear(base[0], rank)
    config = LoraConfig(r=rank, lora_alpha=rank, init_lora_weights="gaussian", target_modules=["0"])
    theirs = get_peft_model(base, config).base_model.model[0].lora_A["default"].weight
    for A in (ours.lora_A.detach(), theirs.detach()):
        assert A.shape == (rank, 20_000)
        n = A.numel()
        standard_error = 1 / rank / math.sqrt(2 * n)  # of a normal's sample standard deviation
        assert abs(A.std().item() - 1 / rank) < 5 * standard_error
        assert abs(A.mean().item()) < 5 / rank / math.sqrt(n)
    assert (ours.lora_B == 0).all()


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16))
def test_lora_is_fp32_over_a_half_precision_base_and_learns(micro, dtype):
    pipe = load_pipeline(micro, dtype=dtype)
    policy = Policy(pipe.unet, rank=2)
    assert pipe.unet.conv_in.weight.dtype == dtype
    _, t, text, null = question(pipe)
    eps = predict_noise(policy.unet, draw(2, 4, 12, 12), t, text, null, 5.0)
    assert eps.dtype == torch.float32 and eps.isfinite().all()
    eps.pow(2).mean().backward()
    assert all(p.dtype == p.grad.dtype == torch.float32 for p in policy.parameters)
    assert any(p.grad.abs().max() > 0 for p in policy.parameters)


def test_lora_file_opens_in_plain_diffusers(micro, pipe, tmp_path):
    """pipe.load_lora_weights(folder), by peft: the same noise, and the same images."""
    pytest.importorskip("peft")
    policy = Policy(pipe.unet, rank=3)
    shake(policy)
    policy.save(str(tmp_path))
    theirs = StableDiffusionPipeline.from_pretrained(
        micro, safety_checker=None, low_cpu_mem_usage=False
    )
    theirs.set_progress_bar_config(disable=True)
    pipe.set_progress_bar_config(disable=True)
    x_t, t, text, _ = question(pipe)
    options = dict(num_inference_steps=4, guidance_scale=5.0, output_type="pt")
    with torch.no_grad():
        plain = theirs.unet(x_t, t, text).sample
        theirs.load_lora_weights(str(tmp_path))
        ours, loaded = pipe.unet(x_t, t, text).sample, theirs.unet(x_t, t, text).sample
        image = pipe(PROMPTS[0], latents=x_t[:1], **options).images
        image_loaded = theirs(PROMPTS[0], latents=x_t[:1], **options).images
    assert (ours - plain).abs().max() > 1e-2
    torch.testing.assert_close(loaded, ours, rtol=0, atol=1e-5)
    torch.testing.assert_close(image_loaded, image, rtol=0, atol=1e-4)


# --------------------------------------------------------------------------------------------------
# Saving and loading


@both_kinds
def test_state_goes_round(micro, pipe, full):
    policy = Policy(pipe.unet, rank=3, full=full)
    shake(policy)
    state = policy.state()
    assert all(x.device.type == "cpu" and not x.requires_grad for x in state.values())
    other = Policy(load_pipeline(micro).unet, rank=3, full=full)
    other.load_state(state, "state.pt")
    for a, b in zip(policy.parameters, other.parameters):
        assert torch.equal(a, b)
    where = question(pipe)
    with torch.no_grad(), policy.reference(), other.reference():
        a, b = predict_noise(pipe.unet, *where, 5.0), predict_noise(other.unet, *where, 5.0)
    assert torch.equal(a, b)  # loading moves the policy, not the reference


@both_kinds
def test_a_state_of_another_model_is_refused_by_a_tensors_name(pipe, full):
    policy = Policy(pipe.unet, rank=3, full=full)
    state = policy.state()
    before = {name: tensor.clone() for name, tensor in state.items()}
    name = sorted(state)[0]
    lacking = {k: v for k, v in state.items() if k != name}
    surplus = state | {"zzz": torch.zeros(1)}
    misshapen = state | {name: torch.zeros(2, 1)}
    wrong = {f"lacks {name}": lacking, "has a surplus zzz": surplus}
    wrong[f"has {name} of shape \\(2, 1\\)"] = misshapen
    for words, state in wrong.items():
        with pytest.raises(UserError, match=f"my.pt {words}.*: is it for this model"):
            policy.load_state(state, "my.pt")
    for name, tensor in policy.state().items():
        assert torch.equal(tensor, before[name])  # nothing was half loaded


@both_kinds
def test_saved_metadata_stands_in_the_files_header(pipe, tmp_path, full):
    policy = Policy(pipe.unet, full=full)
    policy.save(str(tmp_path), {"divergence": "js", "beta": "10"})
    with safe_open(policy_file(str(tmp_path)), "pt") as file:
        assert file.metadata() == {"format": "pt", "divergence": "js", "beta": "10"}


def test_a_full_policy_opens_in_plain_diffusers(pipe, tmp_path):
    policy = Policy(pipe.unet, full=True)
    shake(policy)
    policy.save(str(tmp_path))
    theirs = UNet2DConditionModel.from_pretrained(tmp_path / "unet", low_cpu_mem_usage=False)
    x_t, t, text, _ = question(pipe)
    with torch.no_grad():
        assert torch.equal(theirs.eval()(x_t, t, text).sample, pipe.unet(x_t, t, text).sample)


@both_kinds
def test_load_policy_is_what_was_saved_frozen(micro, pipe, tmp_path, full):
    policy = Policy(pipe.unet, rank=3, full=full)
    shake(policy)
    policy.save(str(tmp_path))
    where = question(pipe)
    with torch.no_grad():
        moved = predict_noise(pipe.unet, *where, 5.0)
        with policy.reference():
            reference = predict_noise(pipe.unet, *where, 5.0)
        for path in (str(tmp_path), policy_file(str(tmp_path))):  # a run's folder, or the file
            unet = load_pipeline(micro).unet
            loaded = load_policy(unet, path)
            assert not any(p.requires_grad for p in unet.parameters())
            assert torch.equal(predict_noise(unet, *where, 5.0), moved)
            with loaded.reference():
                assert torch.equal(predict_noise(unet, *where, 5.0), reference)


def test_policy_file_of_a_run_a_unet_a_model_and_of_nothing(micro, pipe, tmp_path):
    lora, full = tmp_path / "lora", tmp_path / "full"
    lora.mkdir()
    Policy(load_pipeline(micro).unet).save(str(lora))
    Policy(pipe.unet, full=True).save(str(full))
    file = str(full / "unet" / "diffusion_pytorch_model.safetensors")
    assert policy_file(str(lora)) == str(lora / "pytorch_lora_weights.safetensors")
    assert policy_file(str(full)) == policy_file(str(full / "unet")) == policy_file(file) == file
    assert policy_file(micro) is None  # a whole model is no run, though it has unet/
    assert policy_file(str(tmp_path)) is None
    with pytest.raises(UserError, match="no LoRA at .*: give a folder"):
        load_policy(pipe.unet, str(tmp_path))


def test_load_policy_refuses_other_models_and_damaged_files(micro, pipe, tmp_path):
    policy = Policy(pipe.unet, rank=3)
    policy.save(str(tmp_path))
    path = str(tmp_path / LORA_FILE)
    with pytest.raises(UserError, match="is it for this model"):
        load_policy(load_pipeline(TOY).unet, path)
    state = load_file(path)
    name = sorted(state)[0]
    del state[name]
    save_file(state, path)
    with pytest.raises(UserError, match=f"lacks {name}"):
        load_policy(load_pipeline(micro).unet, path)
    save_file({"other": torch.zeros(1)}, path)
    with pytest.raises(UserError, match="holds other: only a LoRA"):
        load_policy(load_pipeline(micro).unet, path)
    with open(path, "r+b") as file:
        file.truncate(50)
    with pytest.raises(UserError, match="damaged"):
        load_policy(load_pipeline(micro).unet, path)


# --------------------------------------------------------------------------------------------------
# What the policy computes


def test_prompts_are_padded_and_cut_to_the_encoders_length(pipe):
    length = pipe.tokenizer.model_max_length
    long_prompt = " ".join(["sun"] * 2 * length)
    text = encode_prompts(pipe, ["a red sun", long_prompt])
    assert text.shape == (2, length, 16)
    words = pipe.tokenizer("a red sun").input_ids
    padded = torch.tensor([words + [pipe.tokenizer.pad_token_id] * (length - len(words))])
    sun = pipe.tokenizer("sun").input_ids
    cut = torch.tensor([sun[:1] + sun[1:2] * (length - 2) + sun[-1:]])
    for row, ids in zip(text, (padded, cut)):
        expected = pipe.text_encoder(ids).last_hidden_state[0]
        torch.testing.assert_close(row, expected)


@pytest.mark.parametrize("guidance", (5.0, 1.0, 0.0))
def test_predict_noise_is_classifier_free_guidance_in_float64(pipe, guidance):
    """Each row on its own, from plain UNet calls; <= 1 is none, as in diffusers."""
    pipe.unet.double(), pipe.text_encoder.double()
    x_t, t, text, null = question(pipe)
    assert x_t.dtype == text.dtype == torch.float64
    calls = []
    hook = pipe.unet.register_forward_pre_hook(lambda module, inputs: calls.append(inputs[0]))
    with torch.no_grad():
        eps = predict_noise(pipe.unet, x_t, t, text, null, guidance)
    hook.remove()
    assert [len(x) for x in calls] == [4 if guidance > 1 else 2]
    assert eps.dtype == torch.float64
    for i in range(2):
        with torch.no_grad():
            conditional = pipe.unet(x_t[i : i + 1], t[i], text[i : i + 1]).sample
            unconditional = pipe.unet(x_t[i : i + 1], t[i], null).sample
        weight = guidance if guidance > 1 else 1.0
        expected = (1 - weight) * unconditional + weight * conditional
        torch.testing.assert_close(eps[i : i + 1], expected, rtol=1e-10, atol=1e-10)


def test_predict_noise_of_a_lora_in_float64_is_w_x_plus_b_a_x(pipe):
    """The LoRA merged into the weights by hand gives the same noise: no fp32 on the way."""
    merged = copy.deepcopy(pipe.unet).double()
    policy = Policy(pipe.unet.double(), rank=3)
    shake(policy)
    for parameter in policy.parameters:
        parameter.data = parameter.data.double()
    pipe.text_encoder.double()
    for name, layer in policy.layers.items():
        merged.get_submodule(name).weight.data += (layer.lora_B @ layer.lora_A).detach()
    where = question(pipe)
    with torch.no_grad():
        eps = predict_noise(policy.unet, *where, 5.0)
        expected = predict_noise(merged, *where, 5.0)
    torch.testing.assert_close(eps, expected, rtol=1e-9, atol=1e-9)


def test_a_wider_unet_runs_under_autocast_and_returns_what_it_was_given(micro):
    """--full: fp32 weights, the text's bf16 for the arithmetic, x_t and eps in fp32."""
    pipe = load_pipeline(micro, dtype={"default": torch.bfloat16, "unet": torch.float32})
    policy = Policy(pipe.unet, full=True)
    _, t, text, null = question(pipe)
    x_t = draw(2, 4, 12, 12)
    with torch.no_grad():
        exact = predict_noise(pipe.unet, x_t, t, text.float(), null.float(), 5.0)
    seen = []
    hook = pipe.unet.conv_in.register_forward_hook(lambda m, i, output: seen.append(output.dtype))
    eps = predict_noise(policy.unet, x_t, t, text, null, 5.0)
    hook.remove()
    assert seen == [torch.bfloat16] and eps.dtype == torch.float32
    assert 0 < (eps - exact).abs().max() < 0.1 * exact.abs().max()
    eps.sum().backward()
    assert all(p.grad.dtype == torch.float32 for p in policy.parameters if p.grad is not None)


def test_in_slices_is_the_function_itself():
    seen = []

    def product(x, y):
        seen.append(len(x))
        return x * y

    x, y = draw(7, 3), draw(7, 3, seed=1)
    for fill, sizes in ((False, [3, 3, 1]), (True, [3, 3, 3])):
        seen.clear()
        assert torch.equal(in_slices(product, 3, x, y, fill=fill), x * y)
        assert seen == sizes


def test_latent_shape_is_what_the_vae_makes(pipe):
    image = torch.zeros(1, 3, 48, 48)
    with torch.no_grad():
        latents = pipe.vae.encode(image).latent_dist.mean
    assert latent_shape(pipe) == latents.shape[1:] == (4, 12, 12)


def test_decode_is_the_vaes_image_unclamped_a_megapixel_at_a_time(pipe, monkeypatch):
    pipe.vae.double()
    pipe.vae.register_to_config(scaling_factor=0.5)
    latents = draw(5, 4, 12, 12, dtype=torch.float64)
    with torch.no_grad():
        expected = 4 * pipe.vae.decode(latents / 0.5).sample / 2 + 0.5
    raw = overshoot(pipe, monkeypatch, factor=4)
    monkeypatch.setattr(model, "decode_batch", lambda pipe: 2)
    images = decode(pipe, latents)
    assert [len(slice_) for slice_ in raw] == [2, 2, 1]
    assert images.dtype == torch.float64 and images.shape == (5, 3, 48, 48)
    torch.testing.assert_close(images, expected, rtol=1e-12, atol=1e-12)
    assert images.min() < 0 or images.max() > 1


def test_decode_batch_is_a_megapixel_and_16_at_most(pipe):
    assert model.decode_batch(pipe) == 16  # 48 x 48
    pipe.unet.register_to_config(sample_size=128)
    assert pipe.vae_scale_factor == 4
    assert model.decode_batch(pipe) == 4  # 512 x 512
    pipe.unet.register_to_config(sample_size=512)
    assert model.decode_batch(pipe) == 1  # 2048 x 2048
