"""What can be said of the runs of a study: intervals and tests over training seeds, verdicts.

Runs of one seed share prompts, noise and first weights, so seeds are blocks: rows are compared
within seeds, and what is left between seeds is the error. A setting's runs come as {div: {seed:
{metric: {epoch: (P,) values of the prompts}}}}, epoch 0 the model before training.
"""

import functools
import itertools
import math
from collections import namedtuple

import numpy as np
from scipy import optimize, stats

from parts.common import markdown

# metric of diversity: 1 if more of it is more diverse, else -1
DIVERSITY = {"rmse": 1, "psnr": -1, "ssim": -1, "fsim": -1, "entropy_1d": 1, "entropy_2d": 1}
NAMED = ("matched", "ratios_matched")  # the settings of the four tests named beforehand
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


@functools.cache
def detectable(n, power=0.8):
    """The least mean of n values, in their standard deviations, that the test at 5 % finds with
    that power."""
    limit, spread = stats.t.ppf(0.975, n - 1), stats.chi2(n - 1)

    def missing(size):  # power: P(normal > limit sqrt(chi2 / (n - 1)))
        def found(c):
            return stats.norm.sf(limit * np.sqrt(c / (n - 1)) - size * math.sqrt(n))

        return spread.expect(found) - power

    return optimize.brentq(missing, 0, 30) if n > 1 else math.nan


def permutation_test(table, draws=9999):
    """(p, least p that such a table can give) of "the row does not matter"; table (rows, seeds).

    Labels are permuted within each seed but the first; the statistic is the variance of the rows'
    means. Exact below 20,000 tables, else that many draws.
    """
    k, n = table.shape
    count = math.factorial(k) ** (n - 1)
    exact = count < 20_000
    if exact:
        orders = itertools.product(itertools.permutations(range(k)), repeat=n - 1)
        chosen = np.array(list(orders), dtype=int).reshape(count, n - 1, k)
        moved = table.T[np.arange(1, n)[:, None], chosen]  # (count, n - 1, k)
    else:
        copies = np.broadcast_to(table.T[1:], (draws, n - 1, k))
        moved = np.random.default_rng(0).permuted(copies, axis=2)
    means = (table.T[0] + moved.sum(1)) / n  # (tables, k)
    # the observed table itself must count, whatever the order of the sums
    hits = np.sum(means.var(1) >= table.mean(1).var() * (1 - 1e-9))
    return (hits / count, 1 / count) if exact else ((1 + hits) / (draws + 1), 1 / (draws + 1))


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
    """A setting's runs; means are over the prompts, at the last epoch if no other is named."""

    def __init__(self, runs):
        self.runs, self.divs = runs, list(runs)
        self.pairs = list(itertools.combinations(runs, 2))
        some_run = next(iter(next(iter(runs.values())).values()))
        self.original = {metric: np.nanmean(path[0]) for metric, path in some_run.items()}
        self.judge = next(iter(some_run))  # the first metric of a run's log
        most = max(map(len, runs.values()))
        self.most_seeds = [div for div in runs if len(runs[div]) == most]

    def path(self, div, seed, metric):
        """(epochs, means)."""
        path = self.runs[div][seed][metric]
        return list(path), [np.nanmean(values) for values in path.values()]

    def table(self, metric, divs):
        """Means: a row a divergence, a column a seed that all of them have."""
        seeds = sorted(set.intersection(*(set(self.runs[div]) for div in divs)), key=int)
        return np.array([[self.path(div, s, metric)[1][-1] for s in seeds] for div in divs])

    def gain(self, div, metric):
        return self.table(metric, [div])[0] - self.original[metric]

    def difference(self, a, b, metric):
        """a - b within common seeds."""
        return np.subtract(*self.table(metric, [a, b]))

    def near(self, metric):
        """90 % intervals of all pairs' differences."""
        return [interval(self.difference(a, b, metric), 0.9) for a, b in self.pairs]

    def leads(self, div, metric):
        """Intervals of div minus each other row."""
        return [interval(self.difference(div, b, metric)) for b in self.divs if b != div]


# ---- The paper's claims: (holds, fails, figure); neither is "cannot be told" ---------------------


def c1(o):
    """C1 every row gains taste"""
    gains = [interval(o.gain(div, o.judge)) for div in o.divs]
    least = min(gains, key=lambda gain: gain.mean)
    return all(g.low > 0 for g in gains), any(g.high < 0 for g in gains), f"least gain {least}"


def c2(o):
    """C2 the divergence hardly changes prompt following, rkl best"""
    near, leads = o.near("prompt following"), o.leads("rkl", "prompt following")
    holds = all(d.within(0.02) for d in near) and all(d.low > 0 for d in leads)
    apart = any(d.low > 0.02 or d.high < -0.02 for d in near)
    largest = max(near, key=lambda d: abs(d.mean))
    figure = f"largest difference of a pair {largest} (90 %)"
    return holds, apart or any(d.high < 0 for d in leads), figure


def c3(o):
    """C3 the divergence changes taste a lot, js best"""
    p, _ = permutation_test(o.table(o.judge, o.most_seeds))
    means = o.table(o.judge, o.divs).mean(1)
    gain, spread = means.mean() - o.original[o.judge], np.ptp(means)
    leads = o.leads("js", o.judge)
    holds = p <= 0.05 and spread >= 0.2 * gain and all(d.low > 0 for d in leads)
    same = all(d.within(0.2 * gain) for d in o.near(o.judge))
    least = min(leads, key=lambda d: d.mean)
    figure = f"spread {spread:.3g} of a mean gain of {gain:.3g}, omnibus p {p:.2g}, "
    figure += f"least of js minus another {least}"
    return holds, same or any(d.high < 0 for d in leads), figure


def c4(o):
    """C4 pixel, structure and entropy diversity rise"""
    rises = {}
    for metric in ("rmse", "ssim", "entropy_1d", "entropy_2d"):
        change = o.table(metric, o.divs).mean(0) - o.original[metric]
        rises[metric] = interval(DIVERSITY[metric] * change)
    figure = ", ".join(f"{metric} {rise}" for metric, rise in rises.items())
    rises = rises.values()
    return all(rise.low > 0 for rise in rises), any(rise.high < 0 for rise in rises), figure


def c5(o):
    """C5 no row wins all of diversity; more of it goes with less taste"""
    contests = list(itertools.product(o.pairs, DIVERSITY))
    leads = [interval(DIVERSITY[m] * o.difference(*pair, m)) for pair, m in contests]
    wins = []  # (winner, loser)
    for (pair, _), lead, p in zip(contests, leads, holm([lead.p for lead in leads])):
        if p <= 0.05:
            wins.append(pair if lead.mean > 0 else pair[::-1])
    beaten, full = {loser for _, loser in wins}, (len(o.divs) - 1) * len(DIVERSITY)
    ends = zip(o.table(o.judge, o.divs).T, o.table("rmse", o.divs).T)
    slopes = interval([np.polyfit(taste, rmse, 1)[0] for taste, rmse in ends])
    holds = len(beaten) == len(o.divs) and slopes.high < 0
    winner = any(sum(w == div for w, _ in wins) == full for div in o.divs)
    figure = f"{len(beaten)} of {len(o.divs)} rows beaten, slope of RMSE on taste {slopes}"
    return holds, winner or slopes.low > 0, figure


def c6(o):
    """C6 js is as diverse as rkl on most metrics"""
    good = bad = 0
    for metric, sign in DIVERSITY.items():
        margin = 0.1 * abs(o.gain("rkl", metric).mean())
        lead = interval(sign * o.difference("js", "rkl", metric))
        good, bad = good + (lead.low > -margin), bad + (lead.high < -margin)
    return good >= 4, bad >= 3, f"not worse on {good} of 6 metrics, worse on {bad}"


# ---- study.md ------------------------------------------------------------------------------------


def report(settings, flags, note):
    """Markdown. settings: {setting: its runs}; flags: {setting: flags of train.py}."""
    outcomes = {setting: Outcome(runs) for setting, runs in settings.items()}
    parts = ["# Does the divergence matter?\n", note, named_tests(outcomes)]
    for setting, o in outcomes.items():
        parts += [f"## {setting}: `train.py {flags[setting]}`\n", ends(o), verdicts(o)]
        parts += [differences(o), at_equal_taste(o, 0.5), at_equal_taste(o, 0.9)]
    return "\n".join([*parts, TAIL]).replace("| nan |", "| - |")


def named_tests(outcomes):
    """Of rkl, fkl and js: does the row matter, and is js rkl? On taste, corrected by Holm."""
    lines, p_values = [["named beforehand", "", "p", "p after Holm"]], []
    for setting in NAMED:
        o = outcomes.get(setting)
        if o and {"rkl", "fkl", "js"} <= o.runs.keys():
            three = o.table(o.judge, ["rkl", "fkl", "js"])
            (p, least), lead = permutation_test(three), interval(three[2] - three[0])
            seeds = f"({setting}, {three.shape[1]} seeds)"
            lines.append([f"rkl, fkl, js are one {seeds}", f"least p possible {least:.2g}"])
            lines.append([f"js is rkl {seeds}", f"js - rkl {lead}"])
            p_values += [p, lead.p]
    for line, p, adjusted in zip(lines[1:], p_values, holm(p_values)):
        line += [f"{p:.2g}", f"{adjusted:.2g}"]
    return markdown(lines)


def ends(o):
    """A line a row: what taste gained, and all metrics at the last epoch, means over seeds."""
    lines = [["row", "seeds", f"{o.judge}, gain", "error over prompts", *o.original]]
    lines.append(["original", "-", "-", "-", *(f"{x:.4g}" for x in o.original.values())])
    for div, seeds in o.runs.items():
        paths = [list(metrics[o.judge].values()) for metrics in seeds.values()]
        error = np.mean([stats.sem(path[-1] - path[0], nan_policy="omit") for path in paths])
        means = [f"{o.table(metric, [div]).mean():.4g}" for metric in o.original]
        lines.append([div, str(len(seeds)), str(interval(o.gain(div, o.judge))), f"{error:.2g}"])
        lines[-1] += means
    return markdown(lines)


def verdicts(o):
    lines = [["claim", "verdict", "figure"]]
    if len(o.divs) < 2:
        return "One row: nothing to compare.\n"
    for rule in (c1, c2, c3, c4, c5, c6):
        try:
            holds, fails, figure = rule(o)
        except KeyError as missing:
            holds, fails, figure = False, False, f"{missing} is not there"
        verdict = "holds" if holds else "fails" if fails else "cannot be told"
        lines.append([rule.__doc__, f"**{verdict}**", figure])
    return markdown(lines)


def differences(o):
    """Pairs of rows, and whether the rows differ at all, on taste; uncorrected."""
    lines = [[f"{o.judge}, uncorrected", "seeds", "difference", "p", "seen with 80 % power"]]
    for a, b in o.pairs:
        d = o.difference(a, b, o.judge)
        least = detectable(len(d)) * np.std(d, ddof=1) if len(d) > 1 else math.nan
        found = interval(d)
        lines.append([f"{a} - {b}", str(len(d)), str(found), f"{found.p:.2g}", f"{least:.2g}"])
    text = markdown(lines)
    for divs in dict.fromkeys([tuple(o.most_seeds), tuple(o.divs)]):
        table = o.table(o.judge, divs)
        p, least = permutation_test(table)
        row, seed, rest = deviations(table)
        text += f"\n{', '.join(divs)} x {table.shape[1]} seeds: p {p:.2g} that the row does not "
        text += f"matter (least possible {least:.2g}); standard deviations: row {row:.2g}, seed "
        text += f"{seed:.2g}, residual {rest:.2g}.\n"
    return text


def at_equal_taste(o, share):
    """Every metric where a run's path first comes up to a level of taste, paired by seed."""
    start, base = o.original[o.judge], o.divs[0]
    runs = [(div, seed) for div in o.divs for seed in o.runs[div]]
    peak = min(max(o.path(*run, o.judge)[1]) for run in runs)
    level = start + share * (peak - start)
    title = (
        f"Where {o.judge} first reaches {level:.3g}, {share:.0%} of the way from the original to "
    )
    title += f"the lowest of the runs' peaks ({base}, and the others minus it):\n\n"
    if peak <= start:
        return f"{title}One run never rose, so there is no such level, and no table.\n"
    there = {}  # (div, seed) -> a value a metric
    for run in runs:
        epoch = first_crossing(*o.path(*run, o.judge), level)
        there[run] = [np.interp(epoch, *o.path(*run, metric)) for metric in DIVERSITY]
    lines = [["row", "seeds", *DIVERSITY]]
    for div in o.divs:
        common = [seed for seed in o.runs[div] if seed in o.runs[base]]
        values = np.array([there[div, seed] for seed in common])  # (seeds, metrics)
        if div == base:
            cells = [f"{mean:.4g}" for mean in values.mean(0)]
        else:
            apart = values - [there[base, seed] for seed in common]
            cells = [str(interval(column)) for column in apart.T]
        lines.append([div, str(len(common)), *cells])
    return title + markdown(lines)


def first_crossing(epochs, means, level):
    """The epoch, between two evaluated ones perhaps, where the means first come up to level."""
    steps = itertools.pairwise(zip(epochs, means))
    (e, before), (f, after) = next(two for two in steps if two[0][1] < level <= two[1][1])
    return e + (f - e) * (level - before) / (after - before)
