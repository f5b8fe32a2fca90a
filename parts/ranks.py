"""Several processes, one run: what `torchrun` adds to train.py.

torchrun --standalone --nproc_per_node=4 train.py --div js --gradient_accumulation_steps 1
torchrun --nnodes=2 --nproc_per_node=8 --rdzv_backend=c10d --rdzv_endpoint=HOST:29500 train.py ...

Every rank paints its share of a rollout's prompts, and all ranks then hold the pairs of all; they
train on equal shares of them, however few clear pairs their own prompts gave, and the gradient is
the mean over all pairs. Rank 0 alone writes, and any number of ranks can go on from its state.
"""

import contextlib
import datetime
import os
import sys

import torch
import torch.distributed as dist

from parts.common import UserError, pick_device
from parts.weights import first_line


class World:
    """The ranks that torchrun started or, without it, one, for which all of this does nothing."""

    def __init__(self):
        self.rank = int(os.environ.get("RANK", 0))
        self.size = int(os.environ.get("WORLD_SIZE", 1))
        self.local = int(os.environ.get("LOCAL_RANK", 0))  # the rank on this machine

    def join(self, device):
        """Meets the other ranks. Returns this rank's device: "cuda" is its own GPU."""
        device = pick_device(device)
        if self.size == 1:
            return device
        if ":" in device:
            raise UserError(f"{self.size} ranks cannot share {device}: say --device cuda")
        if device == "cuda":
            device = pick_device(f"cuda:{self.local}")
            torch.cuda.set_device(device)
        backend = "nccl" if device.startswith("cuda") else "gloo"
        patience = datetime.timedelta(hours=2)  # the others wait while rank 0 paints its pictures
        with naming_lost_ranks():
            dist.init_process_group(backend, timeout=patience)
        return device

    def leave(self):
        if self.size > 1:
            with naming_lost_ranks():
                dist.destroy_process_group()

    def gather(self, value):
        """[value of rank 0, value of rank 1, ...], on every rank. Tensors must be on the CPU.
        The values are pickled, between our own ranks and nowhere else."""
        if self.size == 1:
            return [value]
        values = [None] * self.size
        with naming_lost_ranks():
            dist.all_gather_object(values, value)
        return values

    def gather_rows(self, parts):
        """[{name: (n_i,)}, ...], perhaps none on this rank -> {name: (all rows of all ranks,)}."""
        return concat(self.gather(concat(parts)))

    def share(self, tensors):
        """All ranks take rank 0's values: equal seeds make equal weights on equal machines only."""
        if self.size > 1:
            with naming_lost_ranks():
                for tensor in tensors:
                    dist.broadcast(tensor.data, 0)

    def sum_gradients(self, parameters):
        """Each .grad becomes its sum over the ranks; a rank that had no pair adds zeros."""
        if self.size == 1:
            return
        for p in parameters:
            p.grad = torch.zeros_like(p) if p.grad is None else p.grad
        with naming_lost_ranks():
            for work in [dist.all_reduce(p.grad, async_op=True) for p in parameters]:
                work.wait()

    @contextlib.contextmanager
    def in_turn(self):
        """The first rank of a machine goes first: it downloads and encodes, the others find it."""
        if self.local:
            self.gather(None)
        yield
        if not self.local:
            self.gather(None)

    @contextlib.contextmanager
    def one_voice(self):
        """All ranks find the same bad input: the first of each machine says it."""
        try:
            yield
        except UserError:
            if self.local:
                sys.exit(2)
            raise


def concat(parts):
    """[{name: (n_i,)}, ...] -> {name: (sum of n_i,)}, on the CPU; {} of nothing."""
    parts = [part for part in parts if part]
    names = parts[0] if parts else {}
    return {name: torch.cat([part[name] for part in parts]).cpu() for name in names}


@contextlib.contextmanager
def naming_lost_ranks():
    try:
        yield
    except RuntimeError as error:
        why = "one of them failed or was killed, its message is above or below"
        fix = "--resume goes on from the last checkpoint with any number of ranks"
        raise UserError(f"lost the other ranks: {why}; {fix} ({first_line(error)})") from error
