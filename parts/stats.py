"""What can be said of the runs of a study: intervals and tests over training seeds, verdicts.

Runs of one seed share prompts, noise and first weights, so seeds are blocks: rows are compared
within seeds, and what is left between seeds is the error.
"""

import itertools
import math
from collections import Counter, namedtuple

import numpy as np
from scipy import special, stats

from parts.common import markdown

# metric of diversity: 1 if more of it is more diverse, else -1
DIVERSITY = {"rmse": 1, "psnr": -1, "ssim": -1, "fsim": -1, "entropy_1d": 1, "entropy_2d": 1}
# Settings and rows of the four tests named beforehand.
NAMED, THREE = ("matched", "ratios_matched"), ("rkl", "fkl", "js")
TAIL = """
RMSE, PSNR and SSIM are one finding, not three. Of Table 2, Aesthetic, PickScore, HPS and
ImageReward are not tested: a toy has one judge. C7, the smoothest surface: `python landscape.py`
counts it. Intervals are Student's t over seeds, of 95 % where nothing else is said; where there is
none, there was one seed, and nothing can be told.
"""


class Interval(namedtuple("Interval", "mean low high p")):
    def __str__(self):
        around = "" if math.isnan(self.low) else f" [{self.low:+.3g}, {self.high:+.3g}]"
        return f"{self.mean:+.3g}{around}"

    def within(self, margin):
        return -margin < self.low and self.high < margin


def interval(values, level=0.95):
    """Student's t interval of the mean of n values, and the p of "the mean is 0"; NaN if n < 2."""
    if len(values) < 2:
        return Interval(np.mean(values), math.nan, math.nan, math.nan)
    if np.ptp(values) == 0:
        return Interval(*[values[0]] * 3, float(values[0] == 0))
    test = stats.ttest_1samp(values, 0)
    return Interval(np.mean(values), *test.confidence_interval(level), test.pvalue)


def detectable(n):
    """The least mean of n values, in their standard deviations, that a test at 5 % finds four times
    in five (where the mean is not 0, t is noncentral)."""
    limit = stats.t.ppf(0.975, n - 1)
    return special.nctdtrinc(n - 1, 0.2, limit) / math.sqrt(n)  # NaN if n is 1


def permutation_test(table, draws=9999):
    """(p, least p that such a table can give) of "the row does not matter"; table (rows, seeds).
    Labels are permuted within each seed but the first, in all ways below 20,000, else in `draws`
    of them; the statistic is the variance of the rows' means."""
    k, n = table.shape
    if n == 0:
        return math.nan, math.nan
    held, *others = table.T
    sums = held[None]  # (tables, k), the observed table's first
    if math.factorial(k) ** (n - 1) < 20_000:
        for column in others:
            orders = np.array(list(itertools.permutations(column)))
            sums = (sums[:, None] + orders).reshape(-1, k)
    else:
        copies = np.broadcast_to(others, (draws, n - 1, k))
        drawn = held + np.random.default_rng(0).permuted(copies, axis=2).sum(1)
        sums = np.vstack([table.sum(1), drawn])
    variances = sums.var(1)
    return np.mean(variances >= variances[0] * (1 - 1e-9)), 1 / len(sums)


def deviations(table):
    """Standard deviations of row, seed and residual, by moments; table (rows, seeds)."""
    k, n = table.shape
    if min(k, n) < 2:
        return (math.nan,) * 3
    rows, seeds = table.mean(1), table.mean(0)
    rest = table - rows[:, None] - seeds + table.mean()
    residual = np.sum(rest**2) / ((k - 1) * (n - 1))
    variances = rows.var(ddof=1) - residual / n, seeds.var(ddof=1) - residual / k, residual
    return tuple(math.sqrt(max(variance, 0)) for variance in variances)


def holm(p_values):
    """Adjusted for their number, in the same order."""
    p = np.asarray(p_values, dtype=float)
    order = np.argsort(p)
    adjusted = np.empty(len(p))
    adjusted[order] = np.maximum.accumulate(p[order] * np.arange(len(p), 0, -1))
    return np.minimum(adjusted, 1)


class Outcome:
    """A setting's runs, {div: {seed: {metric: (E, P)}}}: of E epochs, the first of them before
    training, the values of P prompts. All else is in means over prompts, at a run's end: its last
    epoch or, if there is a level, where the judge first comes up to it."""

    def __init__(self, runs, level=None):
        self.runs, self.level, self.divs = runs, level, list(runs)
        self.pairs = list(itertools.combinations(runs, 2))
        some_run = next(iter(runs[self.divs[0]].values()))
        self.original = {metric: np.nanmean(values[0]) for metric, values in some_run.items()}
        self.judge = next(iter(some_run))  # the first metric of a run's log
        most_seeds = max(map(len, runs.values()))
        self.full_rows = [div for div in runs if len(runs[div]) == most_seeds]

    def path(self, div, seed, metric):
        return np.nanmean(self.runs[div][seed][metric], axis=1)  # (E,)

    def end(self, div, seed, metric):
        path = self.path(div, seed, metric)
        if self.level is None:
            return path[-1]
        return at_level(self.level, self.path(div, seed, self.judge), path)

    def table(self, metric, divs):
        """A row a divergence, a column a seed that all of them have."""
        seeds = sorted(set.intersection(*(set(self.runs[div]) for div in divs)), key=int)
        return np.array([[self.end(div, seed, metric) for seed in seeds] for div in divs])

    def gain(self, divs, metric):
        """Of the mean of some rows, a value a seed."""
        return self.table(metric, divs).mean(0) - self.original[metric]

    def difference(self, a, b, metric):
        """a - b within common seeds."""
        return np.subtract(*self.table(metric, [a, b]))

    def near(self, metric):
        """90 % intervals of all pairs' differences."""
        return [interval(self.difference(a, b, metric), 0.9) for a, b in self.pairs]

    def leads(self, div, metric):
        """Intervals of div minus each other row."""
        return [interval(self.difference(div, b, metric)) for b in self.divs if b != div]


def at_level(level, path, other):
    """The other path's value where, between two epochs perhaps, path first comes up to level."""
    after = np.argmax(np.array(path) >= level)
    two = slice(after - 1, after + 1)
    return np.interp(level, path[two], other[two])


# ---- The paper's claims: (holds, fails, figure); neither is "cannot be told" ---------------------


def signs(intervals):
    """(all lie above 0, one lies below 0)."""
    return all(i.low > 0 for i in intervals), any(i.high < 0 for i in intervals)


def c1(o):
    """C1 every row gains taste"""
    gains = [interval(o.gain([div], o.judge)) for div in o.divs]
    return *signs(gains), f"least gain {min(gains)}"


def c2(o):
    """C2 the divergence hardly changes prompt following, rkl best"""
    near = o.near("prompt following")
    best, beaten = signs(o.leads("rkl", "prompt following"))
    apart = any(d.low > 0.02 or d.high < -0.02 for d in near)
    largest = max(near, key=lambda d: abs(d.mean))
    figure = f"largest difference of a pair {largest} (90 %)"
    return best and all(d.within(0.02) for d in near), beaten or apart, figure


def c3(o):
    """C3 the divergence changes taste a lot, js best"""
    p, _ = permutation_test(o.table(o.judge, o.full_rows))
    spread = np.ptp(o.table(o.judge, o.divs).mean(1))
    gain, leads = o.gain(o.divs, o.judge).mean(), o.leads("js", o.judge)
    best, beaten = signs(leads)
    same = all(d.within(0.2 * gain) for d in o.near(o.judge))
    figure = f"spread {spread:.3g} of a mean gain of {gain:.3g}, omnibus p {p:.2g}, "
    figure += f"least of js minus another {min(leads)}"
    return best and p <= 0.05 and spread >= 0.2 * gain, beaten or same, figure


def c4(o):
    """C4 pixel, structure and entropy diversity rise"""
    metrics = ("rmse", "ssim", "entropy_1d", "entropy_2d")
    rises = [interval(DIVERSITY[metric] * o.gain(o.divs, metric)) for metric in metrics]
    return *signs(rises), ", ".join(f"{metric} {rise}" for metric, rise in zip(metrics, rises))


def c5(o):
    """C5 no row wins all of diversity; more of it goes with less taste"""
    contests = list(itertools.product(o.pairs, DIVERSITY))
    leads = [interval(DIVERSITY[m] * o.difference(*pair, m)) for pair, m in contests]
    winners, beaten = Counter(), set()
    for (pair, _), lead, p in zip(contests, leads, holm([lead.p for lead in leads])):
        if p <= 0.05:
            winner, loser = pair if lead.mean > 0 else pair[::-1]
            winners[winner] += 1
            beaten.add(loser)
    by_seed = zip(o.table(o.judge, o.divs).T, o.table("rmse", o.divs).T)
    slope = interval([np.polyfit(taste, rmse, 1)[0] for taste, rmse in by_seed])
    wins_all = (len(o.divs) - 1) * len(DIVERSITY) in winners.values()
    figure = f"{len(beaten)} of {len(o.divs)} rows beaten, slope of RMSE on taste {slope}"
    return len(beaten) == len(o.divs) and slope.high < 0, wins_all or slope.low > 0, figure


def c6(o):
    """C6 js is as diverse as rkl on most metrics"""
    good = bad = 0
    for metric, sign in DIVERSITY.items():
        margin = 0.1 * abs(o.gain(["rkl"], metric).mean())
        lead = interval(sign * o.difference("js", "rkl", metric))
        good += lead.low > -margin
        bad += lead.high < -margin
    return good >= 4, bad >= 3, f"not worse on {good} of 6 metrics, worse on {bad}"


# ---- study.md ------------------------------------------------------------------------------------


def report(outcomes, flags, note):
    """Markdown. outcomes: {setting: Outcome}; flags: {setting: flags of train.py}."""
    parts = ["# Does the divergence matter?\n", note, named_tests(outcomes)]
    for setting, o in outcomes.items():
        parts += [f"## {setting}: `train.py {flags[setting]}`\n", ends(o), verdicts(o)]
        parts += [differences(o), at_equal_taste(o, 0.5), at_equal_taste(o, 0.9)]
    return "\n".join([*parts, TAIL]).replace(" nan |", " - |")


def named_tests(outcomes):
    """Of rkl, fkl and js: does the row matter, and is js rkl? On taste, corrected by Holm."""
    tests = []  # (name, figure, p)
    for setting, o in outcomes.items():
        if setting in NAMED and o.runs.keys() >= set(THREE):
            three = o.table(o.judge, THREE)
            (p, least), lead = permutation_test(three), interval(three[2] - three[0])
            seeds = f"({setting}, {three.shape[1]} seeds)"
            tests.append((f"rkl, fkl, js are one {seeds}", f"least p possible {least:.2g}", p))
            tests.append((f"js is rkl {seeds}", f"js - rkl {lead}", lead.p))
    lines = [["named beforehand", "", "p", "p after Holm"]]
    for (name, figure, p), adjusted in zip(tests, holm([p for _, _, p in tests])):
        lines.append([name, figure, f"{p:.2g}", f"{adjusted:.2g}"])
    return markdown(lines)


def ends(o):
    """A line a row: what taste gained, and all metrics at the last epoch, means over seeds."""
    lines = [["row", "seeds", f"{o.judge}, gain", "error over prompts", *o.original]]
    lines.append(["original", "-", "-", "-", *(f"{x:.4g}" for x in o.original.values())])
    for div, seeds in o.runs.items():
        changes = [metrics[o.judge][-1] - metrics[o.judge][0] for metrics in seeds.values()]
        error = np.mean(stats.sem(changes, axis=1, nan_policy="omit"))
        means = [f"{o.table(metric, [div]).mean():.4g}" for metric in o.original]
        gain = interval(o.gain([div], o.judge))
        lines.append([div, len(seeds), gain, f"{error:.2g}", *means])
    return markdown(lines)


def verdicts(o):
    if len(o.divs) < 2:
        return "One row: nothing to compare.\n"
    lines = [["claim", "verdict", "figure"]]
    for rule in (c1, c2, c3, c4, c5, c6):
        verdict = "cannot be told"
        try:
            holds, fails, figure = rule(o)
            if holds or fails:
                verdict = "holds" if holds else "fails"
        except KeyError as missing:
            figure = f"{missing} is not there"
        lines.append([rule.__doc__, f"**{verdict}**", figure])
    return markdown(lines)


def differences(o):
    """Pairs of rows, and whether the rows differ at all, on taste; uncorrected."""
    lines = [[f"{o.judge}, uncorrected", "seeds", "difference", "p", "seen with 80 % power"]]
    for a, b in o.pairs:
        d = o.difference(a, b, o.judge)
        n, found = len(d), interval(d)
        least = detectable(n) * np.std(d, ddof=1) if n > 1 else math.nan
        lines.append([f"{a} - {b}", n, found, f"{found.p:.2g}", f"{least:.2g}"])
    text = markdown(lines)
    for divs in dict.fromkeys([tuple(o.full_rows), tuple(o.divs)]):
        table = o.table(o.judge, divs)
        p, least = permutation_test(table)
        row, seed, rest = deviations(table)
        text += f"\n{', '.join(divs)} x {table.shape[1]} seeds: p {p:.2g} that the row does not "
        text += f"matter (least possible {least:.2g}); standard deviations: row {row:.2g}, seed "
        text += f"{seed:.2g}, residual {rest:.2g}.\n"
    return text


def at_equal_taste(o, share):
    """Every metric where a run's path first comes up to a level of taste, paired by seed."""
    start, (base, *others) = o.original[o.judge], o.divs
    peak = min(o.path(div, s, o.judge).max() for div in o.divs for s in o.runs[div])
    level = start + share * (peak - start)
    title = f"Where {o.judge} first reaches {level:.3g}, {share:.0%} of the way from the original "
    title += f"to the lowest of the runs' peaks ({base}, and the others minus it):\n\n"
    if peak <= start:
        return f"{title}One run never rose, so there is no such level, and no table.\n"
    there = Outcome(o.runs, level)
    means = [f"{there.table(metric, [base]).mean():.4g}" for metric in DIVERSITY]
    lines = [["row", "seeds", *DIVERSITY], [base, len(o.runs[base]), *means]]
    for div in others:
        apart = [there.difference(div, base, metric) for metric in DIVERSITY]
        lines.append([div, len(apart[0]), *map(interval, apart)])
    return title + markdown(lines)
