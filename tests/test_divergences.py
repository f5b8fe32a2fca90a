"""Table 1 against autograd, and against itself in float64."""
import pytest
import torch

import divergences
from divergences import NAMES, get_divergence

ROWS = [(n, None) for n in NAMES if n != "alpha"] + [("alpha", a) for a in (0.2, 0.4, 0.6, 0.8)]


@pytest.fixture(params=ROWS, ids=lambda r: r[0] + (str(r[1]) if r[1] else ""))
def div(request):
    return get_divergence(*request.param)


X = torch.logspace(-3, 3, 401, dtype=torch.float64)


def derivative(f, x):
    x = x.clone().requires_grad_()
    return torch.autograd.grad(f(x).sum(), x)[0]


def test_names_are_the_public_six():
    assert NAMES == ("rkl", "fkl", "alpha", "js", "jeffreys", "chi2kl")


def test_f_prime_and_second_are_the_derivatives(div):
    torch.testing.assert_close(div.df(X), derivative(div.f, X), rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(div.d2f(X), derivative(div.df, X), rtol=1e-10, atol=1e-12)


def test_f_is_convex_and_zero_at_one(div):
    one = torch.ones(1, dtype=torch.float64)
    assert div.f(one).abs() < 1e-14
    assert (div.d2f(X) > 0).all()
    assert div.curvature == pytest.approx(div.d2f(one).item(), rel=1e-14)


def test_theorem_1_zero_is_outside_the_domain_of_f_prime(div):
    """f'(0+) = -inf: it falls below any bound, and f' is strictly increasing, so it can be inverted."""
    tiny = torch.logspace(-300, -1, 50, dtype=torch.float64)
    assert (div.df(tiny).diff() > 0).all()
    assert div.df(tiny[:1]) < -600


def test_the_textbook_divergences():
    """E_q[f(p/q)] against the textbook formulas on two random distributions."""
    p, q = (torch.rand(2, 50, dtype=torch.float64) + 0.01).unbind()
    p, q = p / p.sum(), q / q.sum()
    m = (p + q) / 2
    kl = lambda a, b: (a * (a / b).log()).sum()
    D = lambda *a: (q * get_divergence(*a).f(p / q)).sum()
    torch.testing.assert_close(D("rkl"), kl(p, q))
    torch.testing.assert_close(D("fkl"), kl(q, p))
    torch.testing.assert_close(D("js"), kl(p, m) + kl(q, m))
    torch.testing.assert_close(D("jeffreys"), kl(p, q) + kl(q, p))
    torch.testing.assert_close(D("chi2kl"), ((p - q) ** 2 / q).sum() / 2 + kl(p, q))
    torch.testing.assert_close(D("alpha", 0.5), 4 * (1 - (p * q).sqrt().sum()))  # 4 (1 - Bhattacharyya)


def test_reward_is_f_prime_of_the_ratio(div):
    u = torch.linspace(-6, 6, 1001, dtype=torch.float64)
    want = div.df(u.exp()) - div.df(torch.ones(1, dtype=torch.float64))
    torch.testing.assert_close(div.reward(u), want, rtol=1e-9, atol=1e-13)


def test_reward_in_fp32_is_finite_and_accurate_to_80(div):
    """Against f'(e^u) - f'(1) in float64; near 0 as well, where log X of training lives and exp(u) has lost its digits."""
    near = torch.logspace(-7, 0, 200)
    u = torch.cat([-near.flip(0), near, torch.linspace(-80, 80, 3201)]).requires_grad_()
    got = div.reward(u)
    wide = u.detach().double()
    # f'(e^u) - f'(1) itself is exact enough in float64 only away from 0; the closed forms are, everywhere
    want = {"rkl": lambda v: v, "fkl": lambda v: -torch.expm1(-v), "js": lambda v: -torch.log1p(torch.expm1(-v) / 2),
            "jeffreys": lambda v: v - torch.expm1(-v), "chi2kl": lambda v: v + torch.expm1(v)}.get(
        div.name, lambda v: -torch.expm1(-float(div.name.removeprefix("alpha")) * v) / float(div.name.removeprefix("alpha")))(wide)
    assert got.isfinite().all()
    torch.testing.assert_close(got.double(), want, rtol=2e-5, atol=0)
    slope, = torch.autograd.grad(got.sum(), u)
    assert slope.isfinite().all()
    torch.testing.assert_close(slope.double(), (div.d2f(wide.exp()) * wide.exp()), rtol=2e-5, atol=2e-7)


def test_limits_of_alpha():
    u = torch.linspace(-3, 3, 101, dtype=torch.float64)
    for a, name in ((1e-6, "rkl"), (1 - 1e-6, "fkl")):
        torch.testing.assert_close(get_divergence("alpha", a).reward(u), get_divergence(name).reward(u), rtol=1e-4, atol=1e-4)


def test_jensen_shannon_at_twice_beta_is_reverse_kl_near_one():
    u = torch.linspace(-0.1, 0.1, 41, dtype=torch.float64)
    gap = 2 * get_divergence("js").reward(u) - get_divergence("rkl").reward(u)
    assert gap.abs().max() < 0.1 ** 2 / 2


@pytest.mark.parametrize("name, alpha, words", [
    ("kl", None, "choose one of rkl"), ("alpha", None, "needs alpha"), ("alpha", 0, "strictly between"),
    ("alpha", 1, "strictly between"), ("alpha", float("nan"), "strictly between"), ("js", 0.5, "drop it")])
def test_wrong_names_and_alphas(name, alpha, words):
    with pytest.raises(ValueError, match=words):
        get_divergence(name, alpha)


def test_your_own_divergence_as_the_docstring_says(monkeypatch):
    """The three lines are taken from the module's head and run as they stand there."""
    lines = divergences.__doc__.split("knows it by its name:\n")[1].split("\n(reverse")[0]
    monkeypatch.setattr(divergences, "TABLE", dict(divergences.TABLE))
    exec(lines.replace("\n    ", "\n").strip(), vars(divergences))
    name = next(n for n in divergences.TABLE if n not in NAMES)
    mine = get_divergence(name)
    torch.testing.assert_close(mine.df(X), derivative(mine.f, X), rtol=1e-9, atol=1e-9)
    u = torch.linspace(-2, 2, 11, dtype=torch.float64)
    torch.testing.assert_close(mine.reward(u), mine.df(u.exp()) - mine.df(torch.ones(1, dtype=torch.float64)))
    assert mine.curvature == pytest.approx(mine.d2f(torch.ones(1)).item())
