"""Table 1 against autograd, against the textbooks' formulas, and against itself in float64."""

import math

import pytest
import torch

import divergences
from divergences import NAMES, get_divergence

ALPHAS = (0.2, 0.4, 0.6, 0.8)  # the paper's
ROWS = [(name, None) for name in NAMES if name != "alpha"] + [("alpha", a) for a in ALPHAS]
X = torch.logspace(-3, 3, 401, dtype=torch.float64)
ONE = torch.ones(1, dtype=torch.float64)


@pytest.fixture(params=ROWS, ids=lambda row: row[0] + str(row[1] or ""))
def div(request):
    return get_divergence(*request.param)


def derivative(f, x):
    x = x.clone().requires_grad_()
    return torch.autograd.grad(f(x).sum(), x)[0]


# --------------------------------------------------------------------------------------------------
# f, f' and f''


def test_names_include_the_public_six():
    assert {"rkl", "fkl", "alpha", "js", "jeffreys", "chi2kl"} <= NAMES


def test_f_prime_and_f_second_are_the_derivatives(div):
    torch.testing.assert_close(div.df(X), derivative(div.f, X), rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(div.d2f(X), derivative(div.df, X), rtol=1e-10, atol=1e-12)


def test_f_is_convex_and_zero_at_one(div):
    assert div.f(ONE).abs() < 1e-14
    assert (div.d2f(X) > 0).all()


def test_curvature_is_the_docstrings_f_second_at_one():
    printed = {"rkl": 1, "fkl": 1, "js": 1 / 2, "jeffreys": 2, "chi2kl": 2}
    for name, expected in printed.items():
        assert get_divergence(name).curvature == pytest.approx(expected, rel=1e-14), name
    for alpha in ALPHAS:
        assert get_divergence("alpha", alpha).curvature == pytest.approx(1, rel=1e-14), alpha


def test_theorem_1_zero_is_outside_the_domain_of_f_prime(div):
    """f'(0+) = -inf: f' falls below any bound, and rises strictly, so that it can be inverted."""
    tiny = torch.logspace(-300, -1, 50, dtype=torch.float64)
    assert (div.df(tiny).diff() > 0).all()
    assert div.df(tiny[:1]) < -600


def test_expectations_of_f_are_the_textbook_divergences():
    """E_q[f(p/q)] of two random distributions p, q."""
    p, q = torch.rand(2, 50, dtype=torch.float64) + 0.01
    p, q = p / p.sum(), q / q.sum()
    middle = (p + q) / 2

    def kl(a, b):
        return (a * (a / b).log()).sum()

    def divergence(*row):
        return (q * get_divergence(*row).f(p / q)).sum()

    chi_square = ((p - q) ** 2 / q).sum()
    bhattacharyya = (p * q).sqrt().sum()
    torch.testing.assert_close(divergence("rkl"), kl(p, q))
    torch.testing.assert_close(divergence("fkl"), kl(q, p))
    torch.testing.assert_close(divergence("js"), kl(p, middle) + kl(q, middle))
    torch.testing.assert_close(divergence("jeffreys"), kl(p, q) + kl(q, p))
    torch.testing.assert_close(divergence("chi2kl"), chi_square / 2 + kl(p, q))
    torch.testing.assert_close(divergence("alpha", 0.5), 4 * (1 - bhattacharyya))


# --------------------------------------------------------------------------------------------------
# The reward


def test_reward_is_f_prime_of_the_ratio(div):
    u = torch.linspace(-6, 6, 1001, dtype=torch.float64)
    expected = div.df(u.exp()) - div.df(ONE)
    torch.testing.assert_close(div.reward(u), expected, rtol=1e-9, atol=1e-13)


def test_reward_in_fp32_is_finite_and_accurate_to_80(div):
    """Near 0 as well, where log X of training lives and exp(u) has lost its digits."""
    near = torch.logspace(-7, 0, 200)
    u = torch.cat([-near.flip(0), near, torch.linspace(-80, 80, 3201)]).requires_grad_()
    exact_u = u.detach().double()
    reward = div.reward(u)
    assert reward.isfinite().all()
    expected = div.df(exact_u.exp()) - div.df(ONE)  # of u = 1e-7 float64 leaves eight digits
    torch.testing.assert_close(reward.double(), expected, rtol=2e-5, atol=0)
    (slope,) = torch.autograd.grad(reward.sum(), u)
    assert slope.isfinite().all()
    expected = div.d2f(exact_u.exp()) * exact_u.exp()  # the chain rule
    torch.testing.assert_close(slope.double(), expected, rtol=2e-5, atol=2e-7)


@pytest.mark.parametrize("alpha, name", [(1e-6, "rkl"), (1 - 1e-6, "fkl")])
def test_limits_of_alpha(alpha, name):
    u = torch.linspace(-3, 3, 101, dtype=torch.float64)
    limit = get_divergence(name).reward(u)
    torch.testing.assert_close(get_divergence("alpha", alpha).reward(u), limit, rtol=0, atol=1e-4)


def test_near_one_jensen_shannon_at_twice_beta_is_reverse_kl():
    u = torch.linspace(-0.1, 0.1, 41, dtype=torch.float64)
    difference = 2 * get_divergence("js").reward(u) - get_divergence("rkl").reward(u)
    assert difference.abs().max() < 0.1**2 / 2


# --------------------------------------------------------------------------------------------------
# Names


@pytest.mark.parametrize(
    "name, alpha, words",
    [
        ("kl", None, "choose one of rkl"),
        ("alpha", None, "needs --alpha"),
        ("alpha", 0, "strictly between"),
        ("alpha", 1, "strictly between"),
        ("alpha", math.nan, "strictly between"),
        ("js", 0.5, "drop it"),
    ],
)
def test_wrong_names_and_alphas_are_refused(name, alpha, words):
    with pytest.raises(ValueError, match=words):
        get_divergence(name, alpha)


def test_your_own_divergence_is_the_statement_in_the_docstring(monkeypatch):
    """It is taken from the module's head and run as it stands there."""
    statement = divergences.__doc__.split("knows it by its name:\n")[1].split("\n(reverse")[0]
    own = {}
    exec(statement.strip(), vars(divergences) | {"TABLE": own})
    ((name, row),) = own.items()
    monkeypatch.setitem(divergences.TABLE, name, row)
    mine, rkl, fkl = get_divergence(name), get_divergence("rkl"), get_divergence("fkl")
    torch.testing.assert_close(mine.f(X), rkl.f(X) + fkl.f(X) / 10)
    torch.testing.assert_close(mine.df(X), derivative(mine.f, X), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(mine.d2f(X), derivative(mine.df, X), rtol=1e-9, atol=1e-9)
    u = torch.linspace(-2, 2, 11, dtype=torch.float64)
    torch.testing.assert_close(mine.reward(u), mine.df(u.exp()) - mine.df(ONE))


def test_names_is_a_view_that_knows_what_is_added(monkeypatch):
    monkeypatch.setitem(divergences.TABLE, "mine", divergences.rkl)
    assert "mine" in NAMES
    assert get_divergence("mine").name == "rkl"
