"""evaluate.py as a user meets it: runs, LoRAs, models and folders of images."""

import csv
import json
import math
import os
import shutil
import sys

import numpy as np
import pytest
import torch
from child import Child
from conftest import PROMPTS as TOY_PROMPTS
from conftest import ROOT, shake
from PIL import Image
from safetensors.torch import load_file, save_file
from weights import golden

import evaluate
import train
from parts import diversity
from parts.common import UserError, hold_out, to_pil
from parts.images import list_images, read_image
from parts.judges import JUDGES
from parts.model import LORA_FILE, Policy, load_pipeline, load_policy
from parts.weights import SD15, TOY
from sample import generate, seed_of
from toy.world import Taste

PROMPTS = ["a red sun over a sea", "a white moon", "a yellow sun over snow"]
SMALL = ["--num_inference_steps", 2, "--device", "cpu"]
TASTE_ALONE = ["--judges", "taste", "--metrics", "none"]


def picture(p, k, size=32):
    coarse = np.random.default_rng((p, k)).integers(0, 256, (6, 6, 3), dtype=np.uint8)
    smooth = Image.fromarray(coarse).resize((size, size), Image.Resampling.BICUBIC)
    return np.array(smooth)


def save_picture(path, p, k, size=32):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(picture(p, k, size)).save(path)


@pytest.fixture
def folder(tmp_path):
    """Three prompts, two images each, and prompts.txt: another method's output."""
    path = tmp_path / "theirs"
    for p in range(3):
        for k in range(2):
            save_picture(path / f"{p}_{k}.png", p, k)
    (path / "prompts.txt").write_text("\n".join(PROMPTS))
    return path


@pytest.fixture
def home(tmp_path):
    return tmp_path / "out"


@pytest.fixture
def evaluate_(command, home):
    def call(*argv):
        return command("evaluate.py", "--output_dir", home, *SMALL, *argv)

    return call


def read_csv(path):
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(line for line in file if not line.startswith("#")))


def scores(home, label, metric, column=None):
    lines = read_csv(home / label / "scores" / f"{metric}.csv")
    return [float(line[column or metric]) for line in lines]


def last_line(err):
    return err.strip().splitlines()[-1]


@pytest.fixture(scope="module")
def run(micro, prompts_file, tmp_path_factory):
    """A run's folder, as train.py leaves it."""
    out = tmp_path_factory.mktemp("runs") / "micro-js"
    flags = ["--model", micro, "--prompts", prompts_file, "--judge", "taste"]
    flags += ["--max_train_steps", 1, "--sample_batch_size", 3, "--num_children", 2]
    flags += ["--first_step", 1, "--threshold", 0, "--num_inference_steps", 4]
    flags += ["--train_batch_size", 2, "--num_eval_prompts", 2, "--images_per_prompt", 2]
    flags += ["--guidance_scale", 3, "--device", "cpu", "--learning_rate", 0.01]
    argv = sys.argv
    sys.argv = ["train.py", *map(str, flags), "--output_dir", str(out)]
    try:
        train.main()
    finally:
        sys.argv = argv
    return out


# --------------------------------------------------------------------------------------------------
# What is computed


def test_a_folder_of_images(evaluate_, folder, home):
    of_two = ["rmse", "psnr", "ssim", "fsim"]
    metrics = [*of_two, "entropy_1d", "entropy_2d"]
    code, out, err = evaluate_(folder, "--judges", "taste", "--metrics", *metrics)
    assert code == 0, err
    for name in of_two:
        expected = [getattr(diversity, name)(picture(p, 0), picture(p, 1)) for p in range(3)]
        assert scores(home, "theirs", name) == expected
    images = [picture(p, k) for p in range(3) for k in range(2)]
    for name in ("entropy_1d", "entropy_2d"):
        function = getattr(diversity, name)
        assert scores(home, "theirs", name) == [function(image) for image in images]
    pixels = torch.tensor(np.stack(images)).permute(0, 3, 1, 2) / 255
    assert scores(home, "theirs", "taste") == pytest.approx(Taste()(pixels).tolist(), rel=1e-5)
    taste, rmse = (read_csv(home / f"theirs/scores/{m}.csv") for m in ("taste", "rmse"))
    keys = [(line["prompt_index"], line["images"]) for line in taste]
    assert keys == [(p, k) for p in "012" for k in "01"]
    keys = [(line["prompt_index"], line["images"]) for line in rmse]
    assert keys == [(p, "0 1") for p in "012"]


def test_the_tables(evaluate_, folder, home):
    """A cell is the mean over prompts of their means, ± the sample's sd (and sd / sqrt(n))."""
    for p in range(3):
        save_picture(folder / f"{p}_2.png", p, 2)
    code, out, _ = evaluate_(folder, "--judges", "taste", "--metrics", "rmse")
    values = np.array(scores(home, "theirs", "rmse")).reshape(3, 3).mean(1)  # 3 comparisons each
    mean, sd, se = values.mean(), values.std(ddof=1), values.std(ddof=1) / math.sqrt(3)
    table2, table3 = ((home / f"table{n}.md").read_text() for n in (2, 3))
    assert f"| {mean:#.4g} ± {sd:#.2g} ({se:#.2g}) |" in table3 and table3 in out and table2 in out
    summary = {line["metric"]: line for line in read_csv(home / "summary.csv")}
    assert summary.keys() == {"taste", "prompt following", "rmse"}
    for name, value in (("mean", mean), ("sd", sd), ("se", se), ("prompts", 3)):
        assert float(summary["rmse"][name]) == pytest.approx(value)
    assert "- lpips: not asked for: --metrics lpips, 0.24 GB of weights" in table3
    assert "- vqascore: not asked for: --judges vqascore, 22.9 GB of weights" in table2
    assert table3.count("not run") == 7 and table2.count("not run") == 6
    assert (home / "tradeoff.png").stat().st_size > 5000


def test_every_judge_and_metric_from_a_weights_folder(
    evaluate_, folder, home, tmp_path, tiny_judges
):
    code, out, err = evaluate_(folder, "--weights", tiny_judges)
    assert code == 0 and "not run" not in out, err
    for name in evaluate.TABLE2:
        assert np.isfinite(scores(home, "theirs", name)).all()
    hps, clipscore = scores(home, "theirs", "hps"), scores(home, "theirs", "clipscore")
    assert hps == pytest.approx([100 * x for x in clipscore], rel=1e-4)  # one CLIP, two formats
    assert min(scores(home, "theirs", "lpips")) > 0
    assert max(np.abs(scores(home, "theirs", "clip_i"))) < 1

    # weights from elsewhere: their judge anew, the rest stays, in the tables too
    other = shutil.copytree(tiny_judges, tmp_path / "w2")
    head = other / "sac+logos+ava1-l14-linearMSE.pth"
    state = torch.load(head, weights_only=True)
    state["layers.7.bias"] += 1
    torch.save(state, head)
    before = scores(home, "theirs", "aesthetic")
    flags = ["--judges", "aesthetic", "--metrics", "none", "--weights", other]
    code, out, err = evaluate_(folder, *flags)
    after = scores(home, "theirs", "aesthetic")
    assert code == 0 and after == pytest.approx([x + 1 for x in before], abs=1e-5)
    assert "not run" not in out and scores(home, "theirs", "hps") == hps


@pytest.mark.parametrize("name", [*evaluate.TABLE2, "step_aware", "taste"])
def test_judges_one_by_one(evaluate_, folder, tiny_judges, name):
    flags = ["--weights", tiny_judges, "--judges", name, "--metrics", "none"]
    code, out, _ = evaluate_(folder, *flags)
    assert code == 0 and out.count("not asked for") == 14 - (name in evaluate.TABLE2)


@pytest.mark.parametrize("name", evaluate.TABLE3)
def test_metrics_one_by_one(evaluate_, folder, tiny_judges, name):
    flags = ["--weights", tiny_judges, "--judges", "none", "--metrics", name]
    code, out, _ = evaluate_(folder, *flags)
    assert code == 0 and out.count("not asked for") == 13


class Bright:
    """A judge of one's own, as parts/judges.py says."""

    def __init__(self, device, weights):
        pass

    def encode(self, prompts):
        return torch.tensor([len(prompt) for prompt in prompts])

    def __call__(self, images, text, t=None):
        return images.mean((1, 2, 3)) + text


class Reporting(Bright):
    """It has more to say."""

    reads_prompt = False

    def report(self, images, prompts):
        return {"contrast": images.flatten(1).std(1)}


def test_a_judge_of_ones_own(evaluate_, folder, home, monkeypatch):
    monkeypatch.setitem(JUDGES, "bright", Bright)
    monkeypatch.setitem(JUDGES, "reporting", Reporting)
    flags = ["--judges", "bright", "reporting", "--metrics", "none"]
    code, out, err = evaluate_(folder, *flags)
    columns = "| model | bright ↑ | reporting ↑ | contrast ↑ | CLIPScore ↑ |"
    assert code == 0 and columns in out, err
    images = [(p, picture(p, k) / 255) for p in range(3) for k in range(2)]
    expected = [image.mean() + len(PROMPTS[p]) for p, image in images]
    assert scores(home, "theirs", "bright") == pytest.approx(expected, rel=1e-6)
    expected = [image.std(ddof=1) for _, image in images]
    assert scores(home, "theirs", "reporting", "contrast") == pytest.approx(expected, rel=1e-4)

    os.remove(folder / "prompts.txt")  # one of them can do without
    code, _, err = evaluate_(folder, "--judges", "bright", "--metrics", "none")
    assert code == 2 and "bright needs the prompts" in last_line(err)
    code, out, err = evaluate_(folder, "--judges", "reporting", "--metrics", "none")
    assert code == 0 and "contrast" not in out, err


def test_a_black_image_is_counted(evaluate_, folder, home):
    Image.fromarray(np.zeros((32, 32, 3), np.uint8)).save(folder / "2_1.png")
    save_picture(folder / "0_1.png", 0, 0)  # and two images that are the same
    flags = ["--judges", "taste", "--metrics", "fsim", "psnr"]
    code, out, err = evaluate_(folder, *flags)
    assert code == 0, err
    assert "fsim of theirs: 1 values nan or inf, left out" in out
    assert "psnr of theirs: 1 values nan or inf, left out" in out
    summary = {line["metric"]: line for line in read_csv(home / "summary.csv")}
    fsim = summary["fsim"]
    assert fsim["left_out"] == "1" and fsim["prompts"] == "2" and math.isfinite(float(fsim["mean"]))
    assert float(fsim["mean"]) == pytest.approx(np.mean(scores(home, "theirs", "fsim")[:2]))


def test_a_hub_id_may_have_a_revision():
    model = f"{evaluate.weights.SD15}@v2"
    row = evaluate.find_row(model, "auto")
    assert row.model == row.source == model and evaluate.is_sd15(model)
    with pytest.raises(UserError, match="nothing to score"):
        evaluate.find_row("out/js", "auto")


def test_arrows_point_to_what_varies_more(tmp_path, weights_dir, tiny_judges):
    """Images alike and images that differ: every metric moves along its arrow."""
    noise = np.random.default_rng(0).integers(-9, 10, (48, 48, 3))
    image = picture(0, 0, 48)
    alike = np.clip(image + noise, 0, 255).astype(np.uint8)
    other = picture(1, 1, 48)
    flat = np.full((48, 48, 3), 99, np.uint8)
    for name, (title, *_) in evaluate.TABLE3.items():
        prepare, compare = diversity.load_metric(name, "cpu", weights_dir)

        def measure(*images, prepare=prepare, compare=compare):
            ready = [prepare(torch.tensor(x)) for x in images]
            return float(compare(*ready) if compare else ready[0])

        less, more = measure(image, alike), measure(image, other)
        if compare is None:
            less, more = measure(flat), measure(image)
        assert (more > less) == title.endswith("↑"), name
        assert (more < less) == title.endswith("↓"), name
    assert all(title.endswith("↑") for title, *_ in evaluate.TABLE2.values())


@pytest.mark.parametrize(
    "title, best, worst", [("PSNR ↓", "30.00", "32.00"), ("R ↑", "32.", "30.")]
)
def test_best_is_bold_the_right_way_round(title, best, worst):
    rows = [evaluate.Row(source, None, {}, label=source) for source in "abc"]
    for row, mean in zip(rows, (30.0, 32.0, 31.0)):
        row.scores = {"m": evaluate.Summary(mean, sd=1.0, se=0.5, prompts=4, left_out=0)}
    table = evaluate.make_table({"m": (title, 0)}, rows, "--metrics", {})
    own = "".join(table.splitlines(keepends=True)[:5])  # above the paper's rows
    assert f"| **{best}" in own and f"| {worst}" in own and own.count("**") == 2
    assert table.count("| paper: ") == 8 and table.count("**") == 2


def test_the_papers_rows():
    """The originals of Tables 2 and 3, and that bold is a column's best of the aligned rows."""
    paper = evaluate.read_paper()
    assert list(paper) == [*evaluate.TABLE2, *evaluate.TABLE3]
    printed = "0.352 0.049 0.601 0.243 5.648 0.526 0.173 1.011 20.908 1.228 26.933 1.454".split()
    printed += "0.7994 0.0842 7.2547 0.6230 14.0615 1.3478 0.6306 0.0707".split()
    printed += "0.0202 0.0043 34.0374 1.8413 0.7344 0.0858 0.2942 0.0307".split()
    originals = " ".join(cells["paper: original"] for cells in paper.values())
    assert originals.replace(" ±", "").split() == printed
    for metric, cells in paper.items():
        title, _ = (evaluate.TABLE2 | evaluate.TABLE3)[metric]
        means = {model: float(cell.strip("*").split()[0]) for model, cell in cells.items()}
        assert len(means) == 8
        means.pop("paper: original")
        best = (max if title.endswith("↑") else min)(means, key=means.get)
        bold = [model for model, cell in cells.items() if cell.startswith("**")]
        assert bold == [best], metric


def test_images_as_people_name_them(tmp_path):
    """cases.md 14 and 9: sample.py's own folder, GenEval's; a name is told from damage."""
    names = "000_seed5.png 00001/samples/0002.png 2_0.jpg 3/1.webp 4.PNG 5_0.tif".split()
    for name in [*names, "grid.png", "000_final.png", "Thumbs.db", "run.log"]:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    found, strange = list_images(tmp_path)
    places = {}
    for p in found:
        for k, path in found[p].items():
            places[p, k] = path.relative_to(tmp_path).as_posix()
    assert places == dict(zip([(0, 5), (1, 2), (2, 0), (3, 1), (4, 0), (5, 0)], names))
    assert [path.name for path in strange] == ["000_final.png"]
    Image.fromarray(np.full((8, 8), 0.5, np.float32)).save(tmp_path / "6.tif")
    with pytest.raises(UserError, match="floating-point"):
        read_image(tmp_path / "6.tif")


def test_folders_of_a_prompt_may_be_links(tmp_path):
    """cases.md 16."""
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "0.png").touch()
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "7").symlink_to(tmp_path / "elsewhere")
    found, strange = list_images(tmp_path / "images")
    assert found.keys() == {7} and not strange


def test_images_that_differ_by_their_turn_alone(evaluate_, folder):
    """cases.md 15: upright, one is as wide as the other is high."""
    picture = Image.fromarray(np.arange(40 * 48 * 3, dtype=np.uint8).reshape(40, 48, 3))
    exif = Image.Exif()
    exif[0x0112] = 6
    picture.save(folder / "0_0.png")
    picture.save(folder / "0_1.png", exif=exif)
    code, _, err = evaluate_(folder, "--judges", "none", "--metrics", "rmse")
    assert code == 2 and "rmse needs images of one size" in last_line(err)


def test_sd15_is_known_by_its_shape(micro, tmp_path):
    assert evaluate.is_sd15(SD15) and evaluate.is_sd15(None)
    assert not evaluate.is_sd15(micro) and not evaluate.is_sd15("owner/name")
    (tmp_path / "unet").mkdir()
    config = {"sample_size": 64, "cross_attention_dim": 768}
    (tmp_path / "unet" / "config.json").write_text(json.dumps(config))
    assert evaluate.is_sd15(str(tmp_path))


# --------------------------------------------------------------------------------------------------
# What is painted


def test_a_run_and_its_original(evaluate_, run, home, micro, monkeypatch):
    flags = [run, "--judges", "taste", "--metrics", "rmse", "entropy_1d", "--images_per_prompt", 2]
    code, out, err = evaluate_(*flags)
    assert code == 0, err
    original, aligned = out.index("| micro (original) |"), out.index("| micro-js |")
    assert original < aligned and "**" in out and "paper:" not in out
    assert len(scores(home, "micro-js", "taste")) == 4 and len(scores(home, "micro", "rmse")) == 2
    # the prompts are those the run held out, seeds are shared, images are those of generate()
    held_out = json.loads((run / "config.json").read_text())["held_out"]
    assert len(held_out) == 2
    pipe = load_pipeline(micro)
    expected = [generate(pipe, [held_out[1]], [seed_of(1, 1)], 2, 3.0)[0]]
    load_policy(pipe.unet, str(run))
    expected.append(generate(pipe, [held_out[1]], [seed_of(1, 1)], 2, 3.0)[0])
    painted = []
    for label, image in zip(("micro", "micro-js"), expected):
        painted.append(np.array(Image.open(home / label / "images/00001_1.png")).astype(int))
        assert np.abs(np.array(to_pil(image)).astype(int) - painted[-1]).max() <= 1
    assert np.abs(painted[0] - painted[1]).max() > 1

    # a second call computes nothing: neither model nor judge nor metric is touched
    def never(*_, **__):
        raise AssertionError("computed again")

    files = [home / "micro-js/scores/taste.csv", home / "micro/images/00000_0.png"]
    stamps = [file.stat().st_mtime_ns for file in files]
    with monkeypatch.context() as patch:
        for name in ("load_pipeline", "load_metric", "generate", "read_image", "measure"):
            patch.setattr(evaluate, name, never)
        code, again, err = evaluate_(*flags)
    assert code == 0 and [file.stat().st_mtime_ns for file in files] == stamps
    assert again.splitlines()[:-1] == out.splitlines()[:-1]  # but for the time it took

    # one more image a prompt: only that is painted
    seeds = []

    def note(pipe, prompts, those, *sampler, **options):
        seeds.extend(those)
        return generate(pipe, prompts, those, *sampler, **options)

    with monkeypatch.context() as patch:
        patch.setattr(evaluate, "generate", note)
        code, _, err = evaluate_(*flags[:-1], 3)
    assert code == 0 and seeds == 2 * [seed_of(0, 2), seed_of(1, 2)], err
    assert len(scores(home, "micro", "rmse")) == 6


def test_sampler_settings_are_the_runs(command, run, home):
    flags = [*TASTE_ALONE, "--images_per_prompt", 1, "--device", "cpu", "--output_dir", home]
    assert command("evaluate.py", run, *flags)[0] == 0
    for label in ("micro", "micro-js"):
        settings = json.loads((home / label / "settings.json").read_text())
        assert (settings["num_inference_steps"], settings["guidance_scale"]) == (4, 3.0)


def test_other_settings_are_refused(evaluate_, run, home, tmp_path):
    flags = [*TASTE_ALONE, "--images_per_prompt", 1]
    assert evaluate_(run, *flags)[0] == 0
    before = (home / "micro/images/00000_0.png").read_bytes()
    copy = shutil.copytree(run, tmp_path / "copy" / "micro-js")
    state = load_file(copy / LORA_FILE)
    save_file({name: tensor + 1 for name, tensor in state.items()}, copy / LORA_FILE)
    prompts = tmp_path / "p.txt"
    prompts.write_text("a moon\na sun")
    others = [
        ([run, "--guidance_scale", 2], "guidance_scale"),
        ([run, "--prompts", prompts], "prompts"),
        ([copy], "weights"),
    ]
    for argv, name in others:
        code, _, err = evaluate_(*argv, *flags)
        assert code == 2 and f"has images of other {name}: take another" in last_line(err)
        assert err.count("\n") == 1
    assert (home / "micro/images/00000_0.png").read_bytes() == before


def test_loras_whole_unets_and_models(evaluate_, run, micro, prompts_file, home, tmp_path):
    lone = tmp_path / "mine.safetensors"
    bare = tmp_path / "bare"
    bare.mkdir()
    for copy in (lone, bare / LORA_FILE):
        shutil.copy(run / LORA_FILE, copy)
    full = Policy(load_pipeline(micro).unet, full=True)
    shake(full)
    full.save(str(tmp_path / "full"))
    flags = [*TASTE_ALONE, "--images_per_prompt", 1, "--num_prompts", 2, "--prompts", prompts_file]
    targets = [lone, bare, tmp_path / "full", micro]
    code, out, err = evaluate_(*targets, *flags, "--model", micro)
    assert code == 0, err
    labels = [line.split("|")[1].strip() for line in out.split("###")[1].splitlines()[4:8]]
    assert labels == ["micro (original)", "mine", "bare", "full"]
    values = {name: scores(home, name, "taste") for name in ("micro", "mine", "bare", "full")}
    assert values["mine"] == values["bare"] != values["micro"] != values["full"]


def test_what_the_toy_is_measured_by(evaluate_, home):
    """Its folder's train.json and prompts.txt say it: no weights, and what train.py holds out."""
    code, out, err = evaluate_("toy", "--num_prompts", 2, "--images_per_prompt", 2)
    assert code == 0, err
    done = {path.stem for path in (home / "toy/scores").iterdir()}
    assert done == {"taste", "rmse", "psnr", "ssim", "fsim", "entropy_1d", "entropy_2d"}
    held_out = hold_out(TOY_PROMPTS, 40)[1]
    assert len(held_out) == 40
    assert evaluate.own_prompts(evaluate.Row(TOY, TOY, {})) == held_out
    assert json.loads((home / "toy/settings.json").read_text())["prompts"] == held_out[:2]


# --------------------------------------------------------------------------------------------------
# What is there


def test_a_killed_call_goes_on(run, tmp_path):
    """Killed while it paints and while it scores: what was there stays, the end is the same."""
    flags = [run, "--judges", "taste", "--metrics", "rmse", "--images_per_prompt", 2, *SMALL]
    whole, home = tmp_path / "whole", tmp_path / "killed"

    def call(out, kill=None):
        argv = "evaluate.py", *flags, "--output_dir", out
        return Child(*argv, kill=kill, environment={"OMP_NUM_THREADS": "1"}).wait()

    assert call(whole)[0] == 0
    assert call(home, ("KILL", "parts.common", "write_png", 3))[0] == -9
    painted = {path: path.stat().st_mtime_ns for path in home.glob("micro/images/*.png")}
    assert len(painted) == 2
    assert (
        call(home, ("KILL", "parts.common", "csv_text", 2))[0] == -9
    )  # of the original is the first
    assert [path.stem for path in home.glob("*/scores/*.csv")] == ["taste"]
    assert all(path.stat().st_mtime_ns == stamp for path, stamp in painted.items())
    code, printed = call(home)
    assert code == 0, printed
    files = ["table2.md", "table3.md", "summary.csv", "micro-js/scores/rmse.csv"]
    assert all((home / name).read_text() == (whole / name).read_text() for name in files)


def test_two_calls_share_a_folder(evaluate_, folder, monkeypatch):
    """One judge a GPU: either call ends with all the columns that are there."""
    monkeypatch.setitem(JUDGES, "bright", Bright)
    assert evaluate_(folder, *TASTE_ALONE)[0] == 0
    code, out, _ = evaluate_(folder, "--judges", "bright", "--metrics", "none")
    head = out.split("###")[1].splitlines()[2]
    assert code == 0 and head.startswith("| model | bright ↑ | taste ↑ | prompt following ↑ |")
    assert out.count("not run") == 6 + 8


def test_changed_images_are_scored_again(evaluate_, folder, home, tmp_path):
    flags = [folder, "--judges", "taste", "--metrics", "rmse", "entropy_1d"]
    assert evaluate_(*flags)[0] == 0
    before = scores(home, "theirs", "rmse")
    save_picture(folder / "1_1.png", 9, 9)
    assert evaluate_(*flags)[0] == 0
    after = scores(home, "theirs", "rmse")
    assert [x == y for x, y in zip(before, after)] == [True, False, True]
    assert after[1] == diversity.rmse(picture(1, 0), picture(9, 9))
    # what does not fit is no part of the tables
    save_picture(folder / "1_1.png", 8, 8)
    code, out, _ = evaluate_(folder, *TASTE_ALONE)
    assert code == 0 and "- rmse: not asked for" in out


def test_other_prompts_are_judged_again(evaluate_, folder, home, monkeypatch):
    monkeypatch.setitem(JUDGES, "bright", Bright)
    flags = [folder, "--judges", "bright", "--metrics", "none"]
    assert evaluate_(*flags)[0] == 0
    before = scores(home, "theirs", "bright")
    (folder / "prompts.txt").write_text("\n".join(prompt + "!" for prompt in PROMPTS))
    assert evaluate_(*flags)[0] == 0
    assert scores(home, "theirs", "bright") == pytest.approx([x + 1 for x in before])


def test_a_broken_score_file_is_computed_again(evaluate_, folder, home):
    assert evaluate_(folder, *TASTE_ALONE)[0] == 0
    path = home / "theirs/scores/taste.csv"
    whole = path.read_text()
    for broken in ("", "prompt_index,image\nx,y\n", whole.splitlines()[0]):
        path.write_text(broken)
        assert evaluate_(folder, *TASTE_ALONE)[0] == 0
        assert path.read_text() == whole


# --------------------------------------------------------------------------------------------------
# What folders of images may look like


def test_two_folders_of_other_sizes(evaluate_, folder, home, tmp_path):
    more = shutil.copytree(folder, tmp_path / "more")
    for p in range(3):
        save_picture(more / f"{p}_2.png", p, 2)
    flags = ["--judges", "taste", "--metrics", "rmse"]
    assert evaluate_(folder, more, *flags)[0] == 0  # the first folder says how many
    assert len(scores(home, "more", "rmse")) == 3
    code, _, err = evaluate_(more, folder, *flags)
    assert code == 2 and "theirs has 2 of 3 images 0_K.png" in err
    (more / "prompts.txt").write_text("\n".join(PROMPTS[::-1]))
    for more_flags in ([], ["--prompts", folder / "prompts.txt"]):
        code, _, err = evaluate_(folder, more, *flags, *more_flags)
        assert code == 2 and "has other prompts than those in use" in err and err.count("\n") == 1


def test_two_things_of_one_name(evaluate_, folder, tmp_path):
    other = shutil.copytree(folder, tmp_path / "other" / "theirs")
    code, _, err = evaluate_(folder, other, *TASTE_ALONE)
    assert code == 2 and "both called theirs: rename one" in err and err.count("\n") == 1
    assert evaluate_(folder, folder, *TASTE_ALONE)[0] == 0


def test_output_among_the_images(evaluate_, folder):
    flags = [folder, "--judges", "taste", "--metrics", "rmse", "--output_dir", folder / "out"]
    for _ in range(2):
        assert evaluate_(*flags)[0] == 0
    assert (folder / "out/theirs/scores/taste.csv").exists()


def test_prompts_of_other_scripts(evaluate_, folder, home):
    prompts = ['a "red", blue thing', "солнце, 太陽 ☀", "a cat; a 'dog'"]
    (folder / "prompts.txt").write_text("\n".join(prompts), encoding="utf-8")
    code, out, _ = evaluate_(folder, *TASTE_ALONE)
    # the toy's checker knows none of these words
    assert code == 0 and "prompt following of theirs: 6 values nan or inf, left out" in out


@pytest.mark.parametrize("layout", ["{p:05d}_{k}.png", "{p}/{k}.png"])
def test_layouts(evaluate_, home, tmp_path, layout):
    for p in range(2):
        for k in range(2):
            save_picture(tmp_path / "m" / layout.format(p=p, k=k), p, k)
    (tmp_path / "m" / "notes.md").write_text("of mine")
    assert evaluate_(tmp_path / "m", "--judges", "none", "--metrics", "rmse")[0] == 0
    expected = [diversity.rmse(picture(p, 0), picture(p, 1)) for p in range(2)]
    assert scores(home, "m", "rmse") == expected


def test_one_image_a_prompt(evaluate_, tmp_path):
    for p in range(2):
        save_picture(tmp_path / "m" / f"{p}.png", p, 0)
    flags = ["--judges", "taste", "--metrics"]
    code, _, err = evaluate_(tmp_path / "m", *flags, "rmse")
    assert code == 2 and "rmse compares the images of a prompt" in last_line(err)
    code, out, err = evaluate_(tmp_path / "m", *flags, "entropy_1d")
    assert code == 0, err
    code, out, err = evaluate_(tmp_path / "m")  # nobody named rmse: its cell says why
    assert code == 0 and "- rmse: rmse compares the images of a prompt" in out, err


def test_missing_weights_are_a_visible_cell(evaluate_, folder, home, tmp_path):
    empty = tmp_path / "w"
    empty.mkdir()
    code, out, err = evaluate_(folder, "--weights", empty)
    assert code == 0, err  # nobody named them: the rest is done, the cells say why not
    for name in (*evaluate.TABLE2, "lpips", "clip_i"):
        assert f"- {name}: " in out
    assert out.count("is not there") == 8 and "hf download xswu/HPSv2 HPS_v2_compressed.pt" in out
    assert len(scores(home, "theirs", "rmse")) == 3
    flags = ["--judges", "taste", "hps", "--metrics", "rmse"]
    code, out, err = evaluate_(folder, "--weights", empty, *flags)
    assert code == 2 and "hf download xswu/HPSv2" in last_line(err)
    code, out, err = evaluate_(folder, "--judges", "pickscore", "--metrics", "none")
    assert code == 2 and "the hub is out of reach): is the id right?" in last_line(err)


def test_skip_bad_scores_the_rest(evaluate_, folder, home):
    (folder / "1_1.png").write_bytes(b"\x89PNG broken")
    (folder / "grid.bmp").write_text("x")
    flags = [folder, "--judges", "taste", "--metrics", "rmse"]
    code, _, err = evaluate_(*flags)
    assert code == 2 and "2 bad files" in err and "grid.bmp is not named P_K.png" in err
    code, out, err = evaluate_(*flags, "--skip_bad")
    assert code == 0 and "- theirs: 2 bad files skipped" in out, err
    assert len(scores(home, "theirs", "taste")) == 5 and len(scores(home, "theirs", "rmse")) == 2


def test_the_papers_prompts_are_hpdv2s_json(evaluate_, folder, home, tmp_path):
    weights = tmp_path / "w"
    (weights / "HPDv2").mkdir(parents=True)
    items = [{"prompt": prompt, "image_path": ["a.jpg"], "rank": [1]} for prompt in PROMPTS]
    (weights / "HPDv2/test.json").write_text(json.dumps(items))
    flags = [*TASTE_ALONE, "--prompts", "hpdv2", "--weights", weights]
    assert evaluate_(folder, *flags)[0] == 0  # prompts.txt says the same
    (folder / "prompts.txt").write_text("\n".join(["a cat", *PROMPTS[1:]]))
    code, _, err = evaluate_(folder, *flags)
    assert code == 2 and "has other prompts than those in use" in err


# --------------------------------------------------------------------------------------------------
# Bad input


def truncate(path):
    path.write_bytes(path.read_bytes()[:60])


def remove_all(folder):
    for path in folder.iterdir():
        path.unlink()


def shrink_prompt_0(folder):
    for k in range(2):
        save_picture(folder / f"0_{k}.png", 0, k, 30)


def nothing(folder):
    pass


BAD = [
    (remove_all, [], "nothing to score"),
    (lambda f: truncate(f / "1_1.png"), [], "1 bad files (--skip_bad"),
    (lambda f: (f / "1_1.png").write_text("not an image"), [], "1_1.png"),
    (lambda f: (f / "cat.gif").write_text("x"), [], "cat.gif"),
    (lambda f: save_picture(f / "1_1.png", 1, 1, 30), [], "rmse needs images of one size"),
    (lambda f: os.remove(f / "1_1.png"), [], "has 1 of 2 images 1_K.png"),
    (lambda f: save_picture(f / "7_0.png", 1, 1), [], "images of 4 prompts, but there are 3"),
    (lambda f: (f / "prompts.txt").write_text("a\nb\nc\nd"), [], "has 0 of 2 images 3_K.png"),
    (lambda f: (f / "prompts.txt").write_text(""), [], "is empty"),
    (lambda f: os.remove(f / "prompts.txt"), ["--judges", "clipscore"], "needs the prompts"),
    (lambda f: save_picture(f / "1_1.jpg", 1, 1), [], "are both image 1 of prompt 1"),
    (shrink_prompt_0, ["--metrics", "rmse", "lpips"], "lpips needs images of one size, of 31"),
    (nothing, ["--images_per_prompt", 3], "has 2 of 3 images 0_K.png"),
    (nothing, ["--images_per_prompt", -1], "--images_per_prompt must lie"),
    (nothing, ["--images_per_prompt", 1], "rmse compares the images of a prompt, and needs two"),
    (nothing, ["--judges", "mother"], "invalid choice: 'mother'"),
    (nothing, ["--metrics", "fid"], "invalid choice: 'fid'"),
    (
        nothing,
        ["--weights", "nowhere", "--judges", "hps"],
        "nowhere/HPSv2/HPS_v2_compressed.pt is not there",
    ),
    (nothing, ["--device", "abacus"], "unknown device"),
    (nothing, ["--batch_size", 0], "--batch_size must lie"),
    (nothing, ["--prompts", "hpdv2"], "ymhao/HPDv2 cannot be had (not downloaded"),
    (nothing, ["--prompts", "nowhere.txt"], "cannot read prompts file"),
]


@pytest.mark.parametrize("spoil, flags, words", BAD, ids=lambda v: v if isinstance(v, str) else "")
def test_bad_input(evaluate_, folder, home, tmp_path, weights_dir, spoil, flags, words):
    spoil(folder)
    for name, value in {"--judges": "none", "--metrics": "rmse"}.items():
        if name not in flags:
            flags = [*flags, name, value]
    if "lpips" in flags:
        flags = [*flags, "--weights", weights_dir]
    code, _, err = evaluate_(folder, *flags)
    assert code == 2 and words in last_line(err) and "Traceback" not in err, err
    assert last_line(err).startswith("evaluate.py: ")
    assert "lpips" in flags or not list(home.glob("*/scores/*.csv"))


@pytest.mark.parametrize("target", ["nowhere", "./nowhere/at", "out/run-that-is-not", "."])
def test_targets(evaluate_, tmp_path, monkeypatch, target):
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path / "empty")
    code, _, err = evaluate_(target, *TASTE_ALONE)
    assert code == 2 and "nothing to score" in err and err.count("\n") == 1


def test_a_model_that_does_not_say_its_prompts(evaluate_, micro):
    code, _, err = evaluate_(micro, *TASTE_ALONE)
    assert code == 2 and "which prompts?" in err and err.count("\n") == 1


def test_broken_runs(evaluate_, run, tmp_path):
    flags = [*TASTE_ALONE, "--images_per_prompt", 1]
    copy = shutil.copytree(run, tmp_path / "r")
    config = (copy / "config.json").read_text()
    (copy / "config.json").write_text("{")
    code, _, err = evaluate_(copy, *flags)
    assert code == 2 and "config.json as JSON" in err and err.count("\n") == 1
    (copy / "config.json").write_text(config)
    os.remove(copy / LORA_FILE)
    code, _, err = evaluate_(copy, *flags)
    assert code == 2 and "nothing to score" in err and err.count("\n") == 1


def test_golden_files_say_where_they_come_from():
    for name in os.listdir(os.path.join(ROOT, "tests", "golden")):
        assert golden(name)["provenance"]["date"]
