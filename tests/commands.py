"""The library's commands, run as from a shell, with all roots below one folder and no way to the network.

Of the seconds that `python -m` takes most are imports. So a command is forked from a process that has imported torch
and the rest already, and from there on it is `python -m`: arguments, variables, streams, exit code. So are the kernels
that it starts.
"""

import contextlib
import functools
import json
import multiprocessing
import os
import resource
import runpy
import signal
import subprocess
import sys
import tempfile
import threading
import traceback
from pathlib import Path

import matplotlib

from paperlib.system import files


def settings(chosen):
    return [word for name, value in chosen.items() for word in ("--set", f"{name}={json.dumps(value)}")]


NOTEBOOK = ["paperlib.reproduce", "--only", "02"]  # with models as small as can be
NOTEBOOK += settings({"steps": 20, "codes": 150, "plane": 4, "hidden": [8], "decoders": [2, 4]})
ROOTS = ("data", "runs", "results", "figures")
PRELOADED = ["pytest", "commands", "paperlib.experiments", "paperlib.runs.launch", "papermill", "nbclient.exceptions"]
PRELOADED += ["jupyter_client.manager", "ipykernel.kernelapp", "torch._dynamo", "sklearn.datasets", "scipy.stats"]
PRELOADED += ["matplotlib.figure", "matplotlib.backends.backend_agg", "lmdb"]
_FORKS = multiprocessing.get_context("forkserver")
_FORKS.set_forkserver_preload(PRELOADED)


def environment(home, variables=None):
    """The variables of this process, with the roots below `home`; `variables` are added."""
    roots = {f"PAPERLIB_{root.upper()}": str(home / root) for root in ROOTS}
    proxies = {f"{kind}_proxy": "http://127.0.0.1:9" for kind in ("http", "https")}
    return os.environ | roots | proxies | {"OMP_NUM_THREADS": "1", "TQDM_DISABLE": "1"} | (variables or {})


def run(words, home, variables=None, limits=None, forked=True):
    """`python -m` with these `words`; not `forked`, it is that command line itself.

    `limits` are of the `resource` module: {"FSIZE": n} for a disk with room for n bytes in each file, {"AS": n} for
    n bytes of memory more than the imports take.
    """
    if not forked:
        line, variables = [sys.executable, "-m", *words], environment(home, variables)
        return subprocess.run(line, cwd=files.ROOT, env=variables, capture_output=True, text=True, timeout=280)
    with tempfile.TemporaryDirectory() as folder:
        process = start(words, home, Path(folder), variables, limits)
        process.join(280)
        stop(process, Path(folder))
        return finished(Path(folder))


def start(words, home, streams, variables=None, limits=None):
    """The same in the background; what it prints goes to files of the folder `streams`, as do its code and pids."""
    process = _FORKS.Process(target=_command, args=(words, environment(home, variables), streams, limits or {}))
    process.start()
    _note(process.pid, streams)
    return process


def finished(streams):
    """What a command that has ended left in `streams`; its code is -9 where it was stopped."""
    said = {name: file.read_text() if (file := streams / name).exists() else "" for name in ("out", "err", "code")}
    return subprocess.CompletedProcess([], int(said["code"] or -signal.SIGKILL), said["out"], said["err"])


def stop(process, streams):
    """SIGKILL for a command that still runs, and for its kernels."""
    if process.is_alive():
        for pid in (streams / "pids").read_text().split():
            with contextlib.suppress(ProcessLookupError):
                os.kill(int(pid), signal.SIGKILL)
        process.join()


def _note(pid, streams):
    with (streams / "pids").open("a") as file:
        file.write(f"{pid}\n")


def _command(words, variables, streams, limits):
    """Become the command, in a forked process."""
    import jupyter_client.provisioning.local_provisioner as provisioner
    import torch
    import tqdm

    for number, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(streams / name, os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
    torch.set_num_threads(1)
    tqdm.tqdm.set_lock(threading.RLock())  # its own would outlive a kill
    for name, value in limits.items():
        in_use = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize() if name == "AS" else 0
        resource.setrlimit(getattr(resource, f"RLIMIT_{name}"), (in_use + value,) * 2)
    # Kernels are forked now, while there are no threads, and wait for what to do.
    kernels = [_Kernel() for _ in files.NOTEBOOKS.glob("[0-9]*.ipynb")] if words[0] == "paperlib.reproduce" else []
    provisioner.launch_kernel = lambda *line, **options: kernels.pop().launch(streams, *line, **options)
    (streams / "code").write_text(str(_become(words, variables, files.ROOT)))


def _become(words, variables, folder):
    os.environ.clear()
    os.environ.update(variables)
    os.chdir(folder)
    sys.argv = list(words)
    try:
        runpy.run_module(words[0], run_name="__main__", alter_sys=True)
    except SystemExit as end:
        return end.code or 0
    except BaseException:
        traceback.print_exc()
        return 1
    return 0


class _Kernel:
    """A process to become a kernel, with what jupyter_client asks of a `subprocess.Popen`."""

    stdin = stdout = stderr = returncode = None

    def __init__(self):
        receiver, self.sender = os.pipe()
        self.pid = os.fork()
        if self.pid == 0:
            os.close(self.sender)
            if line := os.fdopen(receiver).readline():
                # What matplotlib, imported long ago, would read from the variable that a kernel sets.
                matplotlib.rcParams["backend"] = "module://matplotlib_inline.backend_inline"
                _become(*json.loads(line))
            os._exit(0)
        os.close(receiver)
        os.setpgid(self.pid, self.pid)  # jupyter_client sends its signals to the kernel's group

    def launch(self, streams, line, env=None, cwd=None, **options):
        words = [*line[line.index("-m") + 1 :], f"--IPKernelApp.parent_handle={os.getpid()}"]
        _note(self.pid, streams)
        os.write(self.sender, (json.dumps([words, dict(env or os.environ), str(cwd or os.getcwd())]) + "\n").encode())
        return self

    def poll(self):
        if self.returncode is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            self.returncode = os.waitstatus_to_exitcode(status) if pid else None
        return self.returncode

    def wait(self, timeout=None):
        if self.returncode is None:
            self.returncode = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
        return self.returncode

    def send_signal(self, number):
        os.kill(self.pid, number)

    terminate = functools.partialmethod(send_signal, signal.SIGTERM)
    kill = functools.partialmethod(send_signal, signal.SIGKILL)
