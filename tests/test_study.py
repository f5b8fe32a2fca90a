"""The study: its statistics against scipy and closed forms, its runs from end to end."""

import csv
import itertools
import json
import shutil
import sys

import numpy as np
import pytest
import test_house
from scipy import stats as scipy_stats

import study
from parts import stats
from parts.stats import Outcome

RNG = np.random.default_rng
EPOCHS = (0, 3, 6)


# ---- statistics


def test_interval_is_students():
    values = RNG(0).normal(1, 2, size=6)
    sem = scipy_stats.sem(values)
    for level in (0.9, 0.95):
        low, high = scipy_stats.t.interval(level, 5, loc=values.mean(), scale=sem)
        found = stats.interval(values, level)
        assert np.allclose(found[:3], (values.mean(), low, high))
    assert found.p == pytest.approx(2 * scipy_stats.t.sf(abs(values.mean()) / sem, 5))
    assert str(stats.Interval(1, -0.5, 2.25, 0)) == "+1 [-0.5, +2.25]"
    assert stats.interval([0.0, 0.0]) == (0, 0, 0, 1) and stats.interval([2.0, 2.0]).p == 0
    one = stats.interval([2.0])
    assert one.mean == 2 and np.isnan(one[1:]).all()


def test_interval_covers_nothing_too_often():
    draws = RNG(1).normal(size=(1000, 6))
    assert 29 <= sum(stats.interval(values).p <= 0.05 for values in draws) <= 74


@pytest.mark.parametrize("n, expected", [(3, 3.3), (5, 1.7), (6, 1.4)])
def test_detectable_difference(n, expected):
    size = stats.detectable(n)
    assert size == pytest.approx(expected, abs=0.06)
    # scipy's noncentral t, which adds the (tiny) other tail
    limit = scipy_stats.t.ppf(0.975, n - 1)
    assert scipy_stats.nct.sf(limit, n - 1, size * np.sqrt(n)) == pytest.approx(0.8, abs=1e-4)
    assert np.isnan(stats.detectable(1))


def every_table(table):
    """The variance of the rows' means of each relabelling, one loop at a time."""
    k, n = table.shape
    for orders in itertools.product(itertools.permutations(range(k)), repeat=n - 1):
        columns = [table[:, 0], *(table[list(o), j + 1] for j, o in enumerate(orders))]
        yield np.stack(columns, 1).mean(1).var()


@pytest.mark.parametrize("shape", [(2, 5), (3, 4), (4, 3)])
def test_permutation_test_is_exact(shape):
    table = RNG(2).normal(size=shape) + np.arange(shape[0])[:, None] / 2
    variances = np.array(list(every_table(table)))
    p, least = stats.permutation_test(table)
    assert p == pytest.approx(np.mean(variances >= table.mean(1).var() - 1e-12))
    assert least == 1 / len(variances)


def test_permutation_test_of_the_study():
    seeds = RNG(3).normal(size=6)
    no_effect = seeds + 0.1 * RNG(4).normal(size=(3, 6))
    effect = no_effect + np.array([[0], [1], [2]])
    assert stats.permutation_test(effect) == (1 / 7776, 1 / 7776)
    assert stats.permutation_test(no_effect)[0] > 0.05
    p, least = stats.permutation_test(RNG(5).normal(size=(7, 3)) + 9 * np.arange(7)[:, None])
    assert (p, least) == (1 / 10_000, 1 / 10_000)  # 5040^2 tables: drawn


@pytest.mark.parametrize("shape, draws", [((3, 4), None), ((7, 3), 199)])
def test_permutation_test_gives_no_false_alarm_too_often(shape, draws):
    """Blocks of very different levels do not matter."""
    alarms = 0
    for seed in range(1000):
        rng = RNG((6, seed))
        table = rng.normal(size=shape) + 100 * rng.normal(size=shape[1])
        p, _ = stats.permutation_test(table, **({"draws": draws} if draws else {}))
        alarms += p <= 0.05
    assert 29 <= alarms <= 74


def test_deviations():
    row, seed = np.array([0.0, 1, 5]), np.array([3.0, -2, 1, 0])
    exact = stats.deviations(row[:, None] + seed)
    assert np.allclose(exact, (row.std(ddof=1), seed.std(ddof=1), 0))
    squares = []
    for i in range(400):
        rng = RNG((7, i))
        table = 2 * rng.normal(size=(8, 1)) + 3 * rng.normal(size=8) + rng.normal(size=(8, 8))
        squares.append(np.square(stats.deviations(table)))
    assert np.allclose(np.mean(squares, 0), (4, 9, 1), rtol=0.15)


def test_holm():
    assert np.allclose(stats.holm([0.01, 0.04, 0.03, 0.005]), [0.03, 0.06, 0.06, 0.02])
    assert np.allclose(stats.holm([0.5, 0.9]), [1, 1]) and len(stats.holm([])) == 0


# ---- verdicts, on made-up runs


def made_up(rows, seeds=6, noise=0.01, **slopes):
    """A setting's runs: {div: gain in taste}; other metrics move by slopes[metric] times the gain,
    or by slopes[metric](div, gain)."""
    runs = {}
    for div, gain in rows.items():
        for seed in range(seeds):
            rng = RNG((sum(map(ord, div)), seed))
            metrics = {}
            for metric in ("taste", "prompt following", *stats.DIVERSITY):
                move = {"taste": 1}.get(metric, slopes.get(metric.replace(" ", "_"), 0))
                end = move(div, gain) if callable(move) else move * gain
                end += noise * (rng.normal() + RNG((9, seed)).normal())
                metrics[metric] = np.array([[1 + end * e / EPOCHS[-1]] * 4 for e in EPOCHS])
            runs.setdefault(div, {})[str(seed)] = metrics
    return Outcome(runs)


def verdict(rule, outcome):
    holds, fails, _ = rule(outcome)
    assert not (holds and fails)
    return "holds" if holds else "fails" if fails else "cannot be told"


ROWS = {"rkl": 5.0, "fkl": 4.0, "js": 6.0}


@pytest.mark.parametrize(
    "rule, rows, slopes, expected",
    [
        (stats.c1, ROWS, {}, "holds"),
        (stats.c1, ROWS | {"fkl": -1.0}, {}, "fails"),
        (stats.c1, ROWS | {"fkl": 0.0}, {}, "cannot be told"),
        (stats.c2, ROWS, {"prompt_following": lambda d, _: 0.015 * (d == "rkl")}, "cannot be told"),
        (stats.c2, ROWS, {"prompt_following": lambda d, _: 0.1 * (d == "js")}, "fails"),
        (stats.c3, ROWS, {}, "holds"),
        (stats.c3, ROWS | {"js": 5.0}, {}, "cannot be told"),
        (stats.c3, ROWS | {"js": 4.5}, {}, "fails"),
        (stats.c3, dict.fromkeys(ROWS, 5.0), {}, "fails"),
        (stats.c4, ROWS, {"rmse": 1, "ssim": -1, "entropy_1d": 1, "entropy_2d": 1}, "holds"),
        (stats.c4, ROWS, {"rmse": 1, "ssim": 1, "entropy_1d": 1, "entropy_2d": 1}, "fails"),
        (stats.c5, ROWS, {"rmse": -1, "fsim": -1}, "holds"),
        (stats.c5, ROWS, {"rmse": 1, "fsim": -1}, "fails"),
        (stats.c5, ROWS, {m: -s for m, s in stats.DIVERSITY.items()}, "fails"),
        (stats.c6, ROWS, {"rmse": 1, "psnr": -1, "ssim": -1, "fsim": -1}, "holds"),
        (stats.c6, ROWS, {"rmse": -1, "psnr": 1, "ssim": 1, "fsim": 0}, "fails"),
    ],
)
def test_verdicts(rule, rows, slopes, expected):
    assert verdict(rule, made_up(rows, **slopes)) == expected


def test_prompt_following_may_hold():
    slopes = {"prompt_following": lambda div, _: 0.01 * (div == "rkl")}
    assert verdict(stats.c2, made_up(ROWS, noise=0.001, **slopes)) == "holds"


def test_one_seed_tells_nothing_and_missing_rows_are_said():
    text = stats.verdicts(made_up(ROWS, seeds=1))
    assert text.count("cannot be told") == 6
    text = stats.verdicts(made_up({"rkl": 5.0, "fkl": 4.0}))
    assert "'js' is not there" in text


@pytest.mark.filterwarnings("ignore:.*:RuntimeWarning")
def test_a_policy_that_paints_one_picture_has_no_psnr(tmp_path):
    """Its run is in the table all the same, and the report says nothing of what is not there."""
    table = tmp_path / "runs.csv"
    for div in ("rkl", "js"):
        for seed in ("0", "1"):
            folder = tmp_path / f"{div}{seed}"
            folder.mkdir()
            values = {"taste": [1.0, 2.0], **{metric: [0.5, 0.25] for metric in stats.DIVERSITY}}
            later = {metric: [3.0 + float(seed), 4.0] for metric in values}
            if div == "js":
                del later["psnr"]
            lines = [dict(kind="eval", epoch=e, values=v) for e, v in ((0, values), (3, later))]
            text = "".join(json.dumps(line) + "\n" for line in lines)
            (folder / "metrics.jsonl").write_text(text)
            spec = study.Spec("published", div, seed, "digest", "", folder)
            study.add_rows(spec, table, "digest")
    assert len(study.read_table(table)) == 5 * 7 * 2
    text = stats.report(study.read_outcomes(table), study.SETTINGS, "")
    assert "| js | 2 | +2.25" in text and text.count("rkl, js x 2 seeds") == 1


@pytest.mark.filterwarnings("ignore:.*:RuntimeWarning")
def test_rows_without_a_common_seed_tell_nothing():
    runs = made_up({"rkl": 5.0, "js": 6.0}, seeds=1).runs
    text = stats.report(
        {"published": Outcome(runs | {"js": {"1": runs["js"]["0"]}})}, study.SETTINGS, ""
    )
    assert text.count("cannot be told") == 6 and "rkl, js x 0 seeds: p nan" in text


def test_equal_taste_interpolates_the_first_crossing():
    assert stats.at_level(3, [1, 2, 4, 3], [0, 3, 6, 9]) == 4.5
    assert stats.at_level(3, [1, 5, 2, 6], [0, 3, 6, 9]) == 1.5
    # along straight paths the value at a level of taste is the same, however fast the row
    o = made_up({"rkl": 5.0, "js": 10.0}, noise=0, rmse=-0.1, fsim=lambda d, g: g * (d == "js"))
    head, _, titles, _, rkl, js, *_ = stats.at_equal_taste(o, 0.5).splitlines()
    assert "first reaches 3.5" in head and titles.startswith("| row | seeds | rmse | psnr |")
    cells = [cell.strip() for cell in rkl.split("|")]
    assert cells[1:4] == ["rkl", "6", "0.75"]
    cells = [cell.strip() for cell in js.split("|")]
    assert abs(float(cells[3].split()[0])) < 1e-12
    assert cells[6].startswith("+2.5 [")
    assert "never rose" in stats.at_equal_taste(made_up({"rkl": 5.0, "js": -1.0}), 0.9)


def test_four_tests_are_named_beforehand():
    outcomes = {setting: made_up(ROWS) for setting in study.SETTINGS}
    lines = stats.named_tests(outcomes).splitlines()[2:]
    assert [line.split("|")[1].strip() for line in lines] == [
        "rkl, fkl, js are one (matched, 6 seeds)",
        "js is rkl (matched, 6 seeds)",
        "rkl, fkl, js are one (ratios_matched, 6 seeds)",
        "js is rkl (ratios_matched, 6 seeds)",
    ]
    assert lines[0].split("|")[3].strip() == f"{1 / 7776:.2g}"


# ---- the plan and the table


def test_the_digest_is_of_all_that_train_imports():
    files, new = set(), ["train"]
    while new:
        name = new.pop()
        files.add(name)
        new += test_house.GRAPH[name] - files
    listed = {test_house.module_name(path) for path in study.files_of_a_run()}
    assert files <= listed and "parts.stats" not in listed


def test_a_run_of_other_pairs_is_another_run(monkeypatch):
    digests = set()
    for pairs in ([], ["--pairs", "one"], ["--pairs", "two"]):
        monkeypatch.setattr(sys, "argv", ["study.py", *pairs])
        digests.add(study.parse_args().digest)
    assert len(digests) == 3


def test_the_toys_plan(command):
    code, out, err = command("study.py", "--dry_run")
    assert code == 0, err
    lines = [line for line in out.splitlines() if "train.py" in line]
    assert out.startswith("84 runs of toy, 0 finished") and len(lines) == 84
    assert len(set(lines)) == 84 and sum("--match_curvature" in line for line in lines) == 15
    assert sum("--beta 0.0390625 " in line for line in lines) == 36  # 10/256
    assert all("--seed 0" in line for line in lines[:20])


def test_a_matched_setting_shares_the_runs_of_rows_of_curvature_one():
    assert study.where_run("matched", "rkl") == study.where_run("published", "rkl")
    alpha = ("published", "--div alpha --alpha 0.4")
    assert study.where_run("matched", "alpha0.4") == alpha
    assert study.where_run("matched", "js") == ("matched", "--div js --match_curvature")
    assert study.where_run("pairs", "rkl") == ("pairs", "--div rkl --pairs PAIRS")


def write_made_up_table(folder, rows, seeds=2):
    outcome, lines = made_up(rows, seeds), {}
    for div, of_seeds in outcome.runs.items():
        for seed, metrics in of_seeds.items():
            for metric, path in metrics.items():
                for epoch, values in zip(EPOCHS, path):
                    key = ("published", div, seed) if epoch else ("published", "original", "")
                    for p, value in enumerate(values):
                        line = (*key, str(epoch), metric, str(p))
                        lines[line] = (*line, f"{value:.6g}", "d1")
    folder.mkdir()
    study.common.write_csv(folder / "runs.csv", study.Row._fields, lines.values())
    return outcome


def test_report_reads_the_table_alone(command, tmp_path):
    written = write_made_up_table(tmp_path / "s", ROWS | {"alpha0.4": 5.5})
    outcomes = study.read_outcomes(tmp_path / "s" / "runs.csv")
    assert outcomes["published"].runs.keys() == {"rkl", "fkl", "js", "alpha0.4"}
    assert outcomes["matched"].runs.keys() == {"rkl", "fkl", "alpha0.4"}  # js was not run there
    for div in ROWS:
        table = outcomes["published"].table("rmse", [div])
        assert np.allclose(table, written.table("rmse", [div]), rtol=1e-5)
    flags = ["--report", "--settings", "published", "--output_dir", tmp_path / "s"]
    code, out, err = command("study.py", *flags)
    assert code == 0, err
    assert "of 21 runs, are the seeds published alpha0.2 (0 1 2), published alpha0.6" in out
    assert "published rkl (2)" in out and "| rkl | 2 | +" in out
    assert (tmp_path / "s" / "study.md").read_text() in out
    assert (tmp_path / "s" / "study.png").stat().st_size > 10_000


BAD = [
    (["--div", "nosuch"], "--div nosuch: unknown divergence"),
    (["--div", "alpha7"], "alpha must lie strictly between 0 and 1"),
    (["--div", "alpha1.2.3"], "could not convert string to float"),
    (["--div", "alphabet"], "unknown divergence 'alphabet'"),
    (["--settings", "nosuch"], "invalid choice: 'nosuch'"),
    (["--jobs", "-1"], "--jobs must lie in [0, inf)"),
    (["--report"], "no finished run in"),
    (["--model", "MICRO", "--settings", "pairs"], "needs preference pairs: --pairs DIR"),
]


@pytest.mark.parametrize("flags, message", BAD, ids=[" ".join(flags) for flags, _ in BAD])
def test_bad_input_is_one_line(command, micro, flags, message):
    code, _, err = command("study.py", *[micro if f == "MICRO" else f for f in flags])
    assert code == 2 and message in err and len(err.strip().splitlines()) == 1


def test_a_table_of_other_code_is_refused(command, tmp_path):
    write_made_up_table(tmp_path / "s", ROWS)
    code, _, err = command("study.py", "--output_dir", tmp_path / "s")
    assert code == 2 and "is of other code or flags: check out the commit" in err


# ---- from end to end


@pytest.fixture
def tiny_study(micro, small_run, tmp_path):
    """Flags of a study of the micro model, which has a judge of its own as the toy has."""
    model = shutil.copytree(micro, tmp_path / "model")
    (model / "train.json").write_text(json.dumps({"judge": "taste"}))
    extra = small_run[small_run.index("--prompts") :]
    extra = [str(word) for word in extra[: extra.index("--device")]]
    flags = ["--model", model, "--output_dir", tmp_path / "s", "--eval_interval", 1]
    return [*flags, "--device", "cpu", "--seeds", 0, "--settings", "matched", "--"] + extra


def test_a_study_of_two_runs(command, tiny_study, tmp_path):
    code, out, err = command("study.py", "--div", "rkl", "js", *tiny_study)
    assert code == 0, err
    assert out.startswith("2 runs of ") and "2/2 " in out
    with open(tmp_path / "s" / "runs.csv") as file:
        rows = list(csv.DictReader(file))
    runs = {(row["setting"], row["div"], row["seed"], row["epoch"]) for row in rows}
    assert runs == {
        ("published", "original", "", "0"),
        ("published", "rkl", "0", "1"),  # matched is published for reverse KL
        ("matched", "original", "", "0"),
        ("matched", "js", "0", "1"),
    }
    (folder,) = (tmp_path / "s" / "runs").glob("*/matched-js-0")
    logged = [json.loads(line) for line in open(folder / "metrics.jsonl")]
    logged = next(r["values"] for r in logged if r["kind"] == "eval" and r["epoch"] == 1)
    found = [float(r["value"]) for r in rows if r["div"] == "js" and r["metric"] == "rmse"]
    assert np.allclose(found, logged["rmse"], rtol=1e-5) and len(found) == 2
    assert "| rkl - js | 1 |" in out  # in `matched`, with rkl's run from `published`
    # nothing is run again, on another machine neither
    shutil.rmtree(tmp_path / "s" / "runs")
    before = (tmp_path / "s" / "runs.csv").read_bytes()
    code, out, _ = command("study.py", "--div", "rkl", "js", *tiny_study)
    assert code == 0 and "/model, 2 finished." in out and "hours left" not in out
    assert (tmp_path / "s" / "runs.csv").read_bytes() == before


def test_a_failed_run_is_said_and_the_others_go_on(command, tiny_study, tmp_path):
    _, out, _ = command("study.py", "--dry_run", "--div", "rkl", "fkl", *tiny_study)
    first = out.split("--output_dir ")[1].split()[0]
    study.common.make_folder(first)
    with open(f"{first}/config.json", "w") as file:
        file.write("{")
    code, out, _ = command("study.py", "--div", "rkl", "fkl", *tiny_study)
    assert code == 1 and "FAILED: train.py: cannot read" in out and "2/2" in out
    assert "Missing, of 2 runs, are the seeds published rkl (0)." in out and "| fkl | 1 |" in out
