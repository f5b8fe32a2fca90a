"""The optimum of eq. 2 against KKT's conditions, inverses written out, scipy, training by eq. 5."""

import itertools
import math
import os
import re

import numpy as np
import pytest
import torch
from scipy import optimize, special

from divergences import Divergence, get_divergence
from loss import alignment_loss
from parts.optimum import critical_beta, optimal_policy

ROWS = [get_divergence(name) for name in ("rkl", "fkl", "js", "jeffreys", "chi2kl")]
ROWS += [get_divergence("alpha", a) for a in (0.2, 0.4, 0.6, 0.8)]
# an f that the code has never seen, which does not state its limit
ROWS.append(
    Divergence(
        "unseen",
        f=lambda x: x * x.log() - 2 * x.sqrt() + 2,
        df=lambda x: x.log() + 1 - x**-0.5,
        d2f=lambda x: 1 / x + x**-1.5 / 2,
        reward=lambda u: u - torch.expm1(-u / 2),
    )
)
SATURATING = [div for div in ROWS if math.isfinite(div.limit)]
IDS = [div.name for div in ROWS]
ONE = torch.ones(1, dtype=torch.float64)


def problem(n, seed, spread=1.0):
    """p_ref, rewards of that spread."""
    rng = np.random.default_rng(seed)
    p_ref = special.softmax(2 * rng.normal(size=n))
    reward = rng.normal(size=n)
    return torch.tensor(p_ref), torch.tensor(spread * reward / np.ptp(reward))


@pytest.mark.parametrize("div", ROWS, ids=IDS)
def test_karush_kuhn_tucker(div):
    """Eq. 3: r - beta f'(X) is one number, and p* sums to 1. (PROBLEMS=200 for more of them.)"""
    for seed in range(int(os.environ.get("PROBLEMS", 40))):
        rng = np.random.default_rng((1, seed))
        n, beta = int(2 * 500 ** rng.random()), 10 ** rng.uniform(-3, 3)
        p_ref, reward = problem(max(n, 2), seed)
        log_x, lam = optimal_policy(p_ref, reward, beta, div)
        assert abs((p_ref * log_x.exp()).sum().item() - 1) < 1e-12
        known = log_x < math.log(1e16)  # beyond, f' has saturated
        rest = reward - beta * (div.reward(log_x) + div.df(ONE)) - lam
        assert rest[known].abs().max() <= 1e-10


@pytest.mark.parametrize("div", ROWS[:-1], ids=IDS[:-1])
@pytest.mark.parametrize("beta", [0.3, 1.0, 20.0])
def test_inverses_written_out(div, beta):
    p_ref, reward = problem(50, seed=2)
    log_x, lam = optimal_policy(p_ref, reward, beta, div)
    p_ref = p_ref.numpy()
    y = ((reward - lam) / beta).numpy()  # f'(X)
    if div.name == "rkl":
        expected = np.exp(special.log_softmax(np.log(p_ref) + reward.numpy() / beta)) / p_ref
    elif div.name.startswith("alpha"):
        a = float(div.name[5:])
        expected = (1 - a * y) ** (-1 / a)
    else:
        expected = {
            "fkl": lambda: -1 / y,
            "js": lambda: np.exp(y) / (2 - np.exp(y)),
            "jeffreys": lambda: 1 / special.wrightomega(1 - y),
            "chi2kl": lambda: special.wrightomega(y),
        }[div.name]()
    assert log_x.max() < math.log(1e6)
    assert np.allclose(log_x.exp().numpy(), expected, rtol=1e-9)


@pytest.mark.parametrize("div", ROWS, ids=IDS)
def test_a_generic_solver_finds_the_same(div):
    p_ref, reward = problem(5, seed=3)
    beta = 0.5

    def objective(logits):
        p = torch.softmax(torch.tensor(logits), 0)
        return -(p @ reward - beta * (p_ref @ div.f(p / p_ref))).item()

    found = optimize.minimize(objective, np.log(p_ref.numpy()), method="BFGS", tol=1e-9)
    log_x, _ = optimal_policy(p_ref, reward, beta, div)
    assert np.allclose(special.softmax(found.x), (p_ref * log_x.exp()).numpy(), atol=1e-5)


@pytest.mark.parametrize("div", SATURATING, ids=[div.name for div in SATURATING])
def test_the_best_keeps_its_share_however_rare(div):
    """Below the critical beta; split among several best by p_ref. Above it the share goes to 0."""
    rest, lack = problem(20, seed=4)
    reward = torch.cat([lack.max().expand(2) + 0.1, lack])
    for rare in (1e-6, 1e-20, 1e-60):
        best = rare * torch.tensor([0.75, 0.25], dtype=torch.float64)
        p_ref = torch.cat([best, rest * (1 - rare)])
        critical = critical_beta(p_ref, reward, div)
        below, _ = optimal_policy(p_ref, reward, critical / 2, div)
        p = p_ref * below.exp()
        assert abs(p.sum().item() - 1) < 1e-12 and p[0] / p[1] == pytest.approx(3, rel=1e-9)
        above, _ = optimal_policy(p_ref, reward, critical * 2, div)
        share = (p_ref * above.exp())[:2].sum().item()
    assert share < 1e-6
    # the limit of the share, from the others alone
    targets = (div.limit - (reward.max() - reward[2:]) / (critical / 2)).tolist()
    x = [math.exp(optimize.brentq(lambda u, t=t: value(div, u) - t, -700, 700)) for t in targets]
    assert p[:2].sum().item() == pytest.approx(
        1 - (rest @ torch.tensor(x).double()).item(), abs=1e-6
    )


def value(div, u):
    return div.reward(torch.tensor([u], dtype=torch.float64)).item()


def test_critical_beta_in_closed_form():
    p_ref, reward = problem(30, seed=5)
    lack = reward.max() - reward
    others = lack > 0
    d, weight = lack[others], p_ref[others] / p_ref[others].sum()
    found = {div.name: critical_beta(p_ref, reward, div) for div in ROWS}
    assert found["fkl"] == pytest.approx(1 / (weight / d).sum().item(), rel=1e-9)
    for a in (0.2, 0.4, 0.6, 0.8):
        closed = a * (weight * d ** (-1 / a)).sum().item() ** -a
        assert found[f"alpha{a}"] == pytest.approx(closed, rel=1e-9)
    root = optimize.brentq(lambda b: (weight / torch.expm1(d / b)).sum().item() - 1, 1e-3, 1e3)
    assert found["js"] == pytest.approx(root, rel=1e-9)
    assert [found[name] for name in ("rkl", "jeffreys", "chi2kl", "unseen")] == [None] * 4


@pytest.mark.parametrize("div", ROWS[:-1], ids=IDS[:-1])
def test_limits_are_limits(div):
    unstated = Divergence(div.name, div.f, div.df, div.d2f, div.reward)
    stated = {"fkl": 1.0, "js": math.log(2)} | {f"alpha{a}": 1 / a for a in (0.2, 0.4, 0.6, 0.8)}
    assert div.limit == pytest.approx(stated.get(div.name, math.inf), rel=1e-12)
    if math.isinf(div.limit):
        assert unstated.limit == math.inf
        assert value(div, 600.0) > value(div, 300.0) + 100
    else:
        assert unstated.limit == pytest.approx(div.limit, rel=1e-12)
        far = torch.tensor([1e300], dtype=torch.float64)
        assert div.df(far) - div.df(ONE) == pytest.approx(div.limit, abs=1e-9)


def test_a_constant_changes_nothing_and_equal_rewards_leave_the_reference():
    p_ref, reward = problem(12, seed=6)
    for div in ROWS:
        log_x, lam = optimal_policy(p_ref, reward, 0.5, div)
        moved, lam_moved = optimal_policy(p_ref, reward + 7, 0.5, div)
        assert torch.allclose(moved, log_x, atol=1e-11) and lam_moved == pytest.approx(lam + 7)
        log_x, lam = optimal_policy(p_ref, torch.full_like(p_ref, 3.0), 0.5, div)
        assert log_x.abs().max() < 1e-15 and lam == pytest.approx(3 - 0.5 * div.df(ONE).item())


def test_p_ref_in_fp32_sums_to_one_nearly():
    for div in ROWS:
        for p_ref, beta in ((torch.full((10,), 0.1), 1.0), (torch.tensor([0.5, 0.5000005]), 1e8)):
            log_x, _ = optimal_policy(p_ref, torch.ones(len(p_ref)), beta, div)
            assert (p_ref.double() * log_x.exp()).sum().item() == pytest.approx(1, abs=1e-12)


BAD = [
    (dict(beta=0.0), "beta must be a positive number"),
    (dict(beta=math.nan), "beta must be a positive number"),
    (dict(reward=[1.0, 2.0]), "differ"),
    (dict(reward=[1.0, math.nan, 0.0]), "a reward is not finite"),
    (dict(reward=[1.0, math.inf, 0.0]), "a reward is not finite"),
    (dict(p_ref=[0.5, 0.5, 0.0]), "p_ref must be positive everywhere and sum to 1"),
    (dict(p_ref=[0.5, 0.3, 0.1]), "p_ref must be positive everywhere and sum to 1"),
    (dict(div="chi2"), "chi2: f'(0+) is finite, and theorem 1 does not hold"),
]


@pytest.mark.parametrize("change, message", BAD, ids=[message for _, message in BAD])
def test_bad_input(change, message):
    if change.get("div"):
        change = {"div": Divergence("chi2", None, lambda x: x, None, lambda u: torch.expm1(u))}
    given = dict(p_ref=[0.5, 0.3, 0.2], reward=[1.0, 2.0, 0.0], beta=1.0, div=ROWS[0]) | change
    with pytest.raises(ValueError, match=re.escape(message)):
        optimal_policy(**given)
    if "beta" not in change:
        given.pop("beta")
        with pytest.raises(ValueError, match=re.escape(message)):
            critical_beta(**given)


def test_no_item_is_the_best_of_equals():
    with pytest.raises(ValueError, match="all rewards are equal"):
        critical_beta([0.5, 0.5], [1.0, 1.0], ROWS[1])


# ---- Theorem 2: eq. 5 on preferences arrives at theorem 1's optimum


def pair_weights(kind, p_ref):
    """How often the pair (i, j) is compared, (N, N)."""
    n = len(p_ref)
    if kind == "uniform":
        weights = torch.ones(n, n)
    elif kind == "reference":
        weights = p_ref[:, None] * p_ref
    else:  # a chain of neighbours
        weights = (torch.arange(n)[:, None] - torch.arange(n)).abs() == 1
    weights = weights.double().fill_diagonal_(0)
    return weights / weights.sum()


def train_by_eq_5(p_ref, wins, beta, div):
    """The policy where eq. 5 is least; wins (N, N): how often i is preferred to j."""
    logits = p_ref.log().clone().requires_grad_()
    opt = torch.optim.LBFGS(
        [logits],
        max_iter=5000,
        tolerance_grad=1e-13,
        tolerance_change=0,
        history_size=20,
        line_search_fn="strong_wolfe",
    )
    w, l = (index.flatten() for index in np.indices(wins.shape))

    def closure():
        opt.zero_grad()
        u = torch.log_softmax(logits, 0) - p_ref.log()
        weight = wins.flatten() * wins.numel()  # alignment_loss takes a mean
        loss, _ = alignment_loss(u[w], u[l], div, beta, clip="none", weight=weight)
        loss.backward()
        return loss

    opt.step(closure)
    return torch.softmax(logits.detach(), 0)


def total_variation(p, q):
    return (p - q).abs().sum().item() / 2


CASES = list(itertools.product(ROWS, (0.2, 1.0), ("uniform", "reference", "chain")))


@pytest.mark.parametrize("div, beta, kind", CASES[::7], ids=lambda x: getattr(x, "name", str(x)))
def test_theorem_2(div, beta, kind):
    """Bradley-Terry labels in exact expectation. (All of CASES: python tests/test_optimum.py)"""
    assert distance_to_the_optimum(div, beta, kind) < 1e-6


def distance_to_the_optimum(div, beta, kind):
    torch.manual_seed(0)
    p_ref = 0.01 + 0.92 * torch.softmax(torch.randn(8, dtype=torch.float64), 0)
    reward = torch.rand(8, dtype=torch.float64)
    wins = pair_weights(kind, p_ref) * torch.sigmoid(reward[:, None] - reward)
    log_x, _ = optimal_policy(p_ref, reward, beta, div)
    return total_variation(train_by_eq_5(p_ref, wins, beta, div), p_ref * log_x.exp())


def test_theorem_2_with_sampled_labels():
    """10^6 labels; twenty redraws tell their error."""
    torch.manual_seed(1)
    p_ref, reward, div = torch.full((4,), 0.25).double(), torch.rand(4).double(), ROWS[2]
    weights = pair_weights("uniform", p_ref)
    expected = weights * torch.sigmoid(reward[:, None] - reward)
    log_x, _ = optimal_policy(p_ref, reward, 1.0, div)
    ends = []
    for _ in range(20):
        rng = np.random.default_rng(len(ends))
        counts = rng.multinomial(10**6, (expected / expected.sum()).flatten())
        assert counts[[0, 5, 10, 15]].sum() == 0  # no item is compared with itself
        wins = torch.tensor(counts).view(4, 4).double() / 10**6
        ends.append(train_by_eq_5(p_ref, wins, 1.0, div))
    ends = torch.stack(ends)
    error = ends.std(0) / math.sqrt(len(ends))
    assert ((ends.mean(0) - p_ref * log_x.exp()).abs() < 4 * error).all() and error.max() < 1e-3


if __name__ == "__main__":
    for case in CASES:
        print(f"{case[0].name:10} beta {case[1]} {case[2]:10} {distance_to_the_optimum(*case):.1e}")
