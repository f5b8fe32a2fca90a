"""Table 1 of the paper: every f-divergence that can hold an aligned model near its reference.

    D_f(p_theta || p_ref) = E_{p_ref}[ f(X) ],   X = p_theta / p_ref,   f convex, f(1) = 0   (eq. 1)

Alignment needs only f', the reward that a ratio stands for: r = beta f'(X) + const (theorem 1,
eq. 4). Its derivative f'' rules the gradients (theorems 3 and 4). X is a ratio of densities, > 0.

    name      f(X)                                 f'(X)            f''(X)       f''(1)
    rkl       X log X                              log X + 1        1/X          1    reverse KL
    fkl       -log X                               -1/X             1/X^2        1    forward KL
    alpha     (X^(1-a) - (1-a) X - a) / (a (a-1))  (1 - X^-a) / a   X^-(1+a)     1    0 < a < 1
    js        X log X - (X+1) log((X+1)/2)         log(2X / (1+X))  1/(X (1+X))  1/2  Jensen-Shannon
    jeffreys  (X-1) log X                          log X + 1 - 1/X  1/X + 1/X^2  2    rkl + fkl
    chi2kl    (X-1)^2/2 + X log X                  X + log X        1 + 1/X      2    chi^2/2 + rkl

The first four are the paper's. The last two, Jeffreys' divergence and the penalty of chi-PO, are
not, but meet the conditions of theorem 1: f' can be inverted, and 0 is not in its domain (f'(0+) =
-inf), so that no finite reward asks for X = 0. Limits, up to a constant in f', which cancels
between winner and loser: alpha -> 0 is rkl, alpha -> 1 is fkl. (trl's alpha is 1 - our alpha.)

f''(1) is how hard a divergence pulls while X is near 1: f'(X) = f'(1) + f''(1) (X - 1) + ..., so
there js at 2 beta IS rkl at beta. `train.py --match_curvature` takes that out of a comparison.

Your own divergence is one statement below TABLE, and every script knows it by its name:
    TABLE["mixed"] = Divergence("mixed", f=lambda x: (x - 0.1) * x.log(),
        df=lambda x: x.log() + 1 - 0.1 / x, d2f=lambda x: 1 / x + 0.1 / x**2,
        reward=lambda u: u - 0.1 * torch.expm1(-u))
(reverse KL and a tenth of forward KL: a positive mixture of rows is a row, column by column.)
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F

Elementwise = Callable[[torch.Tensor], torch.Tensor]  # of any shape


@dataclass(frozen=True)
class Divergence:
    """A row of Table 1. f, df, d2f take the ratio X > 0; reward takes u = log X, in training."""

    name: str
    f: Elementwise  # f(X), f(1) = 0
    df: Elementwise  # f'(X), constants as in Table 1
    d2f: Elementwise  # f''(X) > 0
    reward: Elementwise  # f'(e^u) - f'(1), so 0 at u = 0; exact in fp32 for |u| <= 80
    df_inf: float = None  # f'(inf), constants as in Table 1, where it is approached slowly

    @property
    def limit(self):
        """f'(inf) - f'(1), where reward ends; inf where it does not."""
        one, far = torch.ones(1, dtype=torch.float64), torch.tensor([350.0, 700.0]).double()
        if self.df_inf is not None:
            return self.df_inf - self.df(one).item()
        before, after = self.reward(far).tolist()
        return after if after - before < 1e-6 else math.inf

    @property
    def curvature(self):
        """f''(1), a float."""
        return self.d2f(torch.ones((), dtype=torch.float64)).item()


# Rewards are written in u with expm1 and log1p, not as df(exp(u)): near X = 1, where training is,
# exp(u) in fp32 has lost the digits of u below 1e-7.


rkl = Divergence(
    "rkl",
    f=lambda x: x * x.log(),
    df=lambda x: x.log() + 1,
    d2f=lambda x: 1 / x,
    reward=lambda u: u,
)
fkl = Divergence(
    "fkl",
    f=lambda x: -x.log(),
    df=lambda x: -1 / x,
    d2f=lambda x: x**-2,
    reward=lambda u: -torch.expm1(-u),
)


def alpha_divergence(a):
    return Divergence(
        f"alpha{a:g}",
        f=lambda x: (x ** (1 - a) - (1 - a) * x - a) / (a * (a - 1)),
        df=lambda x: (1 - x**-a) / a,
        d2f=lambda x: x ** -(1 + a),
        reward=lambda u: -torch.expm1(-a * u) / a,
        df_inf=1 / a,
    )


def js_reward(u):
    # log(2X / (1+X)) = -log((1 + e^-u) / 2): log1p keeps the digits near 0, logsigmoid never
    # overflows
    near = -torch.log1p(torch.expm1(-u.clamp(-1, 1)) / 2)
    return torch.where(u.abs() < 1, near, math.log(2) + F.logsigmoid(u))


js = Divergence(
    "js",
    f=lambda x: x * x.log() - (x + 1) * ((x + 1) / 2).log(),
    df=lambda x: (2 * x / (1 + x)).log(),
    d2f=lambda x: 1 / (x * (1 + x)),
    reward=js_reward,
)
jeffreys = Divergence(
    "jeffreys",
    f=lambda x: (x - 1) * x.log(),
    df=lambda x: x.log() + 1 - 1 / x,
    d2f=lambda x: 1 / x + x**-2,
    reward=lambda u: u - torch.expm1(-u),
)
chi2kl = Divergence(
    "chi2kl",
    f=lambda x: (x - 1) ** 2 / 2 + x * x.log(),
    df=lambda x: x + x.log(),
    d2f=lambda x: 1 + 1 / x,
    reward=lambda u: u + torch.expm1(u),
)

TABLE = dict(rkl=rkl, fkl=fkl, alpha=alpha_divergence, js=js, jeffreys=jeffreys, chi2kl=chi2kl)
NAMES = TABLE.keys()  # a view: what is added to TABLE below is in it


def get_divergence(name, alpha=None):
    """The row called `name`; alpha, strictly between 0 and 1, belongs to name "alpha" alone.
    Raises ValueError for an unknown name, a missing or illegal alpha, or an alpha without use."""
    if name not in TABLE:
        raise ValueError(f"unknown divergence {name!r}: choose one of {', '.join(TABLE)}")
    if name != "alpha":
        if alpha is not None:
            raise ValueError(f"alpha belongs to the divergence 'alpha', not to {name!r}: drop it")
        return TABLE[name]
    if alpha is None:
        raise ValueError("the divergence 'alpha' needs --alpha (the paper: 0.2, 0.4, 0.6, 0.8)")
    if not 0 < alpha < 1:  # NaN fails here too
        raise ValueError(f"alpha must lie strictly between 0 and 1, got {alpha}")
    return alpha_divergence(float(alpha))
