"""
Table 1 of the paper: every f-divergence that can hold an aligned model near its reference.

    D_f(p_theta || p_ref) = E_{p_ref}[ f(X) ],   X = p_theta / p_ref,   f convex, f(1) = 0

Alignment needs only f', the reward that a ratio stands for (eq. 5), and, for gradients, f'' (theorems 3 and 4):

    name       f(X)                                        f'(X)              f''(X)         f''(1)
    rkl        X log X                                     log X + 1          1/X            1     reverse KL: DPO, SPO
    fkl        -log X                                      -1/X               1/X^2          1     forward KL
    alpha      (X^(1-a) - (1-a) X - a) / (a (a-1))         (1 - X^-a) / a     X^-(1+a)       1     0 < a < 1
    js         X log X - (X+1) log((X+1)/2)                log(2X / (1+X))    1/(X (1+X))    1/2   Jensen-Shannon
    jeffreys   (X-1) log X                                 log X + 1 - 1/X    1/X + 1/X^2    2     rkl + fkl
    chi2kl     (X-1)^2/2 + X log X                         X + log X          1 + 1/X        2     chi-squared + rkl (chi-PO)

The first four rows are the paper's; the last two are not in it but meet the conditions of its theorem 1: f' can be
inverted and 0 lies outside its domain (f'(0+) = -inf), so the optimal policy never leaves the reference's support.

Limits, up to an additive constant in f', which cancels between winner and loser:
    alpha -> 0 is rkl:  (1 - X^-a)/a -> log X          alpha -> 1 is fkl:  (1 - X^-a)/a -> 1 - 1/X
(trl counts the other way round: its alpha is 1 - our alpha.)

f''(1) is how hard a divergence pulls while X is near 1: f'(X) = f'(1) + f''(1) (X - 1) + ..., so near X = 1
js at 2 beta IS rkl at beta. `train.py --match_curvature` divides beta by f''(1) to take that out of a comparison.

Your own divergence takes three lines below TABLE; every script then knows it by its name:
    TABLE["mixed"] = lambda: Divergence("mixed", f=lambda x: (x - 0.1) * x.log(),
        df=lambda x: x.log() + 1 - 0.1 / x, d2f=lambda x: 1 / x + 0.1 / x ** 2,
        reward=lambda u: u - 0.1 * torch.expm1(-u), curvature=1.1)
(reverse KL and a tenth of forward KL: any positive mixture of rows is a row, f, f', f'' and rewards mixed alike).
"""
import math
from dataclasses import dataclass
from typing import Callable

import torch
import torch.nn.functional as F

Map = Callable[[torch.Tensor], torch.Tensor]  # elementwise, any shape


@dataclass(frozen=True)
class Divergence:
    """One row of Table 1. f, df, d2f take the ratio X > 0; reward takes u = log X, which is what training holds."""
    name: str
    f: Map            # f(X), f(1) = 0
    df: Map           # f'(X), constants as in Table 1
    d2f: Map          # f''(X) > 0
    reward: Map       # f'(e^u) - f'(1): 0 at u = 0; finite and accurate in fp32 for |u| <= 80
    curvature: float  # f''(1)


# The rewards are written in u with expm1 and log1p, not as df(exp(u)): near X = 1, where training lives, exp(u) in
# fp32 keeps only the digits of u above 1e-7, and at |u| ~ 80 products such as X (1 + X) overflow.

def rkl():
    return Divergence("rkl", f=lambda x: x * x.log(), df=lambda x: x.log() + 1, d2f=lambda x: 1 / x,
                      reward=lambda u: u, curvature=1.0)


def fkl():
    return Divergence("fkl", f=lambda x: -x.log(), df=lambda x: -1 / x, d2f=lambda x: x ** -2,
                      reward=lambda u: -torch.expm1(-u), curvature=1.0)


def alpha_divergence(a):
    return Divergence(f"alpha{a:g}", f=lambda x: (x ** (1 - a) - (1 - a) * x - a) / (a * (a - 1)),
                      df=lambda x: (1 - x ** -a) / a, d2f=lambda x: x ** -(1 + a),
                      reward=lambda u: -torch.expm1(-a * u) / a, curvature=1.0)


def js():
    def reward(u):  # log(2X/(1+X)) = -log((1 + e^-u)/2); the first form is exact near 0, the second never overflows
        near = -torch.log1p(torch.expm1(-u.clamp(-1, 1)) / 2)
        return torch.where(u.abs() < 1, near, math.log(2) + F.logsigmoid(u))
    return Divergence("js", f=lambda x: x * x.log() - (x + 1) * ((x + 1) / 2).log(),
                      df=lambda x: (2 * x / (1 + x)).log(), d2f=lambda x: 1 / (x * (1 + x)),
                      reward=reward, curvature=0.5)


def jeffreys():
    return Divergence("jeffreys", f=lambda x: (x - 1) * x.log(), df=lambda x: x.log() + 1 - 1 / x,
                      d2f=lambda x: 1 / x + x ** -2, reward=lambda u: u - torch.expm1(-u), curvature=2.0)


def chi2kl():
    return Divergence("chi2kl", f=lambda x: (x - 1) ** 2 / 2 + x * x.log(), df=lambda x: x + x.log(),
                      d2f=lambda x: 1 + 1 / x, reward=lambda u: u + torch.expm1(u), curvature=2.0)


TABLE = {"rkl": rkl, "fkl": fkl, "alpha": alpha_divergence, "js": js, "jeffreys": jeffreys, "chi2kl": chi2kl}

NAMES = tuple(TABLE)


def get_divergence(name, alpha=None):
    """The row of Table 1 called `name`; `alpha`, strictly between 0 and 1, belongs to name="alpha" alone.

    Raises ValueError, with the choices, for an unknown name, a missing or illegal alpha, or an alpha without use.
    """
    if name not in TABLE:
        raise ValueError(f"unknown divergence {name!r}: choose one of {', '.join(TABLE)}")
    if name != "alpha":
        if alpha is not None:
            raise ValueError(f"alpha belongs to the divergence 'alpha', not to {name!r}: drop it")
        return TABLE[name]()
    if alpha is None:
        raise ValueError("the divergence 'alpha' needs alpha, strictly between 0 and 1 (the paper: 0.2, 0.4, 0.6, 0.8)")
    if not 0 < alpha < 1:  # NaN fails here too
        raise ValueError(f"alpha must lie strictly between 0 and 1, got {alpha} (for the ends use rkl and fkl)")
    return TABLE[name](float(alpha))
