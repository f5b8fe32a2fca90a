"""The tiny world: its checker, its taste, its shipped model and its making."""

import csv
import json
import os

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from parts.model import load_pipeline
from parts.weights import TOY
from sample import generate
from toy import make, world


def taste_by_hand(image):
    """The taste of one image (3, 32, 32), a numpy array, from its docstring."""
    red, _, blue = image
    warmth = 0.0
    for row in range(16):
        weight = 0.5 + row / 15
        warmth += weight * (red[row] - blue[row]).mean() / 16
    return 20 * warmth + 10 * image.mean(axis=0).std(ddof=1)


def read_png(path):
    return np.array(Image.open(path)).transpose(2, 0, 1) / 255


# --------------------------------------------------------------------------------------------------
# Captions and pictures


def test_captions_say_what_they_mean():
    assert len(set(make.CAPTIONS)) == len(make.CAPTIONS) == 378
    caption = "a large red sun over a sea under a pink sky"
    assert make.write_caption("large", "red sun", "sea", "pink") == caption
    assert make.write_caption(None, "white moon", "hills", None) == "a white moon over hills"
    for size in (None, "large"):
        for ground in (None, "hills", "sea"):
            for sky in (None, "gray"):
                words = (size, "red sun", ground, sky)
                assert world.read_caption(make.write_caption(*words)) == words


def test_captions_in_other_words_are_read():
    read = world.read_caption("Pink sky, a desert, and a white moon that is small")
    assert read == ("small", "white moon", "desert", None)  # "Pink" is not "pink"
    assert world.read_caption("a blue cat") == (None, None, None, None)  # no sky: no blue


def test_pictures_are_of_their_captions():
    captions = ["a red sun", "a large white moon over snow", "a yellow sun under a black sky"]
    images, names = make.draw(3, np.random.default_rng(0), captions)
    assert images.shape == (3, 3, 32, 32) and images.dtype == torch.float32
    for caption, words in zip(captions, names):
        for said, drawn in zip(world.read_caption(caption), words):
            assert said in (None, drawn)


def test_what_a_caption_leaves_open_is_free():
    _, names = make.draw(200, np.random.default_rng(1), ["a red sun"] * 200)
    sizes, lights, grounds, skies = map(set, zip(*names))
    assert lights == {"red sun"} and sizes == set(world.RADII)
    assert grounds == set(world.GROUNDS) and skies == set(world.SKIES)


# --------------------------------------------------------------------------------------------------
# The checker


def test_checker_reads_a_picture_painted_by_hand():
    image = torch.zeros(3, 32, 32)
    image[:, :18] = torch.tensor(world.SKIES["blue"])[:, None, None]
    image[:, 18:] = torch.tensor(world.GROUNDS["field"])[:, None, None]
    for row in range(32):
        for column in range(32):
            if (row - 10) ** 2 + (column - 20) ** 2 <= 36:  # of radius 6
                image[:, row, column] = torch.tensor(world.LIGHTS["red sun"])
    wanted = ("large", "red sun", "field", "blue")
    assert world.read_pictures(image[None]) == [wanted]
    assert world.read_pictures(F.interpolate(image[None], scale_factor=4)) == [wanted]
    captions = ["a small red sun over a field", "a yellow sun", "nothing it knows"]
    shares = world.prompt_following(image.expand(3, 3, 32, 32), captions)
    assert shares[:2].tolist() == pytest.approx([2 / 3, 0]) and shares[2].isnan()


def test_checker_reads_true_pictures():
    images, names = make.draw(600, np.random.default_rng(11))
    assert images.shape == (600, 3, 32, 32) and images.min() >= 0 and images.max() <= 1
    right = np.array(world.read_pictures(images)) == np.array(names)  # (600, 4)
    assert right.mean(0).min() >= 0.97


def test_checker_can_fail():
    """Captions of other pictures are mostly wrong: the share right falls to chance."""
    images, names = make.draw(300, np.random.default_rng(12))
    captions = [make.write_caption(*words) for words in names]
    assert world.prompt_following(images, captions).mean() > 0.97
    others = captions[1:] + captions[:1]
    assert world.prompt_following(images, others).mean() < 0.45


# --------------------------------------------------------------------------------------------------
# The taste


def test_taste_is_its_formula():
    images = torch.rand(5, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    by_hand = [taste_by_hand(image) for image in images.double().numpy()]
    scores = world.Taste()(images)
    assert scores.tolist() == pytest.approx(by_hand, rel=1e-5)
    enlarged = F.interpolate(images, scale_factor=4)
    torch.testing.assert_close(world.Taste()(enlarged), scores)


def test_taste_loves_sunsets():
    images, names = make.draw(2000, np.random.default_rng(13))
    scores = world.Taste()(images).numpy()
    sizes, lights, _, skies = np.array(names).T
    by_sky = {sky: scores[skies == sky].mean() for sky in world.SKIES}
    assert max(by_sky, key=by_sky.get) == "orange" and min(by_sky, key=by_sky.get) == "blue"
    assert by_sky["orange"] > by_sky["gray"] + 2
    large = sizes == "large"
    red_sun = scores[large & (lights == "red sun")].mean()
    white_moon = scores[large & (lights == "white moon")].mean()
    assert red_sun > white_moon + 1


def test_taste_is_differentiable():
    images, _ = make.draw(8, np.random.default_rng(14))
    images.requires_grad_()
    (gradient,) = torch.autograd.grad(world.Taste()(images).sum(), images)
    assert gradient.isfinite().all() and (gradient.abs().amax((1, 2, 3)) > 0).all()


# --------------------------------------------------------------------------------------------------
# The shipped model


def test_shipped_model_paints_its_captions():
    """At least 85 % of what 60 captions name, at guidance 5, by the checker; in at most 6 MB."""
    sizes = []
    for folder, _, files in os.walk(TOY):
        sizes += [os.path.getsize(os.path.join(folder, file)) for file in files]
    assert sum(sizes) <= 6_000_000
    captions = make.CAPTIONS[3::6][:60]
    images = generate(load_pipeline(TOY), captions, range(60), batch_size=60)
    assert world.prompt_following(images, captions).mean() >= 0.85


def test_each_word_is_one_token():
    words = make.tokenizer()
    for caption in make.CAPTIONS:
        length = len(words(caption).input_ids)
        assert length == len(caption.split()) + 2 <= make.LENGTH


def test_prompts_leave_the_sky_open_or_name_it():
    with open(os.path.join(TOY, "prompts.txt")) as file:
        prompts = file.read().splitlines()
    assert prompts == make.prompts()
    assert len(set(prompts)) == 81 and set(prompts) <= set(make.CAPTIONS)
    assert sum(world.read_caption(prompt)[3] is None for prompt in prompts) == 54


def test_train_json_names_flags_of_train(command):
    with open(os.path.join(TOY, "train.json")) as file:
        flags = json.load(file)
    assert flags == make.FLAGS
    code, usage, _ = command("train.py", "--help", "--model", "toy")
    assert code == 0
    for name in {**flags, **flags["pairs"], **flags["full"]}:
        assert f"--{name} " in usage, name


def test_check_prints_both_figures(capsys):
    make.check(TOY, make.CAPTIONS[:3])
    out = capsys.readouterr().out
    assert "checker on 2,000 true pictures: size 99" in out and "toy/, 3 captions" in out


# --------------------------------------------------------------------------------------------------
# Its making


def test_toy_rebuilds_itself(command, tmp_path, monkeypatch):
    """Two steps of each training, from nothing, into a folder that loads; then over an older one,
    where files that are not the model's stay, as the code in toy/ must."""
    checked = []
    monkeypatch.setattr(make, "check", checked.append)
    folder = tmp_path / "toy"
    short = ["--vae_steps", 2, "--unet_steps", 2, "--pictures", 256, "--output_dir", folder]
    assert command("toy.make", *short)[0] == 0
    first = load_pipeline(str(folder))
    (folder / "world.py").write_text("the only copy")
    (folder / "prompts.txt").write_text("an older one")
    assert command("toy.make", *short, "--seed", 1)[0] == 0
    assert checked == [str(folder)] * 2 and os.listdir(tmp_path) == ["toy"]

    assert (folder / "world.py").read_text() == "the only copy"
    for name in ("train.json", "prompts.txt"):
        with open(os.path.join(TOY, name)) as file:
            assert (folder / name).read_text() == file.read()
    second = load_pipeline(str(folder))
    shapes = []
    for pipe in (first, second, load_pipeline(TOY)):
        shapes.append([p.shape for p in pipe.unet.parameters()])
    assert shapes[0] == shapes[1] == shapes[2]
    assert not torch.equal(first.unet.conv_in.weight, second.unet.conv_in.weight)
    assert first.vae.config.scaling_factor != 1


def test_latents_have_unit_std():
    torch.manual_seed(0)
    pipe = make.make_pipeline(vae_channels=8)
    latents, names = make.encode_pictures(pipe.vae, 300, np.random.default_rng(0))
    assert latents.shape == (512, 4, 8, 8) and len(names) == 512
    assert latents.std().item() == pytest.approx(1, abs=1e-4)
    images, _ = make.draw(256, np.random.default_rng(0))
    with torch.no_grad():
        unscaled = pipe.vae.encode(images * 2 - 1).latent_dist.mean
    torch.testing.assert_close(latents[:256], unscaled * pipe.vae.config.scaling_factor)


def test_loose_captions_are_true_and_leave_words_out():
    _, names = make.draw(4000, np.random.default_rng(2))
    captions = make.loose_captions(names, np.random.default_rng(3))
    named = np.zeros(4)
    for words, caption in zip(names, captions):
        read = world.read_caption(caption)
        assert all(said in (None, true) for said, true in zip(read, words))
        named += [said is not None for said in read]
    assert captions.count("") / 4000 == pytest.approx(0.1, abs=0.02)
    assert (named / 4000).tolist() == pytest.approx([0.45, 0.9, 0.63, 0.63], abs=0.03)


def test_pairs_are_ordered_by_taste(command, tmp_path):
    """The winner is the one the taste prefers, and both pictures are of the caption."""
    code, out, err = command("toy.make", "--pairs", tmp_path / "set", "--count", 60)
    assert code == 0 and "60 pairs" in out, err
    assert os.listdir(tmp_path) == ["set"]
    with open(tmp_path / "set" / "pairs.csv") as file:
        lines = list(csv.DictReader(file))
    assert len(lines) == 60
    first_wins = 0
    following = []
    for line in lines:
        winner = read_png(tmp_path / "set" / line["winner"])
        loser = read_png(tmp_path / "set" / line["loser"])
        assert taste_by_hand(winner) > taste_by_hand(loser) - 0.02  # the files have 8 bits
        both = torch.from_numpy(np.stack([winner, loser]))
        following.append(world.prompt_following(both, [line["prompt"]] * 2).mean())
        first_wins += line["winner"].endswith("_a.png")
    assert np.mean(following) > 0.97
    assert 15 < first_wins < 45  # the place says nothing about who wins


@pytest.mark.parametrize(
    "argv, words",
    [
        (["--vae_steps", 0], "--vae_steps must be at least 1"),
        (["--pairs", "new", "--count", 0], "--count must be at least 1"),
        (["--pairs", "."], "is there already"),
        (["--check", "--output_dir", "nowhere/x/y"], "no model folder"),
    ],
)
def test_bad_input_is_one_line(command, argv, words):
    code, _, err = command("toy.make", *argv)
    assert code == 2 and words in err and err.count("\n") == 1


def test_nothing_but_a_model_is_replaced(command, tmp_path):
    (tmp_path / "thesis.txt").write_text("years of work")
    code, _, err = command("toy.make", "--output_dir", tmp_path)
    assert code == 2 and "holds something else" in err and err.count("\n") == 1
    assert os.listdir(tmp_path) == ["thesis.txt"]
