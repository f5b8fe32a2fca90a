"""Times of several ways to compute the same, so that they can be compared on a busy machine."""

import contextlib
import time
from collections import Counter

import torch


def in_rounds(ways, rounds):
    """{name: [what ways[name](round) returned]}: every way in every round, a new one goes first."""
    results = {name: [] for name in ways}
    names = list(ways)
    for number in range(rounds):
        first = number % len(names)
        for name in names[first:] + names[:first]:
            results[name].append(ways[name](number))
    return results


def paired_ratio(slow, fast):
    """(median, lower quartile, upper quartile) of slow[i] / fast[i], i the round."""
    ratios = torch.tensor(slow, dtype=torch.float64) / torch.tensor(fast, dtype=torch.float64)
    return ratios.quantile(torch.tensor([0.5, 0.25, 0.75], dtype=torch.float64)).tolist()


def ratio_text(slow, fast):
    """As "1.35 (1.31 to 1.40)"."""
    median, low, high = paired_ratio(slow, fast)
    return f"{median:.2f} ({low:.2f} to {high:.2f})"


def wait_for(device):
    if device.startswith("cuda"):
        torch.cuda.synchronize(device)


def seconds_of(f, device="cpu"):
    wait_for(device)
    start = time.perf_counter()
    f()
    wait_for(device)
    return time.perf_counter() - start


class Clock:
    """Seconds by part of the loop; it waits for the device before it looks."""

    def __init__(self, device):
        self.device, self.seconds = device, Counter()

    @contextlib.contextmanager
    def part(self, name):
        wait_for(self.device)
        start = time.perf_counter()
        yield
        wait_for(self.device)
        self.seconds[name] += time.perf_counter() - start

    def timed(self, name, f):
        """f, but its seconds are added to those of the part."""

        def call(*args, **options):
            with self.part(name):
                return f(*args, **options)

        return call


def device_name(device):
    if device.startswith("cuda"):
        return torch.cuda.get_device_name(device)
    return f"cpu, {torch.get_num_threads()} threads"
