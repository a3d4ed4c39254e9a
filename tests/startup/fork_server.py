"""Starts Ray workers as forks of one process that has imported their packages.

A new worker spends up to 9 s of CPU time on importing them. A fork imports only Ray and the project. The tests start
about 100 workers.

    raylet ─> Python ─> sitecustomize.py: `hand_over` ─ command, environment, standard streams ─> `serve`
                        waits until the worker ends                                               └─> fork: the worker
"""

import ctypes
import fcntl
import gc
import json
import os
import runpy
import signal
import socket
import subprocess
import sys
from contextlib import suppress
from importlib import import_module
from pathlib import Path
from typing import NoReturn

PACKAGES = (
    "datasets",
    "deepspeed",
    "fastapi",
    "peft",
    "safetensors.torch",
    "torch._dynamo",
    "torchdata.stateful_dataloader",
    "transformers.models.llama.modeling_llama",
    "transformers.trainer",
    "uvicorn",
    "vllm.entrypoints.llm",
    "vllm.model_executor.model_loader",
    "vllm.model_executor.models.llama",
    "vllm.v1.attention.backends.cpu_attn",
    "vllm.v1.worker.cpu_worker",
)
THREADS = (1, 2)  # OMP_NUM_THREADS is read when torch is imported, so each number has its own server
KEPT = "FORK_SERVER"  # must stay first in the environment: Ray sets process titles by overwriting memory from there
CONTEXT = "--serialized-runtime-env-context="


def start(address: str) -> list[subprocess.Popen[bytes]]:
    """Start the servers. On a machine with a GPU there are none: a fork could not use CUDA."""
    if Path("/dev/nvidiactl").exists():
        return []
    single = {
        "OPENBLAS_NUM_THREADS": "1",
        "JE_ARROW_MALLOC_CONF": "background_thread:false",
    }  # a fork lacks other threads
    return [
        subprocess.Popen(
            [sys.executable, __file__, f"{address}-{threads}"],
            env={KEPT: address, **os.environ, **single, "OMP_NUM_THREADS": str(threads), "OMP_WAIT_POLICY": "PASSIVE"},
        )
        for threads in THREADS
    ]


def hand_over(address: str) -> None:
    """Ask a server to run this command, and exit when the worker exits. Return if no server can run it.

    Ray's command is `python setup_worker.py default_worker.py OPTION... --serialized-runtime-env-context=JSON`.
    """
    words, context = [], {}
    for word in sys.orig_argv[2:]:
        if word.startswith(CONTEXT):
            context = json.loads(word.removeprefix(CONTEXT))
        elif not word.startswith("--language="):
            words.append(word)
    environment, folder = os.environ | context.get("env_vars", {}), os.getcwd()
    match context.get("command_prefix", []):
        case []:
            pass
        case ["cd", folder, "&&"]:  # a job with a working directory
            pass
        case _:
            return
    if context.get("py_executable", sys.executable) != sys.executable or context.get("override_worker_entrypoint"):
        return
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as server:
        try:
            server.connect(f"{address}-{environment.get('OMP_NUM_THREADS')}")
        except OSError:
            return
        request = {
            "words": words, "environment": environment, "folder": folder,
            "path": [*environment.get("PYTHONPATH", "").split(os.pathsep), *sys.path],
            "niceness": os.nice(0), "pid": os.getpid(),
        }  # fmt: skip
        socket.send_fds(server, [json.dumps(request).encode()], [0, 1, 2])
        server.recv(1)  # nothing comes: it returns when the worker has ended
    os._exit(0)


def serve(address: str) -> NoReturn:
    """Fork a worker per request, until the tests end. The imports wait for the first request."""
    end_with_parent()
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    listener.bind(address)
    listener.listen(64)
    connection, _ = listener.accept()
    import_packages()
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # so that ended workers do not become zombies
    while True:
        if not os.fork():
            listener.close()
            run_worker(connection, Path(address).parent)
        connection.close()
        connection, _ = listener.accept()


def import_packages() -> None:
    """Import what the run's actors import, except Ray, which needs its own environment, and the project itself, which
    a job may import from another folder.

    Other packages keep what they read from the server's environment: in all workers, huggingface_hub is offline and
    torch does not compile.
    """
    from metaalign_rl.runtime.vllm_setup import prepare_vllm

    prepare_vllm()
    os.environ["DS_ACCELERATOR"] = "cpu"
    sys.modules["ray"] = None  # type: ignore[assignment]  # vLLM imports Ray if it can
    for name in PACKAGES:
        import_module(name)
    for name in list(sys.modules):
        if name.partition(".")[0] in ("metaalign_rl", "reward", "ray"):
            del sys.modules[name]
    assert len(os.listdir("/proc/self/task")) == 1, "a fork would lack the other threads"
    gc.collect()
    gc.freeze()  # so that a collection in a worker does not copy the pages of all objects


def run_worker(connection: socket.socket, workers: Path) -> NoReturn:
    """Become the worker that was asked for, and run it. `workers`: see `processes.worker_of`."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    os.setpgrp()  # when a worker ends, Ray kills its process group
    message, streams, _, _ = socket.recv_fds(connection, 2**20, 3)
    request = json.loads(message)
    kill_when_closed(connection)
    replace_text(workers / str(request["pid"]), str(os.getpid()))
    for stream, number in zip(streams, (0, 1, 2), strict=True):
        os.dup2(stream, number)
        os.close(stream)
    os.chdir(request["folder"])
    os.nice(request["niceness"] - os.nice(0))
    set_environment(request["environment"])
    sys.path[:] = request["path"]
    sys.argv = request["words"]
    runpy.run_path(sys.argv[0], run_name="__main__")
    sys.exit()


def replace_text(path: Path, text: str) -> None:
    """Write a file that others may read at any time."""
    new = path.with_suffix(".new")
    new.write_text(text)
    new.replace(path)


def set_environment(variables: dict[str, str]) -> None:
    """Change what differs, so that `KEPT` remains where it is."""
    for name in os.environ.keys() - variables:
        del os.environ[name]
    os.environ.update({name: value for name, value in variables.items() if os.environ.get(name) != value})


def end_with_parent() -> None:
    """Have the kernel kill this process when its parent ends."""
    set_parent_death_signal = 1  # PR_SET_PDEATHSIG
    ctypes.CDLL(None).prctl(set_parent_death_signal, signal.SIGKILL)


def kill_when_closed(connection: socket.socket) -> None:
    """Have the kernel kill this process when the other end, the process that asked for it, is gone."""
    set_signal = 10  # F_SETSIG
    fcntl.fcntl(connection, fcntl.F_SETOWN, os.getpid())
    fcntl.fcntl(connection, set_signal, signal.SIGKILL)
    fcntl.fcntl(connection, fcntl.F_SETFL, os.O_ASYNC | os.O_NONBLOCK)
    with suppress(BlockingIOError):  # raised if it is open: nothing is ever sent
        connection.recv(1)
        os._exit(1)  # it was gone before


if __name__ == "__main__":
    serve(sys.argv[1])
