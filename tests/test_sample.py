"""Loading, LoRA, sampling and the pool of pairs: against diffusers, peft and a rollout written out naively."""
import json
import os
import shutil

import pytest
import torch
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from safetensors.torch import load_file, save_file

import sample
from toy import world as toy
from sample import (TOY, UserError, add_lora, collect_pairs, ddim_mean_std, decode, encode_prompts, generate, load_lora,
                    load_pipeline, lora_layers, lora_off, predict_noise, save_lora)

cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")


@pytest.fixture
def pipe(micro):
    return load_pipeline(micro)


def shake(unet, seed=0, scale=0.1):
    """A LoRA that has been trained, as far as its numbers go."""
    g = torch.Generator().manual_seed(seed)
    for _, m in lora_layers(unet):
        m.lora_B.data = torch.randn(m.lora_B.shape, generator=g) * scale


def edited(folder, tmp_path, part, change):
    """A copy of a model folder with one JSON changed."""
    new = str(tmp_path / "edited")
    shutil.copytree(folder, new)
    path = os.path.join(new, part)
    with open(path) as f:
        config = json.load(f)
    change(config)
    with open(path, "w") as f:
        json.dump(config, f)
    return new


# ---- loading

def test_schedulers_whose_last_step_is_silent_are_corrected_aloud(micro, tmp_path, capsys):
    """SD1.5's own PNDM config passes in silence; set_alpha_to_one, clip_sample and steps_offset 0 are corrected."""
    quiet = edited(micro, tmp_path / "a", "scheduler/scheduler_config.json", lambda c: c.update(
        {"_class_name": "PNDMScheduler", "skip_prk_steps": True, "trained_betas": None}))
    model_index = os.path.join(quiet, "model_index.json")
    text = open(model_index).read().replace("DDIMScheduler", "PNDMScheduler")
    open(model_index, "w").write(text)
    pipe = load_pipeline(quiet)
    assert capsys.readouterr().err == ""
    assert type(pipe.scheduler).__name__ == "DDIMScheduler" and not pipe.scheduler.config.clip_sample
    loud = edited(micro, tmp_path / "b", "scheduler/scheduler_config.json",
                  lambda c: c.update(set_alpha_to_one=True, clip_sample=True, steps_offset=0))
    pipe = load_pipeline(loud)
    err = capsys.readouterr().err
    assert all(k in err for k in ("set_alpha_to_one", "clip_sample", "steps_offset")) and err.count("\n") == 1
    pipe.scheduler.set_timesteps(20)
    t = pipe.scheduler.timesteps
    assert t[0] == 951 and t[-1] == 1
    _, std, _ = ddim_mean_std(torch.zeros(20, 4, 1, 1), torch.zeros(20, 4, 1, 1), t, pipe.scheduler.alphas_cumprod, 20)
    assert (std > 0).all()


@pytest.mark.parametrize("part, change, words", [
    ("scheduler/scheduler_config.json", dict(prediction_type="v_prediction"), "prediction_type epsilon"),
    ("scheduler/scheduler_config.json", dict(rescale_betas_zero_snr=True), "zero-SNR")])
def test_unsuitable_schedulers_are_refused(micro, tmp_path, part, change, words):
    with pytest.raises(UserError, match=words):
        load_pipeline(edited(micro, tmp_path, part, lambda c: c.update(change)))


def test_nothing_is_trainable_and_no_safety_checker(pipe):
    assert pipe.safety_checker is None
    assert not any(p.requires_grad for m in (pipe.unet, pipe.vae, pipe.text_encoder) for p in m.parameters())


# ---- LoRA

def test_lora_starts_as_the_reference_and_turns_off(pipe):
    x, t, text = torch.randn(2, 4, 12, 12), torch.tensor([801, 51]), encode_prompts(pipe, ["a red sun", "a white moon"])
    null = encode_prompts(pipe, [""])
    with torch.no_grad():
        before = predict_noise(pipe.unet, x, t, text, null, 5.0)
        params = add_lora(pipe.unet, 3)
        assert isinstance(params, list) and len(params) == 2 * len(lora_layers(pipe.unet)) > 0
        assert torch.equal(predict_noise(pipe.unet, x, t, text, null, 5.0), before)
        shake(pipe.unet)
        assert not torch.allclose(predict_noise(pipe.unet, x, t, text, null, 5.0), before)
        with lora_off(pipe.unet):
            assert torch.equal(predict_noise(pipe.unet, x, t, text, null, 5.0), before)
        assert not torch.allclose(predict_noise(pipe.unet, x, t, text, null, 5.0), before)
    assert all(p.dtype == torch.float32 and p.requires_grad for p in params)
    with pytest.raises(ValueError, match="already"):
        add_lora(pipe.unet, 3)


def test_lora_sits_where_spo_puts_it_with_sd15s_count():
    """At SD1.5's real size (shapes only, no memory): 128 layers, 0.797 M parameters at rank 4."""
    with torch.device("meta"):
        unet = UNet2DConditionModel(sample_size=64, cross_attention_dim=768, attention_head_dim=8)
        params = add_lora(unet, 4)
    assert len(lora_layers(unet)) == 128
    assert sum(p.numel() for p in params) == 797_184
    assert {n.split("attn")[1][2:] for n, _ in lora_layers(unet)} == {"to_q", "to_k", "to_v", "to_out.0"}


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16))
def test_lora_is_fp32_over_a_half_precision_base_and_learns(micro, dtype):
    pipe = load_pipeline(micro, dtype=dtype)
    params = add_lora(pipe.unet, 2)
    assert {p.dtype for p in params} == {torch.float32} and pipe.unet.conv_in.weight.dtype == dtype
    eps = predict_noise(pipe.unet, torch.randn(1, 4, 12, 12), torch.tensor([500]), encode_prompts(pipe, ["a sun"]),
                        encode_prompts(pipe, [""]), 5.0)
    assert eps.dtype == torch.float32 and eps.isfinite().all()
    eps.pow(2).mean().backward()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in params)


def test_lora_file_opens_in_plain_diffusers(micro, tmp_path):
    """pipe.load_lora_weights(folder), with peft: the same UNet output to 1e-5."""
    pytest.importorskip("peft")
    ours = load_pipeline(micro)
    add_lora(ours.unet, 3)
    shake(ours.unet)
    save_lora(ours.unet, str(tmp_path))
    theirs = StableDiffusionPipeline.from_pretrained(micro, safety_checker=None, low_cpu_mem_usage=False)
    x, t, text = torch.randn(2, 4, 12, 12), torch.tensor([801, 51]), encode_prompts(ours, ["a red sun", "a white moon"])
    with torch.no_grad():
        plain = theirs.unet(x, t, text).sample
        theirs.load_lora_weights(str(tmp_path))
        a, b = ours.unet(x, t, text).sample, theirs.unet(x, t, text).sample
    assert (a - plain).abs().max() > 1e-2
    torch.testing.assert_close(a, b, rtol=0, atol=1e-5)


def test_lora_round_trip_and_refusals(micro, tmp_path, pipe):
    add_lora(pipe.unet, 3)
    shake(pipe.unet)
    save_lora(pipe.unet, str(tmp_path))
    other = load_pipeline(micro)
    load_lora(other.unet, str(tmp_path))
    for (_, a), (_, b) in zip(lora_layers(pipe.unet), lora_layers(other.unet)):
        assert torch.equal(a.lora_A, b.lora_A) and torch.equal(a.lora_B, b.lora_B)
    two = load_pipeline(micro)
    add_lora(two.unet, 2)
    with pytest.raises(UserError, match="another rank"):
        load_lora(two.unet, str(tmp_path))
    with pytest.raises(UserError, match="another rank or size"):
        load_lora(load_pipeline(TOY).unet, str(tmp_path))
    path = str(tmp_path / sample.LORA_FILE)
    state = load_file(path)
    state.pop(sorted(state)[0])
    save_file(state, path)
    with pytest.raises(UserError, match="another model: 1 layers differ"):
        load_lora(load_pipeline(micro).unet, str(tmp_path))
    with open(path, "r+b") as f:
        f.truncate(500)
    with pytest.raises(UserError, match="damaged"):
        load_lora(load_pipeline(micro).unet, str(tmp_path))
    with pytest.raises(UserError, match="no LoRA at"):
        load_lora(load_pipeline(micro).unet, str(tmp_path / "nowhere"))


# ---- sampling

def test_generate_is_diffusers_own_pipeline(pipe):
    """The same picture as StableDiffusionPipeline.__call__ from the same latents, with and without noise and guidance."""
    prompt, seed = "a red sun over a sea", 3
    for guidance, eta in ((5.0, 0.0), (1.0, 0.0), (3.0, 1.0)):
        ours = generate(pipe, [prompt], [seed], num_steps=6, guidance=guidance, eta=eta)
        g = torch.Generator().manual_seed(seed)
        first = torch.randn(1, 4, 12, 12, generator=g)
        theirs = pipe(prompt, latents=first, generator=g, num_inference_steps=6, guidance_scale=guidance, eta=eta,
                      output_type="pt").images
        torch.testing.assert_close(ours, theirs, rtol=0, atol=2e-5)


@pytest.mark.parametrize("eta", (0.0, 1.0))
def test_a_seed_is_a_picture_at_any_batch_size(pipe, eta):
    prompts = ["a red sun", "a white moon over snow", "a yellow sun"]
    one = generate(pipe, prompts, [7, 8, 9], num_steps=4, eta=eta, batch_size=1)
    all_ = generate(pipe, prompts, [7, 8, 9], num_steps=4, eta=eta, batch_size=3)
    torch.testing.assert_close(one, all_, rtol=0, atol=1e-5)
    alone = generate(pipe, prompts[2:], [9], num_steps=4, eta=eta)
    torch.testing.assert_close(one[2:], alone, rtol=0, atol=1e-5)


@cuda
def test_a_seed_is_a_picture_on_the_gpu_too(micro):
    a = generate(load_pipeline(micro), ["a red sun"], [7], num_steps=4)
    b = generate(load_pipeline(micro, "cuda"), ["a red sun"], [7], num_steps=4)
    torch.testing.assert_close(a, b, rtol=0, atol=2e-2)


class Judge:
    """Writes down what it is asked; the score is the mean brightness, scaled."""
    name = "brightness"

    def __init__(self, scale=1000.0):
        self.scale, self.asked, self.encoded = scale, [], 0

    def encode(self, prompts):
        self.encoded += 1
        return torch.arange(len(prompts)).float()[:, None]

    def __call__(self, images, text, t=None):
        self.asked.append((images, text.flatten().tolist(), t.tolist()))
        return images.mean((1, 2, 3)) * self.scale


def naive_pairs(pipe, prompt, seed, K, first, threshold, steps, guidance):
    """SPO's pool for ONE prompt, with two predictions wherever the fused version reuses one."""
    g = torch.Generator().manual_seed(seed)
    text, null = encode_prompts(pipe, [prompt]), encode_prompts(pipe, [""])
    pipe.scheduler.set_timesteps(steps)
    ts, table = pipe.scheduler.timesteps.tolist(), pipe.scheduler.alphas_cumprod
    with torch.no_grad():
        step = lambda x, t: ddim_mean_std(predict_noise(pipe.unet, x, torch.tensor([t]), text, null, guidance), x,
                                          torch.tensor([t]), table, steps)
        x = torch.randn(1, 4, 12, 12, generator=g)
        pairs = []
        for i, t in enumerate(ts):
            mean, std, _ = step(x, t)
            if i < first:
                x = mean + std * torch.randn(1, 4, 12, 12, generator=g)
                continue
            kids = [mean + std * z for z in torch.randn(1, K, 4, 12, 12, generator=g)[0][:, None]]
            x0 = [step(k, ts[i + 1])[2] if i + 1 < steps else k for k in kids]
            s = torch.stack([decode(pipe, z).mean() * 3e4 for z in x0])
            w, l = int(s.argmax()), int(s.argmin())
            p = torch.softmax(torch.stack([s[w], s[l]]), 0)
            if p[0] - p[1] > threshold:
                pairs.append((t, x, kids[w], kids[l]))
            if i + 1 < steps:
                x = kids[int(torch.randint(K, (1,), generator=g))]
    return pairs


@pytest.mark.parametrize("K, first, guidance", [(3, 1, 5.0), (2, 0, 1.0), (4, 3, 0.0)])
def test_collect_pairs_is_spos_pool(pipe, K, first, guidance):
    judge, steps = Judge(3e4), 5
    got = collect_pairs(pipe, judge, ["a red sun"], torch.Generator().manual_seed(4), K, first, 0.3, steps, guidance=guidance)
    want = naive_pairs(pipe, "a red sun", 4, K, first, 0.3, steps, guidance)
    assert 0 < len(got) == len(want) <= got.candidates == steps - first
    for i, (t, x, w, l) in enumerate(want):
        assert got.t[i] == t
        for a, b in ((got.x_t[i], x[0]), (got.x_w[i], w[0]), (got.x_l[i], l[0])):
            torch.testing.assert_close(a, b, rtol=0, atol=1e-4)
    timesteps = [a[2][0] for a in judge.asked]  # a child is judged at its own time, the last ones at 0
    assert timesteps == pipe.scheduler.timesteps.tolist()[first + 1:] + [0]


def test_rows_of_many_prompts_do_not_mix(pipe):
    prompts = ["a red sun", "a white moon over snow", "a yellow sun under a blue sky"]
    judge = Judge()
    pairs = collect_pairs(pipe, judge, prompts, torch.Generator().manual_seed(0), 2, 1, 0.0, 4)
    assert judge.encoded == 1
    assert all(text == [0, 0, 1, 1, 2, 2] for _, text, _ in judge.asked)
    null, table = encode_prompts(pipe, [""]), pipe.scheduler.alphas_cumprod
    assert len(pairs) == pairs.candidates == 9 and sorted(set(pairs.prompt.tolist())) == [0, 1, 2]
    with torch.no_grad():  # both children are plausible draws of their own parent, prompt and step: |z| is about 1
        eps = predict_noise(pipe.unet, pairs.x_t, pairs.t, pairs.text[pairs.prompt], null, 5.0)
        mean, std, _ = ddim_mean_std(eps, pairs.x_t, pairs.t, table, 4)
    for child in (pairs.x_w, pairs.x_l):
        z = ((child - mean) / std).flatten(1)
        assert (z.std(1) - 1).abs().max() < 0.12 and z.mean(1).abs().max() < 0.12


def test_a_judge_of_nan_makes_no_pair_and_ties_make_none(pipe):
    for judge in (Judge(float("nan")), Judge(0.0)):
        pairs = collect_pairs(pipe, judge, ["a red sun"], torch.Generator().manual_seed(0), 2, 1, 0.0, 3)
        assert len(pairs) == 0 and pairs.candidates == 2 and pairs.x_w.shape == (0, 4, 12, 12)


@pytest.mark.parametrize("kw, words", [(dict(num_children=1), "at least 2"), (dict(first_step=3), "0..2"), (dict(eta=0.0), "positive")])
def test_impossible_rollouts(pipe, kw, words):
    with pytest.raises(ValueError, match=words):
        collect_pairs(pipe, Judge(), ["a"], torch.Generator(), **{"num_steps": 3, "first_step": 1} | kw)


def test_rollout_costs_what_the_docstring_says(pipe):
    rows = []
    pipe.unet.register_forward_pre_hook(lambda m, a: rows.append(len(a[0])))
    collect_pairs(pipe, Judge(), ["a red sun", "a moon"], torch.Generator().manual_seed(0))
    assert sum(rows) == 2 * 130


# ---- the command

def test_command_writes_images_and_a_grid(command, micro, tmp_path):
    from PIL import Image
    pipe = load_pipeline(micro)
    add_lora(pipe.unet, 2)
    shake(pipe.unet)
    os.makedirs(tmp_path / "run")
    save_lora(pipe.unet, str(tmp_path / "run"))
    code, out, _ = command("sample.py", "a red sun", "a moon", "--model", micro, "--lora", tmp_path / "run", "--seeds", 0, 5,
                           "--num_inference_steps", 3, "--output_dir", tmp_path / "o", "--device", "cpu")
    assert code == 0
    assert sorted(os.listdir(tmp_path / "o")) == ["000_seed0.png", "000_seed5.png", "001_seed0.png", "001_seed5.png", "grid.png"]
    assert Image.open(tmp_path / "o/000_seed0.png").size == (48, 48)
    assert Image.open(tmp_path / "o/grid.png").size[1] > 4 * 128  # two prompts, reference above aligned


@pytest.mark.parametrize("argv, words", [
    ([], "nothing to paint"), (["a sun", "--lora", "nowhere"], "no LoRA"), (["a sun", "--num_inference_steps", 0], "at least 1"),
    (["a sun", "--seeds", "x"], "invalid int"), (["a sun", "--prompts", "nowhere.txt"], "cannot read prompts")])
def test_bad_input(command, micro, tmp_path, argv, words):
    code, _, err = command("sample.py", *argv, "--model", micro, "--output_dir", tmp_path / "o")
    assert code == 2 and words in err and err.count("\n") == 1


def tiny_decoder(folder, blocks=3):
    from diffusers import AutoencoderTiny
    torch.manual_seed(0)
    vae = AutoencoderTiny(encoder_block_out_channels=(8,) * blocks, decoder_block_out_channels=(8,) * blocks, num_encoder_blocks=(1,) * blocks,
                          num_decoder_blocks=(1,) * blocks, latent_channels=4, scaling_factor=1.0)
    vae.save_pretrained(folder, safe_serialization=True)
    return str(folder)


class Contrast:
    def encode(self, prompts):
        return torch.zeros(len(prompts), 0)

    def __call__(self, images, text, t=None):
        return 1000 * images.flatten(1).std(1)


def test_preview_decoder(micro, tmp_path):
    """With the VAE itself as preview nothing changes and they agree; a tiny one is measured against it."""
    pipe = sample.load_pipeline(micro)
    def collect(preview):
        return sample.collect_pairs(pipe, Contrast(), ["a sun", "a moon"], torch.Generator().manual_seed(0), 3, 1, 0.0, 6, preview=preview)
    plain, same = collect(None), collect(pipe.vae)
    assert same.scores.pop("preview_agreement") == 1 and "preview_agreement" not in plain.scores
    assert plain.scores == same.scores and torch.equal(plain.x_w, same.x_w)
    other = sample.load_preview(tiny_decoder(tmp_path / "tiny"), pipe)
    z = torch.randn(3, 4, 12, 12)
    with torch.no_grad():
        torch.testing.assert_close(sample.decode(pipe, z, other), (other.decode(z).sample / 2 + .5).clamp(0, 1))
    seen = []
    real = sample.decode
    try:
        sample.decode = lambda p, x, vae=None: seen.append((vae, real(p, x, vae))) or seen[-1][1]
        got = collect(other).scores["preview_agreement"]
    finally:
        sample.decode = real
    shares = []  # steps where the VAE looked as well: its images stand right after the preview's
    for (a, x), (b, y) in zip(seen, seen[1:]):
        if a is other and b is None:
            s, f = (Contrast()(v, None).view(2, 3) for v in (x, y))
            shares += [float((s[p, i] > s[p, j]) == (f[p, i] > f[p, j])) for p in range(2) for i in range(3) for j in range(i + 1, 3)]
    assert len(shares) == 2 * 2 * 3 and got == pytest.approx(sum(shares) / len(shares))
    with pytest.raises(sample.UserError, match="enlarges 8 times, the model's VAE 4 and 4"):
        sample.load_preview(tiny_decoder(tmp_path / "large", 4), pipe)
    with pytest.raises(sample.UserError, match="such as madebyollin/taesd"):
        sample.load_preview(str(tmp_path / "nowhere"), pipe)


def test_compiled_functions_meet_their_sizes_alone(monkeypatch):
    met = []
    monkeypatch.setattr(torch, "compile", lambda f, **kw: lambda x, y: (met.append(len(x)), f(x, y))[1])
    f = sample.compile_at(lambda x, y: x * y, 2, 5)
    for n, sizes in ((1, [2]), (2, [2]), (3, [2, 2]), (5, [5]), (6, [2, 2, 2]), (9, [5, 5]), (10, [5, 5])):
        met.clear()
        x = torch.rand(n, 3, requires_grad=True)
        y = f(x, x)
        assert met == sizes and torch.equal(y, x * x)
        torch.testing.assert_close(torch.autograd.grad(y.sum(), x)[0], 2 * x)  # the copies that fill up weigh nothing


def test_decoding_a_megapixel_at_a_time_is_decoding(pipe):
    seen, z = [], torch.randn(5, 4, 12, 12, generator=torch.Generator().manual_seed(0))
    want = (pipe.vae.decode(z / pipe.vae.config.scaling_factor).sample / 2 + .5).clamp(0, 1)
    hook = pipe.vae.decoder.register_forward_pre_hook(lambda m, a: seen.append(len(a[0])))
    with pytest.MonkeyPatch.context() as m:
        m.setattr(sample, "decode_size", lambda pipe: 2)
        torch.testing.assert_close(sample.decode(pipe, z), want)
    hook.remove()
    assert seen == [2, 2, 1] and sample.decode_size(pipe) == 16
