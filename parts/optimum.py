"""What alignment aims at: the optimum of eq. 2 (theorem 1), and where its mass condenses.

    max over p: E_p[r] - beta D_f(p || p_ref), sum p = 1         p* = p_ref X,
    X = (f')^{-1}((r - lambda) / beta), lambda such that p* sums to 1                 (eq. 3, 4)

Every row has f'(0+) = -inf: no item loses all its mass. f'(inf) splits them. Where it is infinite
(rkl, jeffreys, chi2kl) a large X costs ever more reward, and an item that p_ref hardly knows stays
rare. Where it is finite (fkl 0, alpha 1/a, js log 2) any X is had at a bounded price: below a
critical beta the best item keeps a share of p*, however rare it was. All in float64.
"""

import math

import torch
import torch.nn.functional as F
from scipy import optimize


def optimal_policy(p_ref, reward, beta, div):
    """Theorem 1 on a finite set: (log X, lambda); p_ref, reward, log X (N,), p* = p_ref X.
    log X, since p* underflows at small beta; lambda with Table 1's constants in f'. Raises
    ValueError where theorem 1 does not hold, or a distribution is none."""
    p_ref, reward = check(p_ref, reward, div)
    if not 0 < beta < math.inf:
        raise ValueError(f"beta must be a positive number, got {beta}")
    gap = (reward - reward.max()) / beta  # f'(X) of an item less that of the best, (N,)
    log_p, log_x = p_ref.log(), None

    # Solved for v = log X of the best, not for lambda: where f' saturates, lambda is its limit to
    # the last bit while v may still be anything.
    def log_mass(v):
        nonlocal log_x
        f_of_best = div.reward(torch.tensor(v, dtype=torch.float64))
        log_x = inverse(div, f_of_best + gap, v, log_x)
        log_x[gap == 0] = v
        return torch.logsumexp(log_p + log_x, 0).item()

    most = -p_ref[gap == 0].sum().log().item()  # where the best have all the mass
    rest = log_mass(optimize.brentq(log_mass, -1e-5, most + 1e-9, xtol=1e-15))
    log_x = log_x - rest  # what v cannot resolve in its last bit
    f_of_best = div.reward(log_x[gap == 0][0]) + div.df(torch.ones((), dtype=torch.float64))
    return log_x, reward.max().item() - beta * f_of_best.item()


def critical_beta(p_ref, reward, div):
    """The beta below which the best items keep a share of p*, as p_ref of them tends to 0.
    That share is max(0, 1 - E[X]), X = (f')^{-1}(f'(inf) - D / beta), D what an item lacks to the
    best, E over the others under p_ref. None where f'(inf) is infinite. Raises ValueError."""
    p_ref, reward = check(p_ref, reward, div)
    lack = reward.max() - reward
    others = lack > 0
    if not others.any():
        raise ValueError("all rewards are equal: no item is the best")
    limit = div.limit
    if math.isinf(limit):
        return None
    lack, weight = lack[others], p_ref[others] / p_ref[others].sum()

    def excess(log_beta):
        u = inverse(div, limit - lack / math.exp(log_beta), 700.0)
        return torch.logsumexp(u + weight.log(), 0).item()

    return math.exp(root(excess, math.log(lack.mean().item())))


def at_expected_reward(target, p_ref, reward, div):
    """(log X, beta) of the optimum with E[r] = target, between E_ref[r] and max r."""

    def lack(log_beta):
        log_x, _ = optimal_policy(p_ref, reward, math.exp(log_beta), div)
        return target - (p_ref * log_x.exp() @ reward).item()

    beta = math.exp(root(lack, 0.0))
    return optimal_policy(p_ref, reward, beta, div)[0], beta


def root(function, start):
    """Where an increasing function is 0."""
    low = high = start
    while function(low) > 0:
        low -= 1
    while function(high) < 0:
        high += 1
    return optimize.brentq(function, low, high, xtol=1e-14)


def shares_in_training(p_ref, reward, beta, divs, steps=4000):
    """(rows, steps): the best item's share after each step of Adam on eq. 5 (theorem 2), all pairs
    alike, Bradley-Terry's labels in expectation. A sum of losses: a row moves its own logits."""
    wins = torch.sigmoid(reward[:, None] - reward) / len(reward) ** 2
    logits = p_ref.log().repeat(len(divs), 1).requires_grad_()
    opt, shares = torch.optim.Adam([logits], lr=0.01), []
    for _ in range(steps):
        log_p = torch.log_softmax(logits, 1)
        shares.append(log_p[:, reward.argmax()].exp().tolist())
        values = [div.reward(u) for div, u in zip(divs, log_p - p_ref.log())]
        margins = beta * torch.stack([value[:, None] - value for value in values])
        loss = -(wins * F.logsigmoid(margins)).sum()
        opt.zero_grad()
        loss.backward()
        opt.step()
    return zip(*shares)


def check(p_ref, reward, div):
    p_ref = torch.as_tensor(p_ref, dtype=torch.float64)
    reward = torch.as_tensor(reward, dtype=torch.float64)
    if p_ref.shape != reward.shape or p_ref.ndim != 1:
        raise ValueError(f"p_ref {tuple(p_ref.shape)} and reward {tuple(reward.shape)} differ")
    if not reward.isfinite().all():
        raise ValueError("a reward is not finite")
    if not (p_ref > 0).all() or abs(p_ref.sum().item() - 1) > 1e-6:
        raise ValueError("p_ref must be positive everywhere and sum to 1")
    far = div.reward(torch.tensor([-350.0, -700.0], dtype=torch.float64))
    if far[0] - far[1] < 1e-6:
        raise ValueError(f"{div.name}: f'(0+) is finite, and theorem 1 does not hold")
    return p_ref, reward


def value_and_slope(div, u):
    """f'(e^u) - f'(1) and its derivative in u, of a tensor."""
    u = u.detach().requires_grad_()
    value = div.reward(u)
    (slope,) = torch.autograd.grad(value.sum(), u)
    return value.detach(), slope


def inverse(div, target, high, start=None):
    """u (N,) <= high where f'(e^u) - f'(1) = target, by Newton's method.
    From `start`, or from a table of the function that is fine near `high`."""
    u = from_table(div, target, high) if start is None else start.clamp(max=high)
    for _ in range(30 if start is None else 4):  # a table is better than a start that is far
        value, slope = value_and_slope(div, u)
        # the slope underflows where f' has saturated: there every u is as good
        step = torch.where(slope > 0, (value - target) / slope, 0)
        u = (u - step).clamp(max=high)
        if (step.abs() <= 1e-7 * (1 + u.abs())).all():  # Newton's: what is left is its square
            return u
    return u if start is None else inverse(div, target, high)


def from_table(div, target, high):
    """The inverse to a hundredth or so: linear in a table whose steps grow away from `high`."""
    width = 1.0
    while div.reward(torch.tensor([high - width], dtype=torch.float64)) > target.min():
        width *= 2
    line = torch.linspace(math.log1p(width), 0, 4096, dtype=torch.float64)
    u = high - torch.expm1(line)
    values = div.reward(u)
    after = torch.searchsorted(values, target).clamp(1, len(u) - 1)
    a, b = values[after - 1], values[after]
    part = torch.where(b > a, (target - a) / (b - a), 0).clamp(0, 1)
    return u[after - 1] + part * (u[after] - u[after - 1])
