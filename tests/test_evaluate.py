"""evaluate.py as a user meets it: runs, LoRAs, models and folders of images; resumed, refused, tabulated."""
import csv
import json
import math
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image

import evaluate
import sample
from toy import world as toy
import train
from conftest import ROOT
from sample import LORA_FILE
from weights import golden

PROMPTS = ["a red sun over a sea", "a white moon", "a yellow sun over snow"]
SMALL = ["--num_inference_steps", 2, "--device", "cpu"]


def picture(p, k, size=32):
    rng = np.random.default_rng((p, k))
    return np.asarray(Image.fromarray(rng.integers(0, 256, (6, 6, 3), dtype=np.uint8)).resize((size, size), Image.Resampling.BICUBIC))


@pytest.fixture
def folder(tmp_path):
    """Three prompts, two images each, and prompts.txt: another method's output."""
    path = tmp_path / "theirs"
    path.mkdir()
    for p in range(3):
        for k in range(2):
            Image.fromarray(picture(p, k)).save(path / f"{p}_{k}.png")
    (path / "prompts.txt").write_text("\n".join(PROMPTS))
    return path


@pytest.fixture
def evaluate_(command, tmp_path):
    def call(*argv):
        n = next((i for i, a in enumerate(argv) if str(a).startswith("--")), len(argv))
        return command("evaluate.py", *argv[:n], "--output_dir", tmp_path / "out", *SMALL, *argv[n:])
    return call


def table(path):
    with open(path, newline="", encoding="utf-8") as f:
        return list(csv.DictReader(f))


@pytest.fixture(scope="module")
def run(micro, prompts_file, tmp_path_factory):
    """A run's folder, as train.py leaves it."""
    out = tmp_path_factory.mktemp("runs") / "micro-js"
    flags = ["--model", micro, "--prompts", prompts_file, "--judge", "taste", "--max_train_steps", 1, "--sample_batch_size", 3, "--num_children", 2,
             "--first_step", 1, "--threshold", 0, "--num_inference_steps", 4, "--train_batch_size", 2, "--num_eval_prompts", 2,
             "--images_per_prompt", 2, "--device", "cpu", "--learning_rate", .01, "--output_dir", out]
    argv, sys.argv = sys.argv, ["train.py", *map(str, flags)]
    try:
        train.main()
    finally:
        sys.argv = argv
    return str(out)


def test_a_folder_of_images(evaluate_, folder, tmp_path):
    code, out, err = evaluate_(folder, "--judges", "taste", "--metrics", "rmse", "psnr", "ssim", "fsim", "entropy_1d", "entropy_2d")
    assert code == 0, err
    scores, pairs = (table(tmp_path / "out" / "theirs" / f) for f in ("scores.csv", "pairs.csv"))
    assert len(scores) == 6 and len(pairs) == 3 and scores[0]["prompt"] == PROMPTS[0]
    a, b = picture(1, 0), picture(1, 1)
    for metric in ("rmse", "psnr", "ssim", "fsim"):
        assert float(pairs[1][metric]) == getattr(evaluate, metric)(a, b)
    assert float(scores[3]["entropy_2d"]) == evaluate.entropy_2d(b)
    image = torch.tensor(b.copy()).permute(2, 0, 1)[None] / 255
    assert float(scores[3]["taste"]) == pytest.approx(toy.Taste()(image).item(), rel=1e-5)
    # the cell: mean +- sd over prompts (standard error)
    v = np.array([float(r["rmse"]) for r in pairs])
    cell = f"{v.mean():.4f} ± {v.std(ddof=1):.4f} ({v.std(ddof=1) / math.sqrt(3):.4f})"
    t2, t3 = ((tmp_path / "out" / f).read_text() for f in ("table2.md", "table3.md"))
    assert cell in t3 and cell in out
    assert t3.count("not run") >= 2 and "--metrics lpips`" in t3 and "--judges vqascore`" in t2 and "SD v1.5 in the paper" in t3
    assert (tmp_path / "out" / "tradeoff.png").stat().st_size > 5000
    summary = {r["metric"]: r for r in table(tmp_path / "out" / "summary.csv")}
    assert float(summary["rmse"]["mean"]) == pytest.approx(v.mean()) and summary["lpips"]["not_run"].startswith("not asked for")


def test_every_judge_and_every_metric_from_a_weights_folder(evaluate_, folder, tmp_path, tiny_judges):
    code, out, err = evaluate_(folder, "--weights", tiny_judges)
    assert code == 0, err
    assert "not run" not in out
    scores, pairs = (table(tmp_path / "out" / "theirs" / f) for f in ("scores.csv", "pairs.csv"))
    for r in scores:
        assert all(math.isfinite(float(r[m])) for m in evaluate.TABLE2)
        assert float(r["hps"]) == pytest.approx(100 * float(r["clipscore"]), rel=1e-4)  # one CLIP under two formats here
    assert all(0 < float(r["lpips"]) and -1 < float(r["clip_i"]) < 1 for r in pairs)
    # in another session, with weights from elsewhere: not the old scores
    other = shutil.copytree(tiny_judges, tmp_path / "w2")
    state = torch.load(other / "sac+logos+ava1-l14-linearMSE.pth", weights_only=True)
    state["layers.7.bias"] += 1
    torch.save(state, other / "sac+logos+ava1-l14-linearMSE.pth")
    code, out, err = evaluate_(folder, "--judges", "aesthetic", "--metrics", "none", "--weights", other)
    again = table(tmp_path / "out" / "theirs" / "scores.csv")
    assert code == 0 and "again" in err
    assert float(again[0]["aesthetic"]) == pytest.approx(float(scores[0]["aesthetic"]) + 1, abs=1e-5) and again[0]["hps"] == scores[0]["hps"]


@pytest.mark.parametrize("name", [*evaluate.MODEL_JUDGES, "taste"])
def test_judges_one_by_one(evaluate_, folder, tiny_judges, name):
    code, out, _ = evaluate_(folder, "--weights", tiny_judges, "--judges", name, "--metrics", "none")
    assert code == 0 and out.count("not asked for") == len(evaluate.TABLE2) + len(evaluate.TABLE3) - (name != "taste")


@pytest.mark.parametrize("name", evaluate.MODEL_METRICS)
def test_metrics_one_by_one(evaluate_, folder, tiny_judges, name):
    code, out, _ = evaluate_(folder, "--weights", tiny_judges, "--judges", "none", "--metrics", name)
    assert code == 0 and out.count("not asked for") == len(evaluate.TABLE2) + len(evaluate.TABLE3) - 1


def test_a_judge_of_ones_own(evaluate_, folder, tmp_path, monkeypatch):
    """As judges.py says: a class with two methods and a line in JUDGES; here with a report as well."""
    class Bright:
        name = "bright"

        def __init__(self, device, weights=None):
            pass

        def encode(self, prompts):
            return torch.arange(len(prompts))

        def __call__(self, images, text, t=None):
            return images.mean((1, 2, 3)) + text

        def report(self, images, prompts):
            return {"contrast": images.flatten(1).std(1)}
    monkeypatch.setitem(evaluate.JUDGES, "bright", Bright)
    code, out, err = evaluate_(folder, "--judges", "bright", "--metrics", "none")
    assert code == 0 and "| bright ↑ | contrast ↑ |" in out, err
    scores = table(tmp_path / "out/theirs/scores.csv")
    assert float(scores[2]["bright"]) == pytest.approx(picture(1, 0).mean() / 255 + 1, rel=1e-5) and "contrast" in scores[0]


def test_a_run_and_its_original(evaluate_, run, tmp_path, monkeypatch):
    code, out, err = evaluate_(run, "--judges", "taste", "--metrics", "rmse", "entropy_1d", "--images_per_prompt", 2)
    assert code == 0, err
    home = tmp_path / "out"
    assert "| micro (original) |" in out and "| micro-js |" in out and "**" in out
    assert len(table(home / "micro-js" / "scores.csv")) == 4 and len(table(home / "micro" / "pairs.csv")) == 2
    # the seeds are shared, the prompts are the run's held-out ones, and the images are those of generate()
    config = json.load(open(os.path.join(run, "config.json")))
    assert [r["prompt"] for r in table(home / "micro" / "scores.csv")][::2] == config["held_out"] and len(config["held_out"]) == 2
    pipe = sample.load_pipeline(config["args"]["model"])
    want = [sample.generate(pipe, [config["held_out"][1]], [evaluate.seed_of(1, 1)], 2)[0]]
    sample.load_lora(pipe.unet, run)
    want.append(sample.generate(pipe, [config["held_out"][1]], [evaluate.seed_of(1, 1)], 2)[0])
    got = [np.asarray(Image.open(home / m / "images" / "00001_1.png")).astype(int) for m in ("micro", "micro-js")]
    for w, g in zip(want, got):
        assert np.abs(np.asarray(sample.to_pil(w)).astype(int) - g).max() <= 1
    assert np.abs(got[0] - got[1]).max() > 1

    # a second call computes nothing: neither model nor judge nor metric is touched
    def never(*_, **__):
        raise AssertionError("computed again")
    stamp = (home / "micro-js" / "scores.csv").stat().st_mtime_ns
    with monkeypatch.context() as m:
        for name in ("load_pipeline", "load_judge", "generate", "rmse", "entropy_1d", "metric_parts", "read_image"):
            m.setattr(evaluate, name, never)
        code, again, err = evaluate_(run, "--judges", "taste", "--metrics", "rmse", "entropy_1d", "--images_per_prompt", 2)
    assert code == 0 and (home / "micro-js" / "scores.csv").stat().st_mtime_ns == stamp
    assert again.split("### ")[1:2] == out.split("### ")[1:2]

    # another metric and one more image a prompt: only what is missing
    painted = []
    real = evaluate.generate
    with monkeypatch.context() as m:
        m.setattr(evaluate, "generate", lambda pipe, prompts, *a, **k: painted.extend(prompts) or real(pipe, prompts, *a, **k))
        code, _, err = evaluate_(run, "--judges", "none", "--metrics", "psnr", "--images_per_prompt", 3)
    assert code == 0 and len(painted) == 2 * 2, err
    assert len(table(home / "micro" / "pairs.csv")) == 6


def test_other_settings_are_refused(evaluate_, run, tmp_path):
    flags = ["--judges", "taste", "--metrics", "none", "--images_per_prompt", 1]
    assert evaluate_(run, *flags)[0] == 0
    code, _, err = evaluate_(run, *flags, "--guidance_scale", 2)
    assert code == 2 and "guidance_scale 5.0, now 2.0" in err and "another --output_dir" in err and err.count("\n") == 1
    other = tmp_path / "p.txt"
    other.write_text("a moon\na sun")
    code, _, err = evaluate_(run, *flags, "--prompts", other)
    assert code == 2 and "prompt 0 was" in err
    copy = tmp_path / "copy" / "micro-js"
    shutil.copytree(run, copy)
    state = sample.lora_state(pipe_with(copy).unet)
    from safetensors.torch import save_file
    save_file({k: v + 1 for k, v in state.items()}, copy / LORA_FILE)
    code, _, err = evaluate_(copy, *flags)
    assert code == 2 and "another lora" in err


def pipe_with(run):
    pipe = sample.load_pipeline(json.load(open(os.path.join(run, "config.json")))["args"]["model"])
    sample.load_lora(pipe.unet, str(run))
    return pipe


def test_loras_and_models(evaluate_, run, micro, prompts_file, tmp_path):
    flags = ["--judges", "taste", "--metrics", "none", "--images_per_prompt", 1, "--num_prompts", 2, "--prompts", prompts_file]
    lone = tmp_path / "mine.safetensors"
    shutil.copy(os.path.join(run, LORA_FILE), lone)
    bare = tmp_path / "bare"
    bare.mkdir()
    shutil.copy(lone, bare / LORA_FILE)
    code, out, err = evaluate_(lone, bare, micro, *flags, "--model", micro)
    assert code == 0, err
    assert out.count("| micro (original) |") == 2 and "| mine |" in out and "| bare |" in out
    assert table(tmp_path / "out/mine/scores.csv")[0]["taste"] == table(tmp_path / "out/bare/scores.csv")[0]["taste"]


ONE_THREAD = {**os.environ, "OMP_NUM_THREADS": "1"}  # as the tests have it: other numbers of threads paint other last bits


def test_a_killed_call_goes_on(run, tmp_path, evaluate_):
    """Killed while it paints and while it scores; what was there stays, the end is the same."""
    flags = [run, "--judges", "taste", "--metrics", "rmse", "--images_per_prompt", 2]
    assert evaluate_(*flags)[0] == 0
    want = (tmp_path / "out/table3.md").read_text(), (tmp_path / "out/micro-js/pairs.csv").read_text()
    home = tmp_path / "killed"
    argv = [sys.executable, "-c", "import sys, os; sys.path.insert(0, sys.argv[1]); import evaluate, sample\n"
            "real, left = evaluate.write_png, [3]\n"
            "def write(*a):\n    left[0] -= 1\n    real(*a) if left[0] else os.kill(os.getpid(), 9)\n"
            "evaluate.write_png = write\nsys.argv = ['evaluate.py', *sys.argv[2:]]\nsample.run_cli(evaluate.main)", ROOT,
            *map(str, [*flags, "--output_dir", home, *SMALL])]
    assert subprocess.run(argv, capture_output=True, env=ONE_THREAD).returncode == -9
    painted = {f: (home / "micro/images" / f).stat().st_mtime_ns for f in os.listdir(home / "micro/images") if f.endswith(".png")}
    assert len(painted) == 2
    code = argv[2].replace("write_png", "save_scores").replace("left = evaluate.save_scores, [3]", "left = evaluate.save_scores, [2]")
    assert subprocess.run([*argv[:2], code, *argv[3:]], capture_output=True, env=ONE_THREAD).returncode == -9
    assert all((home / "micro/images" / f).stat().st_mtime_ns == t for f, t in painted.items())
    done = subprocess.run([sys.executable, os.path.join(ROOT, "evaluate.py"), *argv[4:]], capture_output=True, text=True, env=ONE_THREAD)
    assert done.returncode == 0, done.stderr
    assert ((home / "table3.md").read_text().replace(str(home), str(tmp_path / "out")), (home / "micro-js/pairs.csv").read_text()) == want


def test_changed_images_are_scored_again(evaluate_, folder, tmp_path):
    flags = [folder, "--judges", "taste", "--metrics", "rmse", "entropy_1d"]
    assert evaluate_(*flags)[0] == 0
    before = table(tmp_path / "out/theirs/pairs.csv")
    Image.fromarray(picture(9, 9)).save(folder / "1_1.png")
    assert evaluate_(*flags)[0] == 0
    after = table(tmp_path / "out/theirs/pairs.csv")
    assert [x["rmse"] != y["rmse"] for x, y in zip(before, after)] == [False, True, False]
    assert float(after[1]["rmse"]) == evaluate.rmse(picture(1, 0), picture(9, 9))


def test_fewer_images_or_prompts_for_once_lose_nothing(evaluate_, folder, tmp_path, monkeypatch):
    flags = [folder, "--judges", "taste", "--metrics", "rmse"]
    assert evaluate_(*flags)[0] == 0
    files = [tmp_path / "out/theirs" / f for f in ("scores.csv", "pairs.csv")]
    before = [table(f) for f in files]
    assert evaluate_(*flags, "--num_prompts", 2)[0] == 0 and "2 prompts x 2 images" in (tmp_path / "out/table3.md").read_text()
    assert evaluate_(folder, "--judges", "taste", "--metrics", "entropy_1d", "--num_prompts", 1, "--images_per_prompt", 1)[0] == 0
    monkeypatch.setattr(evaluate, "load_judge", None)
    monkeypatch.setattr(evaluate, "rmse", None)
    assert evaluate_(*flags)[0] == 0
    after = [table(f) for f in files]
    assert after[1] == before[1] and [{k: r[k] for k in before[0][0]} for r in after[0]] == before[0]
    assert [bool(r["entropy_1d"]) for r in after[0]] == [True] + [False] * 5


def test_two_folders_of_other_sizes(evaluate_, folder, tmp_path):
    more = shutil.copytree(folder, tmp_path / "more")
    for p in range(3):
        Image.fromarray(picture(p, 2)).save(more / f"{p}_2.png")
    flags = ["--judges", "taste", "--metrics", "rmse"]
    assert evaluate_(folder, more, *flags)[0] == 0  # the smaller K is what both have
    assert len(table(tmp_path / "out/more/pairs.csv")) == 3
    code, _, err = evaluate_(more, folder, *flags)
    assert code == 2 and "has 2 images, not 3" in err and "--images_per_prompt 2" in err
    (more / "prompts.txt").write_text("\n".join(PROMPTS[::-1]))
    code, _, err = evaluate_(folder, more, *flags, "--prompts", folder / "prompts.txt")
    assert code == 2 and "does not match the prompts in use: prompt 0" in err and err.count("\n") == 1


def test_output_among_the_images(evaluate_, folder):
    code, _, err = evaluate_(folder, "--judges", "taste", "--metrics", "rmse", "--output_dir", folder / "out")
    assert code == 2 and "lies in the folder of images" in err and not (folder / "out").exists()


def test_prompts_with_commas_quotes_and_other_scripts(evaluate_, folder, tmp_path):
    prompts = ['a "red", blue thing', "солнце, 太陽 ☀", "a cat; a 'dog'"]
    (folder / "prompts.txt").write_text("\n".join(prompts), encoding="utf-8")
    for _ in range(2):
        assert evaluate_(folder, "--judges", "taste", "--metrics", "none")[0] == 0
        assert [r["prompt"] for r in table(tmp_path / "out/theirs/scores.csv")][::2] == prompts
    line = next(x for x in (tmp_path / "out/table2.md").read_text().splitlines() if x.startswith("| theirs |"))
    assert line.split("|")[3].strip() == "-"  # prompt following: nothing is named that the toy's checker knows


@pytest.mark.parametrize("layout", ["{p:05d}_{k}.png", "{p}/{k}.png"])
def test_layouts(evaluate_, tmp_path, layout):
    for p in range(2):
        for k in range(2):
            path = tmp_path / "m" / layout.format(p=p, k=k)
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(picture(p, k)).save(path)
    assert evaluate_(tmp_path / "m", "--judges", "none", "--metrics", "rmse")[0] == 0
    assert [(r["prompt_index"], r["image_1"], r["image_2"]) for r in table(tmp_path / "out/m/pairs.csv")] == [("0", "0", "1"), ("1", "0", "1")]


def test_one_image_a_prompt(evaluate_, tmp_path):
    (tmp_path / "m").mkdir()
    for p in range(2):
        Image.fromarray(picture(p, 0)).save(tmp_path / "m" / f"{p}.png")
    code, _, err = evaluate_(tmp_path / "m", "--judges", "taste", "--metrics", "rmse")
    assert code == 2 and "needs two" in err and "--metrics entropy_1d entropy_2d" in err
    assert evaluate_(tmp_path / "m", "--judges", "taste", "--metrics", "entropy_1d")[0] == 0


def test_a_black_image_is_counted(evaluate_, folder, tmp_path):
    Image.fromarray(np.zeros((32, 32, 3), np.uint8)).save(folder / "2_1.png")
    Image.fromarray(picture(0, 0)).save(folder / "0_1.png")  # and a pair of identical images
    code, out, err = evaluate_(folder, "--judges", "taste", "--metrics", "fsim", "psnr")
    assert code == 0, err
    assert "fsim of theirs: 1 of 3 values are nan, such as that of 2_0.png and 2_1.png" in out
    assert "psnr of theirs: 1 of 3 values are inf, such as that of 0_0.png and 0_1.png" in out
    summary = {r["metric"]: r for r in table(tmp_path / "out/summary.csv")}
    assert summary["fsim"]["left_out"] == "1" and summary["fsim"]["prompts"] == "2" and math.isfinite(float(summary["fsim"]["mean"]))


def test_missing_weights_are_a_visible_cell(evaluate_, folder, tmp_path):
    empty = tmp_path / "w"
    empty.mkdir()
    code, out, err = evaluate_(folder, "--weights", empty)
    assert code == 0, err  # nobody named them: the rest is done, the cells say why not
    for name in (*evaluate.TABLE2, "lpips", "clip_i"):
        assert f"{name}: " in out
    assert out.count("is not there") == 8 and "hf download xswu/HPSv2 HPS_v2_compressed.pt --local-dir" in out and f"--weights {empty}" in out
    assert "0.0" in (tmp_path / "out/table3.md").read_text()
    code, out, err = evaluate_(folder, "--weights", empty, "--judges", "taste,hps", "--metrics", "rmse")
    assert code == 2 and err.splitlines()[-1].startswith("evaluate.py: asked for, but not run: hps;")
    assert (tmp_path / "out/theirs/pairs.csv").exists()
    code, out, _ = evaluate_(folder, "--judges", "pickscore", "--metrics", "none")  # the hub, out of reach
    assert code == 2 and "the hub is out of reach: hf download" in out


BAD = [
    (lambda f: [os.remove(f / x) for x in os.listdir(f)], [], "no images in"),
    (lambda f: (f / "1_1.png").write_bytes((f / "1_1.png").read_bytes()[:60]), [], "1 of 6 files are not whole images P_K.png, such as"),
    (lambda f: (f / "1_1.png").write_text("not an image"), [], "1 of 6 files"),
    (lambda f: (f / "cat.gif").write_text("x"), [], "1 of 7 files"),
    (lambda f: Image.fromarray(picture(1, 1, 30)).save(f / "1_1.png"), [], "must be of one size"),
    (lambda f: os.remove(f / "1_1.png"), [], "prompt 1 has 1 images, not 2"),
    (lambda f: Image.fromarray(picture(1, 1)).save(f / "7_0.png"), [], "images of prompt 7, but there are 3 prompts"),
    (lambda f: (f / "prompts.txt").write_text("a\nb\nc\nd"), [], "no image of 1 of the 4 prompts, such as prompt 3"),
    (lambda f: (f / "prompts.txt").write_text(""), [], "is empty"),
    (lambda f: os.remove(f / "prompts.txt"), ["--judges", "clipscore"], "needs the prompts"),
    (lambda f: Image.fromarray(picture(1, 1)).save(f / "1_1.jpg"), [], "are both image 1 of prompt 1"),
    (lambda f: [Image.fromarray(picture(0, k, 30)).save(f / f"0_{k}.png") for k in range(2)], ["--metrics", "rmse", "lpips"], "lpips needs 31 pixels"),
    (lambda f: None, ["--images_per_prompt", 3], "has 2 images, not 3"),
    (lambda f: None, ["--images_per_prompt", 0], "--images_per_prompt must lie"),
    (lambda f: None, ["--images_per_prompt", 1], "needs two"),
    (lambda f: None, ["--judges", "mother"], "unknown 'mother'"), (lambda f: None, ["--metrics", "fid"], "unknown 'fid'"),
    (lambda f: None, ["--metrics", "none", "--judges", "none"], "nothing to compute"),
    (lambda f: None, ["--weights", "nowhere", "--judges", "hps"], "no weights folder"),
    (lambda f: None, ["--device", "abacus"], "unknown device"), (lambda f: None, ["--batch_size", 0], "--batch_size"),
    (lambda f: None, ["--prompts", "hpdv2"], "HPDv2 test prompts cannot be had"), (lambda f: None, ["--prompts", "nowhere.txt"], "cannot read prompts file"),
]


@pytest.mark.parametrize("spoil, flags, words", BAD, ids=lambda v: v if isinstance(v, str) else None)
def test_bad_input(evaluate_, folder, tmp_path, spoil, flags, words):
    spoil(folder)
    defaults = {"--judges": ["taste"], "--metrics": ["rmse"]}
    more = [x for k, v in defaults.items() if k not in flags for x in (k, *v)]
    code, _, err = evaluate_(folder, *flags, *more)
    assert code == 2 and words in err and err.count("\n") == 1 and "Traceback" not in err, err
    assert not (tmp_path / "out" / "theirs" / "scores.csv").exists()


def test_skip_bad_scores_the_rest(evaluate_, folder, tmp_path):
    (folder / "1_1.png").write_bytes(b"\x89PNG broken")
    (folder / "grid.bmp").write_text("x")
    code, out, err = evaluate_(folder, "--judges", "taste", "--metrics", "rmse", "--skip_bad")
    assert code == 0 and "2 files were no whole images and were skipped" in out, err
    assert len(table(tmp_path / "out/theirs/scores.csv")) == 5 and len(table(tmp_path / "out/theirs/pairs.csv")) == 2


@pytest.mark.parametrize("target, words", [("nowhere", "nothing to score"), ("./nowhere/at", "nothing to score"), (".", "no images in")])
def test_targets(evaluate_, tmp_path, monkeypatch, target, words):
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path / "empty")
    code, _, err = evaluate_(target, "--judges", "taste", "--metrics", "none")
    assert code == 2 and words in err and err.count("\n") == 1


def test_broken_runs(evaluate_, run, tmp_path):
    flags = ["--judges", "taste", "--metrics", "none", "--images_per_prompt", 1]
    copy = shutil.copytree(run, tmp_path / "r")
    os.remove(copy / LORA_FILE)
    code, _, err = evaluate_(copy, *flags)
    assert code == 2 and f"has no {LORA_FILE}" in err
    (copy / "config.json").write_text("{")
    code, _, err = evaluate_(copy, *flags)
    assert code == 2 and "not that of a run" in err
    out = tmp_path / "out" / "micro-js"
    assert evaluate_(run, *flags)[0] == 0
    (out / "scores.csv").write_text("prompt_index,image\nx,y\n")
    code, _, err = evaluate_(run, *flags)
    assert code == 2 and "delete it, and it is computed again" in err


def test_the_papers_prompts_are_hpdv2s_json(evaluate_, folder, tmp_path, tiny_judges):
    w = tmp_path / "w" / "HPDv2"
    w.mkdir(parents=True)
    (w / "test.json").write_text(json.dumps([{"prompt": p, "image_path": ["a.jpg"], "rank": [1]} for p in PROMPTS]))
    os.remove(folder / "prompts.txt")
    assert evaluate_(folder, "--judges", "taste", "--metrics", "none", "--prompts", "hpdv2", "--weights", w.parent)[0] == 0
    assert [r["prompt"] for r in table(tmp_path / "out/theirs/scores.csv")][::2] == PROMPTS


def test_best_is_bold_the_right_way_round():
    rows = [evaluate.Row(x, None, None) for x in "ab"]
    results = {(x, "psnr"): dict(mean=m, sd=1., se=.5, prompts=4, left_out=0, of=4, example=None) for x, m in (("a", 30.), ("b", 32.))}
    text = evaluate.make_table("t", {"psnr": evaluate.TABLE3["psnr"]}, rows, results, {}, False)
    assert "| a | **30.00 ± 1.00** (0.50) |" in text and "| b | 32.00 ± 1.00 (0.50) |" in text and "PSNR ↓" in text


def test_train_and_evaluate_hold_out_the_same(micro):
    a, b = evaluate.hold_out(toy.prompts(), 40)
    args = train.parse(["--model", "toy"])[0]
    assert train.split_prompts(args) == (a, b) and len(b) == 40 and not set(a) & set(b)


def test_golden_files_say_where_they_come_from():
    for name in os.listdir(os.path.join(ROOT, "tests", "golden")):
        assert golden(name)["provenance"]["date"]
