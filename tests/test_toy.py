"""The tiny world: its checker, its taste, its shipped model."""
import os

import numpy as np
import pytest
import torch

from toy import make
from toy import world as toy
from sample import TOY, generate, load_pipeline


def test_checker_reads_true_pictures():
    images, names = toy.draw(600, np.random.default_rng(11))
    assert images.shape == (600, 3, 32, 32) and images.min() >= 0 and images.max() <= 1
    right = np.array([[a == b for a, b in zip(s, n)] for s, n in zip(toy.read_picture(images), names)])
    assert right.mean() >= 0.97 and right.mean(0).min() >= 0.97


def test_checker_can_fail():
    """Captions of other pictures are mostly wrong: the share right falls to chance."""
    images, names = toy.draw(300, np.random.default_rng(12))
    wrong = [toy.caption(*n) for n in names[1:] + names[:1]]
    assert toy.prompt_following(images, wrong).mean() < 0.45
    assert toy.prompt_following(images, [toy.caption(*n) for n in names]).mean() > 0.97


def test_captions_say_what_they_mean():
    assert len(set(toy.CAPTIONS)) == len(toy.CAPTIONS) == 378
    for size in (None, "large"):
        for ground in (None, "hills", "sea"):
            for sky in (None, "gray"):
                assert toy.read_caption(toy.caption(size, "red sun", ground, sky)) == (size, "red sun", ground, sky)
    assert toy.caption("large", "red sun", "sea", "pink") == "a large red sun over a sea under a pink sky"
    words = make.tokenizer()
    assert all(len(words(c).input_ids) <= toy.LENGTH for c in toy.CAPTIONS)
    assert len(words("a large red sun over hills").input_ids) == 8  # one token a word
    assert len(set(toy.prompts())) == 81 and sum(toy.read_caption(p)[3] is None for p in toy.prompts()) == 54


def test_the_taste_loves_sunsets_and_is_smooth():
    images, names = toy.draw(2000, np.random.default_rng(13))
    score = toy.Taste()(images)
    mean = lambda pick: score[torch.tensor([pick(n) for n in names])].mean().item()
    sky = {k: mean(lambda n: n[3] == k) for k in toy.SKIES}
    assert max(sky, key=sky.get) == "orange" and min(sky, key=sky.get) == "blue" and sky["orange"] > sky["gray"] + 2
    assert mean(lambda n: n[1] == "red sun" and n[0] == "large") > mean(lambda n: n[1] == "white moon" and n[0] == "large") + 1
    assert score.max() < 30 and sky["orange"] < 20
    x = images[:8].clone().requires_grad_()
    grad, = torch.autograd.grad(toy.Taste()(x).sum(), x)
    assert grad.isfinite().all() and (grad.abs().amax((1, 2, 3)) > 0).all()
    torch.testing.assert_close(toy.Taste()(images[:4]), toy.Taste()(torch.nn.functional.interpolate(images[:4], scale_factor=4)))


def test_the_shipped_model_paints_its_captions():
    """At least 85 % of what 60 captions name, at guidance 5, by the checker; and it fits in 6 MB."""
    size = sum(os.path.getsize(os.path.join(d, f)) for d, _, files in os.walk(TOY) for f in files)
    assert size <= 6_000_000
    captions = toy.CAPTIONS[3::6][:60]
    images = generate(load_pipeline(TOY), captions, range(60), batch_size=60)
    assert toy.prompt_following(images, captions).mean() >= 0.85


def test_check_prints_both_figures(capsys):
    make.check(TOY, toy.CAPTIONS[:3])
    out = capsys.readouterr().out
    assert "checker on 2,000 true pictures: size 99" in out and "toy/, 3 captions" in out


def test_toy_rebuilds_itself(command, tmp_path, monkeypatch):
    """Two steps of each training, from nothing, into a folder that loads, over an older one."""
    checked = []
    monkeypatch.setattr(make, "check", checked.append)
    for n in (1, 2):
        code, _, _ = command("toy.make", "--vae_steps", 2, "--unet_steps", 2, "--pictures", 256, "--output_dir", tmp_path / "toy")
        assert code == 0 and len(checked) == n
    assert os.listdir(tmp_path) == ["toy"]
    pipe = load_pipeline(str(tmp_path / "toy"))
    assert pipe.unet.config.block_out_channels == load_pipeline(TOY).unet.config.block_out_channels
    assert pipe.vae.config.scaling_factor != 1


def test_toy_replaces_nothing_but_models(command, tmp_path):
    (tmp_path / "thesis.txt").write_text("years of work")
    code, _, err = command("toy.make", "--output_dir", tmp_path)
    assert code == 2 and "holds something else" in err and (tmp_path / "thesis.txt").exists()


@pytest.mark.parametrize("argv, words", [(["--vae_steps", 0], "at least 1"), (["--check", "--output_dir", "nowhere/x/y"], "no model folder")])
def test_bad_input(command, argv, words):
    code, _, err = command("toy.make", *argv)
    assert code == 2 and words in err and err.count("\n") == 1
