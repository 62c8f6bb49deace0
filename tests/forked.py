"""Commands and ranks without the seconds that the import of torch takes: they are forks of a process that has imported it.

`python()` in place of `sys.executable`: a small program hands its arguments, streams, environment and folder to a server, which forks, and
ends as the fork ended. The fork is no other than Python a moment after `import torch`: it imports `cram_kernels` anew, and flushes its
output at the exit. It must tell its process id to a test that kills it. What comes before that import takes `sys.executable`.
"""

import atexit
import contextlib
import functools
import json
import multiprocessing
import os
import runpy
import select
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

PRELOADED = ("torch", "pytest", "safetensors.torch", "torch._dynamo", "torch.distributed.fsdp", "torch.distributed.checkpoint")


def spawn(function: Callable, arguments: tuple, ranks: int) -> None:
    """torch.multiprocessing.spawn(function, arguments, ranks), in forks."""
    import torch.multiprocessing

    multiprocessing.set_forkserver_preload(PRELOADED)
    torch.multiprocessing.start_processes(rank, (function, arguments), ranks, start_method="forkserver")


KEPT: list[Any] = []


def rank(number: int, function: Callable, arguments: tuple) -> None:
    """function(number, *arguments), whose process groups last until the process ends.

    Whoever drops the last reference to a group waits in its destructor for gloo's threads, and holds the interpreter's lock. Such a thread
    may need that lock to free a finished collective, and then torch hangs. DistributedDataParallel is one that outlives
    `destroy_process_group`.
    """
    import torch.distributed
    from torch.distributed import distributed_c10d

    destroy = torch.distributed.destroy_process_group

    def keep_and_destroy(*group: Any) -> None:
        KEPT.extend(distributed_c10d._world.pg_map)
        destroy(*group)

    torch.distributed.destroy_process_group = keep_and_destroy
    function(number, *arguments)


@functools.cache
def python() -> list[str]:
    if not hasattr(os, "pidfd_open"):  # Linux alone has it
        return [sys.executable]
    folder = tempfile.TemporaryDirectory(prefix="forked")
    address = str(Path(folder.name) / "server")
    environment = os.environ | {"OPENBLAS_NUM_THREADS": "1"}  # of the server alone
    server = subprocess.Popen([sys.executable, __file__, address], env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert server.stdin is not None and server.stdout is not None
    assert server.stdout.readline() == b"ready\n"
    atexit.register(folder.cleanup)
    atexit.register(server.stdin.close)  # which ends it
    return [sys.executable, "-I", "-S", __file__, address]


def ask(address: str, arguments: list[str]) -> None:
    """The small program."""
    with socket.socket(socket.AF_UNIX) as server:
        server.connect(address)
        request = json.dumps([arguments, dict(os.environ), os.getcwd()], ensure_ascii=True).encode()
        socket.send_fds(server, [len(request).to_bytes(8, "big")], [0, 1, 2])
        server.sendall(request)
        status = int(server.recv(16) or -signal.SIGKILL)
    if status < 0:
        signal.signal(-status, signal.SIG_DFL)
        os.kill(os.getpid(), -status)
    os._exit(status)


def serve(address: str) -> None:
    """Until standard input is closed. Returns in the forks, as what they are to run."""
    for name in PRELOADED:
        with contextlib.suppress(ImportError):
            __import__(name)
    assert len(os.listdir("/proc/self/task")) == 1, "a fork has but one of its threads"
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for the processes that wait for the forks
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(address)
    listener.listen()
    print("ready", flush=True)
    while sys.stdin not in select.select([listener, sys.stdin], [], [])[0]:
        client, _ = listener.accept()
        if os.fork() == 0:
            listener.close()
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            header, streams, _, _ = socket.recv_fds(client, 8, 3)
            with client.makefile("rb") as file:
                arguments, environment, folder = json.loads(file.read(int.from_bytes(header, "big")))
            if (child := os.fork()) == 0:
                client.close()
                return become(arguments, environment, folder, streams)
            for stream in streams:
                os.close(stream)
            ended = os.pidfd_open(child)
            if ended not in select.select([ended, client], [], [])[0]:  # the small program is gone
                os.kill(child, signal.SIGKILL)
            with contextlib.suppress(BrokenPipeError):
                client.sendall(str(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])).encode())
            os._exit(0)
        client.close()
    os._exit(0)


def become(arguments: list[str], environment: dict[str, str], folder: str, streams: list[int]) -> None:
    """A Python that has just started with these arguments: -c CODE, -m MODULE or a script, each with its own."""
    for number, stream in enumerate(streams):
        os.dup2(stream, number)
        os.close(stream)
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    sys.stdin = open(0, closefd=False)
    sys.stdout = open(1, "w", buffering=1 if os.isatty(1) else -1, closefd=False)
    sys.stderr = open(2, "w", buffering=1, errors="backslashreplace", closefd=False)
    sys.__stdin__, sys.__stdout__, sys.__stderr__ = sys.stdin, sys.stdout, sys.stderr
    kind = arguments.pop(0) if arguments[0] in ("-c", "-m") else ""
    what, *rest = arguments
    sys.argv = [kind or what, *rest]
    sys.path[0] = {"-c": "", "-m": folder}.get(kind, str(Path(what).resolve().parent))
    if kind == "-c":
        exec(compile(what, "<string>", "exec"), {"__name__": "__main__", "__builtins__": __builtins__})
    elif kind == "-m":
        runpy.run_module(what, run_name="__main__", alter_sys=True)
    else:
        runpy.run_path(what, run_name="__main__")


if __name__ == "__main__":
    if len(sys.argv) == 2:
        serve(sys.argv[1])
    else:
        ask(sys.argv[1], sys.argv[2:])
