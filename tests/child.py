"""Commands in processes of their own, to be killed or to talk to each other.

They are forked from a server that has imported torch, diffusers and transformers already, which
takes a command's start from five seconds to a tenth of one.
"""

import multiprocessing
import os
import signal
import socket
import sys
import tempfile

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
os.environ.setdefault("HF_HUB_OFFLINE", "1")
HERE = [ROOT, os.path.join(ROOT, "tests")]
sys.path[:0] = [path for path in HERE if path not in sys.path]
# the server imports this file as well, and knows no other path before Python 3.13
os.environ["PYTHONPATH"] = os.pathsep.join(HERE)

import diffusers  # noqa: E402
import matplotlib.figure  # noqa: E402, F401
import torch  # noqa: E402
import transformers  # noqa: E402

import evaluate  # noqa: E402, F401
import train  # noqa: E402, F401
from parts.common import run_cli  # noqa: E402

for name in ("StableDiffusionPipeline", "DDIMScheduler", "UNet2DConditionModel", "AutoencoderKL"):
    getattr(diffusers, name)  # both libraries import lazily
for name in ("CLIPTextModel", "CLIPTokenizer"):
    getattr(transformers, name)

server = multiprocessing.get_context("forkserver")
server.set_forkserver_preload(["child"])


def _main(argv, output, environment, kill, change):
    """In the child. Everything printed goes to the file `output`."""
    with open(output, "wb") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    sys.stdout, sys.stderr = (os.fdopen(n, "w", buffering=1) for n in (1, 2))
    os.environ.update(environment)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's & would have it ignored
    torch.set_num_threads(1)
    if kill:
        _arm(*kill)
    if change:
        change()
    sys.argv = argv
    run_cli(sys.modules[os.path.splitext(argv[0])[0]].main)


def _arm(signal_name, module, function, at_call):
    """The process sends itself a signal at that call of module.function."""
    module, calls = sys.modules[module], []
    original = getattr(module, function)

    def bomb(*args, **options):
        calls.append(1)
        if len(calls) == at_call:
            os.kill(os.getpid(), getattr(signal, f"SIG{signal_name}"))
        return original(*args, **options)

    setattr(module, function, bomb)


class Child:
    """A command that runs. kill: (signal, module, function, at which call of it)."""

    def __init__(self, *argv, kill=None, environment=None, change=None):
        handle, self.output = tempfile.mkstemp(suffix=".log")
        os.close(handle)
        words = [str(word) for word in argv]
        arguments = words, self.output, environment or {}, kill, change
        self.process = server.Process(target=_main, args=arguments)
        self.process.start()
        self.pid = self.process.pid

    def poll(self):
        return self.process.exitcode

    def wait(self, timeout=150):
        """(exit code, all that it printed)."""
        self.process.join(timeout)
        if self.process.exitcode is None:
            self.process.kill()
            self.process.join()
        with open(self.output, errors="replace") as file:
            return self.process.exitcode, file.read()


def ranks(*argv, n=2, change=None, kill=None, environment=None):
    """The same command as n ranks, as torchrun would start them; [(exit code, output)] by rank.

    kill: of the last rank.
    """
    port = free_port()
    children = []
    for rank in range(n):
        world = dict(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(n))
        world |= dict(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port)) | (environment or {})
        last = kill if rank == n - 1 else None
        children.append(Child(*argv, change=change, environment=world, kill=last))
    return [child.wait() for child in children]


def free_port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]
