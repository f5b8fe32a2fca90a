"""Commands in processes of their own, to be killed or to talk to each other. They are forked from a server that has imported
torch, diffusers and transformers already, which takes a command's start from five seconds to a tenth of one."""
import multiprocessing
import os
import signal
import sys
import tempfile

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
os.environ.setdefault("HF_HUB_OFFLINE", "1")
HERE = [ROOT, os.path.join(ROOT, "tests")]
sys.path[:0] = [p for p in HERE if p not in sys.path]
os.environ["PYTHONPATH"] = os.pathsep.join(HERE)  # the server, which imports this file as well, knows no other path before Python 3.13

import diffusers  # noqa: E402
import matplotlib.pyplot  # noqa: E402, F401
import torch  # noqa: E402
import transformers  # noqa: E402

import sample  # noqa: E402
import train  # noqa: E402

for lazy in ("StableDiffusionPipeline", "DDIMScheduler", "UNet2DConditionModel", "AutoencoderKL"):
    getattr(diffusers, lazy)
for lazy in ("CLIPTextModel", "CLIPTokenizer"):
    getattr(transformers, lazy)

server = multiprocessing.get_context("forkserver")
server.set_forkserver_preload(["child"])


def _main(argv, out, environment, kill, change):
    """In the child: everything printed goes to the file `out`; kill = (signal name, module, function, at which call)."""
    with open(out, "wb") as f:
        os.dup2(f.fileno(), 1), os.dup2(f.fileno(), 2)
    sys.stdout, sys.stderr = (os.fdopen(n, "w", buffering=1) for n in (1, 2))
    os.environ.update(environment)
    torch.set_num_threads(1)
    if kill:
        name, module, function, at = kill
        module, calls = sys.modules[module], []
        original = getattr(module, function)
        def bomb(*a, **kw):
            calls.append(1)
            if len(calls) == at:
                os.kill(os.getpid(), getattr(signal, f"SIG{name}"))
            return original(*a, **kw)
        setattr(module, function, bomb)
    if change:
        change()
    sys.argv = argv
    sample.run_cli(sys.modules[os.path.splitext(argv[0])[0]].main)


class Child:
    """A command that runs: poll() and wait() as subprocess.Popen's; wait returns (exit code, all that it printed)."""

    def __init__(self, *argv, kill=None, environment=None, change=None):
        handle, self.out = tempfile.mkstemp(suffix=".log")
        os.close(handle)
        self.process = server.Process(target=_main, args=([str(a) for a in argv], self.out, environment or {}, kill, change))
        self.process.start()
        self.pid = self.process.pid

    def poll(self):
        return self.process.exitcode

    def wait(self, timeout=150):
        self.process.join(timeout)
        if self.process.exitcode is None:
            self.process.kill()
            self.process.join()
        with open(self.out, errors="replace") as f:
            return self.process.exitcode, f.read()


def ranks(*argv, n=2, change=None):
    """The same command as n ranks, as torchrun would start them; [(exit code, output)] by rank."""
    import socket
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    children = [Child(*argv, change=change, environment=dict(RANK=str(r), LOCAL_RANK=str(r), WORLD_SIZE=str(n), MASTER_ADDR="127.0.0.1",
                                                             MASTER_PORT=str(port))) for r in range(n)]
    return [c.wait() for c in children]
