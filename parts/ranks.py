"""
Several processes, one run: what `torchrun` adds to train.py, and all that knows about it.

    torchrun --standalone --nproc_per_node=4 train.py --div js --gradient_accumulation_steps 1         four GPUs of a machine
    torchrun --nnodes=2 --nproc_per_node=8 --rdzv_backend=c10d --rdzv_endpoint=HOST:29500 train.py --div js ...      on each of two machines

Every rank paints its share of a rollout's prompts; the pairs of all are then held by all, so the ranks train on equal shares
however few valid pairs their own prompts gave (none included), and the gradient is the mean over all pairs of all ranks. The
state is one: rank 0 writes it, and any number of ranks can go on from it. 1,000 pairs of SD1.5 are 0.2 GB.
"""
import contextlib
import datetime
import math
import os

import torch
import torch.distributed as dist

from sample import Pairs, UserError, encode_prompts, latent_shape, pick_device


class World:
    """The ranks that torchrun started (NCCL on CUDA, gloo on the CPU), or one rank, for which nothing here does anything."""

    def __init__(self, rank=0, size=1, local=0):
        self.rank, self.size, self.local, self.device = rank, size, local, "cpu"

    @classmethod
    def from_env(cls):
        return cls(*(int(os.environ.get(k, v)) for k, v in (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0))))

    def join(self, device):
        """Meets the other ranks. Returns this rank's device: cuda is its own GPU of this machine."""
        self.device = device = pick_device(f"cuda:{self.local}") if device == "cuda" and self.size > 1 else device
        if self.size > 1:
            cuda = device.startswith("cuda")
            if cuda:
                torch.cuda.set_device(device)
            # long: the others wait while rank 0 paints its pictures
            self._call(dist.init_process_group, "nccl" if cuda else "gloo", timeout=datetime.timedelta(hours=2))
        return device

    def leave(self):
        if self.size > 1:
            self._call(dist.destroy_process_group)

    def _call(self, operation, *args, **kw):
        try:
            operation(*args, **kw)
        except RuntimeError as e:
            why = str(e).strip().splitlines()[:1]
            raise UserError("lost the other ranks, one of them failed or was killed: its message is above or below; the last checkpoint is "
                            "whole, --resume goes on from it with any number of ranks" + "".join(f" ({w[:200]})" for w in why)) from e

    def any(self, flag):
        """True on every rank if flag is true on one."""
        if self.size == 1:
            return flag
        flag = torch.tensor(float(flag), device=self.device)
        self._call(dist.all_reduce, flag, op=dist.ReduceOp.MAX)
        return bool(flag)

    @contextlib.contextmanager
    def in_turn(self):
        """The first rank of every machine goes through first, so that a download is made once and found by the others."""
        if self.local:
            self.any(False)
        yield
        if not self.local:
            self.any(False)

    def share(self, params):
        """All take rank 0's values: equal seeds make equal weights on equal machines alone."""
        if self.size > 1:
            self._call(lambda: [work.wait() for work in [dist.broadcast(p.data, 0, async_op=True) for p in params]])

    def counts(self, n):
        """[n of rank 0, n of rank 1, ...]"""
        counts = torch.zeros(self.size, dtype=torch.int64, device=self.device)
        counts[self.rank] = n
        if self.size > 1:
            self._call(dist.all_reduce, counts)
        return counts.tolist()

    def join_rows(self, x):
        """(n_r, ...) of each rank -> (sum of n_r, ...) on all, in the ranks' order; n_r may differ, and be 0.

        By broadcasts of bytes: all_gather wants equal shapes (gloo fails on others), and not every backend knows bf16.
        """
        if self.size == 1:
            return x
        home = x.device
        x = x.to(self.device).contiguous()
        parts = [x if r == self.rank else x.new_empty(n, *x.shape[1:]) for r, n in enumerate(self.counts(len(x)))]
        for r, part in enumerate(parts):
            if part.numel():
                self._call(dist.broadcast, part.view(torch.uint8), r)
        return torch.cat(parts).to(home)

    def sum_gradients(self, params):
        """Each .grad becomes its sum over the ranks; a rank that had no pair adds zeros."""
        if self.size == 1:
            return
        for p in params:
            p.grad = torch.zeros_like(p) if p.grad is None else p.grad
        self._call(lambda: [work.wait() for work in [dist.all_reduce(p.grad, async_op=True) for p in params]])

    def join_pairs(self, pairs):
        """The union of the ranks' pairs, on every rank; means of scores are weighted by the candidates behind them."""
        if self.size == 1:
            return pairs
        before = sum(self.counts(len(pairs.text))[:self.rank])
        pairs.prompt = pairs.prompt + before
        rows = {k: self.join_rows(getattr(pairs, k)) for k in ("x_t", "x_w", "x_l", "t", "prompt", "text")}
        keys = ("mean", "std", "final", "preview_agreement")
        s = self.join_rows(torch.tensor([[pairs.candidates, *(pairs.scores.get(k, math.nan) for k in keys)]], dtype=torch.float64))
        n, mean, std, final, agreement = s[s[:, 0] > 0].unbind(1)
        w = n / n.sum()
        scores = {"mean": w @ mean, "final": w @ final, "preview_agreement": w @ agreement}
        scores["std"] = (w @ (std ** 2 + (mean - scores["mean"]) ** 2)).sqrt()
        return Pairs(**rows, candidates=int(n.sum()), scores={k: float(v) for k, v in scores.items()
                                                              if k != "preview_agreement" or v.isfinite()})


def no_pairs(pipe):
    """What a rank without a prompt adds to a rollout."""
    x, i = torch.empty(0, *latent_shape(pipe), device=pipe.unet.device), torch.empty(0, dtype=torch.int64, device=pipe.unet.device)
    return Pairs(x, x, x, i, i, encode_prompts(pipe, [""])[:0], {}, 0)
