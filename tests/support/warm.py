"""A Python that starts at once: `python()` is a program to start in the place of `sys.executable`.

A process of its own costs seven seconds of importing before it does what a test asks of it. Here a
server imports once and forks a process for each start: with the words, folder, environment and
standard streams of the program that a test has started, which hands on signals and ends as the
process ends. `process_of` is that process where a test wants it dead at this moment. What is read
from the environment while packages are imported is that of the server.
"""

import atexit
import contextlib
import functools
import gc
import json
import os
import runpy
import select
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import traceback
from importlib import import_module
from pathlib import Path

ROOT = Path(__file__).parents[2]
IMPORTED = [
    "accelerate.commands.launch",
    "deepspeed",
    "tensorboard",
    "torch.distributed.run",
    "transformers.models.clip.modeling_clip",
    "transformers.models.llama.modeling_llama",
    "transformers.models.llava.modeling_llava",
    "transformers.models.llava.processing_llava",
    "fmtrain.sft",
]
HANDED_ON = (signal.SIGHUP, signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)
PROGRAM = """#!/bin/sh
exec {python} -I -S {file} {place} "$@"
"""


@functools.cache
def python() -> str:
    """The program, of a server that ends with this process."""
    folder = Path(tempfile.mkdtemp(prefix="warm"))
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(folder / "socket"))
    listener.listen(64)
    environment = {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu"}
    server = subprocess.Popen(
        [sys.executable, __file__, "--serve", str(listener.fileno()), str(folder)],
        env=os.environ | environment | {"PYTHONPATH": str(ROOT)},
        stdin=subprocess.PIPE,  # closed when this process ends, and then the server ends
        pass_fds=[listener.fileno()],
    )
    listener.close()
    program = folder / "python"
    program.write_text(PROGRAM.format(python=sys.executable, file=__file__, place=folder))
    program.chmod(0o755)

    def end() -> None:
        server.stdin.close()
        server.wait()

    atexit.register(end)
    return str(program)


def process_of(program: int) -> int:
    """The process that runs for one that was started as `python()`, by their ids."""
    found = Path(python()).parent / str(program)
    return process_of(int(found.read_text())) if found.exists() else program


# --- the program ----------------------------------------------------------------------------------


def ask(place: str, words: list[str]) -> None:
    """Have the server start a process, and end as it ends."""
    connection = socket.socket(socket.AF_UNIX)
    connection.connect(f"{place}/socket")
    for number in HANDED_ON:
        signal.signal(number, lambda number, frame: connection.send(bytes([number])))
    request = {"id": os.getpid(), "words": words, "folder": os.getcwd(), "env": {**os.environ}}
    text = json.dumps(request).encode()
    socket.send_fds(connection, [len(text).to_bytes(8, "big")], [0, 1, 2])
    connection.sendall(text)
    status = int(connection.makefile().read())
    if status < 0:
        signal.signal(-status, signal.SIG_DFL)
        os.kill(os.getpid(), -status)
    os._exit(status)


# --- the server -----------------------------------------------------------------------------------


def serve(listener: socket.socket, place: str) -> list[str]:
    """Fork a process for each program that asks. Returns in the new process alone, with its
    words."""
    while True:
        readable, _, _ = select.select([listener, sys.stdin], [], [])
        if listener not in readable:
            shutil.rmtree(place)
            os._exit(0)
        connection, _ = listener.accept()
        if os.fork() == 0:
            break
        connection.close()
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass
    listener.close()
    length, streams, _, _ = socket.recv_fds(connection, 8, 3)
    with connection.makefile("rb", buffering=0) as file:
        request, left = b"", int.from_bytes(length, "big")
        while len(request) < left:
            request += file.read(left - len(request))
    asked = json.loads(request)
    process = os.fork()
    if process:
        watch(connection, process, Path(place) / str(asked["id"]))
    connection.close()
    for number, stream in enumerate(streams):
        os.dup2(stream, number)
        os.close(stream)
    os.chdir(asked["folder"])
    os.environ.clear()
    os.environ.update(asked["env"])
    sys.executable = f"{place}/python"
    return asked["words"]


def watch(connection: socket.socket, process: int, name: Path) -> None:
    """Hand a program's signals to its process, which is killed with it; then its status back."""

    def hand_on() -> None:
        while number := connection.recv(1):
            os.kill(process, number[0])
        os.kill(process, signal.SIGKILL)

    name.write_text(str(process))
    signals = threading.Thread(target=hand_on)
    signals.start()
    # Not reaped, so that a signal that comes when it has ended reaches no other process.
    end = os.waitid(os.P_PID, process, os.WEXITED | os.WNOWAIT)
    name.unlink()
    status = end.si_status if end.si_code == os.CLD_EXITED else -end.si_status
    with contextlib.suppress(BrokenPipeError):  # a program that was killed
        connection.sendall(str(status).encode())
        connection.shutdown(socket.SHUT_WR)
    # All signals are read, up to the end of the program: a socket that is closed with one unread is
    # reset, and the program would not get its status.
    signals.join()
    os.waitpid(process, 0)
    os._exit(0)


def run(words: list[str]) -> None:
    """What `python WORDS` does, of `-u`, `-c`, `-m` and a script."""
    if words[0] == "-u":
        sys.stdout.reconfigure(write_through=True)
        words = words[1:]
    kind, *rest = words
    path = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    sys.path[1:1] = [folder for folder in path if folder]
    if kind == "-c":
        sys.argv, sys.path[0] = ["-c", *rest[1:]], ""
        exec(compile(rest[0], "<string>", "exec"), {"__name__": "__main__"})
    elif kind == "-m":
        name = rest[0]
        sys.argv, sys.path[0] = rest, os.getcwd()
        for loaded in (name, f"{name}.__main__"):
            if not hasattr(sys.modules.get(loaded), "__path__"):
                sys.modules.pop(loaded, None)
        runpy.run_module(name, run_name="__main__", alter_sys=True)
    else:
        sys.argv, sys.path[0] = words, str(Path(kind).parent)
        runpy.run_path(kind, run_name="__main__")


def ended(words: list[str]) -> int:
    """The exit code of what `python WORDS` does."""
    try:
        run(words)
    except SystemExit as end:
        if end.code is None or isinstance(end.code, int):
            return end.code or 0
        print(end.code, file=sys.stderr)
        return 1
    except BaseException:
        traceback.print_exc()
        return 1
    return 0


if __name__ == "__main__":
    if sys.argv[1] == "--serve":
        status = []
        # Registered before all others and so called after them: to take down what was imported
        # would cost half a second.
        atexit.register(lambda: (sys.stdout.flush(), os._exit(*status)))
        sys.path[0] = str(ROOT)
        for module in IMPORTED:
            import_module(module)
        gc.freeze()
        status.append(ended(serve(socket.socket(fileno=int(sys.argv[2])), sys.argv[3])))
    else:
        ask(sys.argv[1], sys.argv[2:])
