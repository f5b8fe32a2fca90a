"""Images from seeds, against diffusers' own pipeline, and the command that paints them."""

import os

import pytest
import torch
from conftest import overshoot, shake
from PIL import Image

from parts.common import UserError
from parts.model import Policy, load_pipeline
from sample import generate, paint, seed_of

cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
PROMPTS = ["a red sun", "a white moon over snow", "a yellow sun under a blue sky"]


# --------------------------------------------------------------------------------------------------
# Images from seeds


@pytest.mark.parametrize("guidance, eta", [(5.0, 0.0), (1.0, 0.0), (3.0, 1.0)])
def test_generate_is_diffusers_own_pipeline(pipe, guidance, eta):
    """From the same first latents and noise, with and without guidance."""
    prompt, seed = PROMPTS[0], 3
    ours = generate(pipe, [prompt], [seed], num_steps=6, guidance=guidance, eta=eta)
    generator = torch.Generator().manual_seed(seed)
    first = torch.randn(1, 4, 12, 12, generator=generator)
    pipe.set_progress_bar_config(disable=True)
    theirs = pipe(
        prompt,
        latents=first,
        generator=generator,
        num_inference_steps=6,
        guidance_scale=guidance,
        eta=eta,
        output_type="pt",
    )
    torch.testing.assert_close(ours, theirs.images, rtol=0, atol=2e-5)


@pytest.mark.parametrize("eta", (0.0, 1.0))
def test_a_seed_is_a_picture_at_any_batch_size(pipe, eta):
    seeds = [7, 8, 9]
    one_by_one = generate(pipe, PROMPTS, seeds, num_steps=4, eta=eta, batch_size=1)
    together = generate(pipe, PROMPTS, seeds, num_steps=4, eta=eta, batch_size=3)
    alone = generate(pipe, PROMPTS[2:], seeds[2:], num_steps=4, eta=eta)
    torch.testing.assert_close(one_by_one, together, rtol=0, atol=1e-5)
    torch.testing.assert_close(one_by_one[2:], alone, rtol=0, atol=1e-5)
    assert (together[0] - together[1]).abs().max() > 0.01


@cuda
def test_a_seed_is_a_picture_on_the_gpu_too(micro):
    on_cpu = generate(load_pipeline(micro), PROMPTS[:1], [7], num_steps=4)
    on_gpu = generate(load_pipeline(micro, "cuda"), PROMPTS[:1], [7], num_steps=4)
    torch.testing.assert_close(on_cpu, on_gpu, rtol=0, atol=2e-2)


def test_generate_clamps_what_the_vae_overshoots(pipe, monkeypatch):
    raw = overshoot(pipe, monkeypatch)
    images = generate(pipe, PROMPTS, [0, 1, 2], num_steps=3)
    expected = (raw[0] / 2 + 0.5).clamp(0, 1)
    assert not torch.equal(expected, raw[0] / 2 + 0.5)
    torch.testing.assert_close(images, expected)


def test_no_black_picture(pipe):
    """A weight with a flipped exponent is finite, its picture is not (tests/fuzz.py)."""
    pipe.vae.decoder.conv_in.weight.data[0, 0, 0, 0] = 1e38
    with pytest.raises(UserError, match="a picture is not finite"):
        generate(pipe, ["a sun"], [0], num_steps=2)


def test_progress_comes_after_every_step_and_adds_up_to_the_images(pipe):
    shares = []
    generate(pipe, PROMPTS, [0, 1, 2], num_steps=4, batch_size=2, progress=shares.append)
    assert shares == [2 / 4] * 4 + [1 / 4] * 4


def test_prompts_without_their_seeds_are_refused(pipe):
    with pytest.raises(ValueError, match="3 prompts but 2 seeds"):
        generate(pipe, PROMPTS, [0, 1])


def test_no_two_of_400_prompts_x_100_images_share_a_seed():
    """HPDv2's 400 prompts; up to 100 images of each."""
    seeds = {seed_of(p, k) for p in range(400) for k in range(100)}
    assert len(seeds) == 400 * 100


def test_paint_gives_image_k_of_prompt_p_the_seed_of_both(pipe):
    images = paint(pipe, PROMPTS, 2, num_steps=3, guidance=2.0)
    assert images.shape == (3, 2, 3, 48, 48)
    for p, prompt in enumerate(PROMPTS):
        for k in range(2):
            (expected,) = generate(pipe, [prompt], [seed_of(p, k)], num_steps=3, guidance=2.0)
            torch.testing.assert_close(images[p, k], expected, rtol=0, atol=1e-5)


def test_paint_gives_two_equal_prompts_different_noise(pipe):
    images = paint(pipe, ["a red sun", "a red sun"], 2, num_steps=3).flatten(0, 1)
    for i in range(4):
        for j in range(i):
            assert (images[i] - images[j]).abs().max() > 0.01


# --------------------------------------------------------------------------------------------------
# The command


def test_the_command_paints_the_aligned_model_below_the_reference(command, micro, pipe, tmp_path):
    policy = Policy(pipe.unet, rank=2)
    shake(policy)
    os.makedirs(tmp_path / "run")
    policy.save(str(tmp_path / "run"))
    argv = ["a red sun", "a moon", "--model", micro, "--lora", tmp_path / "run", "--seeds", 0, 5]
    argv += ["--num_inference_steps", 3, "--output_dir", tmp_path / "out", "--device", "cpu"]
    code, _, err = command("sample.py", *argv)
    assert code == 0, err
    names = [f"{p:03d}_seed{seed}.png" for p in range(2) for seed in (0, 5)]
    assert sorted(os.listdir(tmp_path / "out")) == [*names, "grid.png"]
    (expected,) = generate(pipe, ["a moon"], [5], num_steps=3)  # with the LoRA
    saved = torch.tensor(list(Image.open(tmp_path / "out/001_seed5.png").tobytes()))
    difference = saved.view(48, 48, 3).permute(2, 0, 1) - expected * 255
    assert difference.abs().max() <= 1
    assert Image.open(tmp_path / "out/grid.png").size[1] > 4 * 128  # two rows of each prompt


def test_a_gallery_has_a_row_a_model_and_a_column_a_prompt(command, micro, tmp_path):
    for seed, name in enumerate(("one", "two")):
        pipe = load_pipeline(micro)
        policy = Policy(pipe.unet, rank=2)
        shake(policy, seed)
        os.makedirs(tmp_path / name)
        policy.save(str(tmp_path / name))
    argv = ["a red sun", "a moon", "snow", "--model", micro, "--lora", tmp_path / "one"]
    argv += [tmp_path / "two", "--num_inference_steps", 3, "--device", "cpu"]
    code, _, err = command("sample.py", *argv, "--output_dir", tmp_path / "out")
    assert code == 0, err
    assert sorted(os.listdir(tmp_path / "out")) == ["grid.png", "one", "two"]
    files = [f"{p:03d}_seed0.png" for p in range(3)]
    assert sorted(os.listdir(tmp_path / "out/two")) == files
    grid = Image.open(tmp_path / "out/grid.png")
    assert 3 * 128 < grid.size[0] < 4 * 128 and 3 * 150 < grid.size[1] < 4 * 150
    # the last picture of the last row is the second model's third
    (expected,) = generate(pipe, ["snow"], [0], num_steps=3)
    cell = grid.crop((grid.size[0] - 132, grid.size[1] - 132, grid.size[0] - 4, grid.size[1] - 4))
    shown = cell.resize((48, 48), Image.Resampling.NEAREST)
    saved = torch.tensor(list(shown.tobytes())).view(48, 48, 3).permute(2, 0, 1)
    assert (saved - expected * 255).abs().max() <= 1
    code, _, err = command("sample.py", *argv, "--lora", tmp_path / "one", tmp_path / "one")
    assert code == 2 and "two of --lora have one name" in err


def test_prompts_that_are_cut_are_counted(command, micro, tmp_path):
    flags = ["--model", micro, "--num_inference_steps", 2, "--seeds", 0, "--device", "cpu"]
    long = "a red sun over a sea " * 9
    code, out, err = command("sample.py", long, "a sun", *flags, "--output_dir", tmp_path)
    assert code == 0, err
    assert "1 of 2 prompts have over 16 tokens, and are cut there" in out
    code, out, _ = command("sample.py", "a sun", *flags, "--output_dir", tmp_path)
    assert code == 0 and "are cut" not in out


def test_the_command_reads_prompts_from_a_file_too(command, micro, tmp_path):
    (tmp_path / "p.txt").write_text("a moon\n")
    argv = ["a red sun", "--prompts", tmp_path / "p.txt", "--seeds", 1, "--device", "cpu"]
    argv += ["--num_inference_steps", 2, "--model", micro, "--output_dir", tmp_path / "out"]
    code, out, err = command("sample.py", *argv)
    assert code == 0, err
    assert "2 images and grid.png" in out
    assert (tmp_path / "out/001_seed1.png").exists()


@pytest.mark.parametrize(
    "argv, words",
    [
        ([], "nothing to paint"),
        (["a sun", "--lora", "nowhere"], "no LoRA"),
        (["a sun", "--num_inference_steps", 0], "must lie in [1, 500]"),
        (["a sun", "--batch_size", 0], "--batch_size must lie in"),
        (["a sun", "--eta", "nan"], "--eta must lie in"),
        (["a sun", "--guidance_scale", "nan"], "--guidance_scale must lie in"),
        (["a sun", "--seeds", "x"], "invalid int"),
        (["a sun", "--seeds", 2**64], "--seeds must lie in"),
        (["a sun", "--prompts", "nowhere.txt"], "cannot read prompts"),
    ],
)
def test_bad_input_is_one_line(command, micro, tmp_path, argv, words):
    out = tmp_path / "out"
    code, _, err = command("sample.py", *argv, "--model", micro, "--output_dir", out)
    assert code == 2 and words in err and err.count("\n") == 1
    assert not out.exists()
