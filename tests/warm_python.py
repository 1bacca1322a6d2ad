"""A Python that has imported torch and transformers, from which the commands of tests are forked.

Most of what a command costs in the tests is the import of these two: once by itself, and once by the process that
its workers come from. `warm_python()` is the path of an interpreter for both. It hands its arguments, environment,
folder and open files to a server, which forks; the child runs what `python -m MODULE` or `python FILE` would, and
nothing of this project is imported before. The plain interpreter starts whatever else there is, what measures its
own process, and what would import the two in another way than the server did.
"""

import atexit
import fcntl
import gc
import importlib
import json
import multiprocessing
import os
import resource
import runpy
import selectors
import shutil
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from functools import cache, partial
from pathlib import Path
from typing import Any, NoReturn

PRELOAD = ("torch", "transformers.modeling_utils", "accelerate", "pydantic", "scipy.special")
READ_AT_IMPORT = ("PYTHON", "OMP_", "MKL_", "ATEN_", "TORCH", "CUDA_", "HF_", "TRANSFORMERS_", "LD_")
ROOMS = ("distill", "compress", "eval", "scripts", "accelerate.commands.launch")
MEASURED = ("eval.cost.worker", "eval.serve.worker")
FORK_SERVER = (
    "from multiprocessing.forkserver"  # how the program of the process begins that workers are forked from
)
CLIENT = """#!{python} -IS
import importlib.util
spec = importlib.util.spec_from_file_location("warm_python", {file!r})
module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
module.start({python!r}, {address!r}, {state!r})
"""


@cache
def warm_python() -> Path:
    """The path of the interpreter; its server ends with this process."""
    folder = Path(tempfile.mkdtemp(prefix="warm-"))
    address, path = str(folder / "socket"), folder / "python"
    server = subprocess.Popen([sys.executable, __file__, address], stdin=subprocess.PIPE)
    atexit.register(shutil.rmtree, folder)
    atexit.register(server.communicate)  # the end of its input is its end
    facts = {"python": sys.executable, "file": __file__, "address": address, "state": read_at_import()}
    path.write_text(CLIENT.format(**facts))
    path.chmod(0o755)
    return path


def read_at_import() -> dict[str, str]:
    """What an imported library may have taken from its process; PYTHONPATH is followed by every child."""
    chosen = {key: value for key, value in os.environ.items() if key.startswith(READ_AT_IMPORT)}
    limits = [resource.getrlimit(limit)[0] for limit in (resource.RLIMIT_AS, resource.RLIMIT_FSIZE)]
    return {**chosen, "PYTHONPATH": "", "limits": str(limits)}


def is_warm(words: list[str]) -> bool:
    """Are these the arguments of a command of the project, or of a process that such a command starts?"""
    if words[:1] == ["-m"]:
        return words[1].startswith(ROOMS) and words[1] not in MEASURED
    return words[0].endswith(".py") or (words[0] == "-c" and words[1].startswith(FORK_SERVER))


def start(python: str, address: str, state: dict[str, str]) -> None:
    """The client: runs its arguments in a child of the server, or becomes the plain interpreter."""
    words = sys.argv[2:] if sys.argv[1:2] == ["-B"] else sys.argv[1:]  # multiprocessing repeats this flag
    if not words or not is_warm(words) or read_at_import() != state:
        os.execv(python, [python, *sys.argv[1:]])
    files = [0, 1, 2, *(n for n in map(int, os.listdir("/proc/self/fd")) if n > 2 and _is_inherited(n))]
    mask = [int(number) for number in signal.pthread_sigmask(signal.SIG_BLOCK, [])]
    request = {"words": words, "cwd": os.getcwd(), "env": dict(os.environ), "files": files, "mask": mask}
    data = json.dumps({**request, "executable": sys.argv[0]}).encode()
    with socket.socket(socket.AF_UNIX) as connection:
        _connect(connection, address)
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, lambda number, _: connection.send(bytes([number])))
        socket.send_fds(connection, [struct.pack("q", len(data))], files)
        connection.sendall(data)
        status = struct.unpack("i", connection.recv(4))[0]
    if os.WIFSIGNALED(status):
        with suppress(OSError):  # SIGKILL has no handler to be taken back
            signal.signal(os.WTERMSIG(status), signal.SIG_DFL)
        os.kill(os.getpid(), os.WTERMSIG(status))
    os._exit(os.WEXITSTATUS(status))


def _is_inherited(number: int) -> bool:
    try:
        return os.get_inheritable(number)
    except OSError:  # of the listing itself
        return False


def _connect(connection: socket.socket, address: str) -> None:
    """The server listens once it has imported."""
    while True:
        try:
            return connection.connect(address)
        except (FileNotFoundError, ConnectionRefusedError):
            time.sleep(0.05)


class Server:
    """Forks a child for each connection, sends its exit status, and kills it where its client is gone."""

    def __init__(self, address: str) -> None:
        self.listener = socket.socket(socket.AF_UNIX)
        self.listener.bind(address)
        self.listener.listen(64)
        self.wakeup, self.waker = socket.socketpair()
        self.waker.setblocking(False)
        signal.set_wakeup_fd(self.waker.fileno())
        signal.signal(signal.SIGCHLD, lambda *_: None)
        self.selector = selectors.DefaultSelector()
        for stream in (sys.stdin, self.listener, self.wakeup):
            self.selector.register(stream, selectors.EVENT_READ)
        self.clients = dict[socket.socket, int]()  # connection -> process

    def run(self) -> dict[str, Any] | None:
        """Serves until its input ends; in a child, returns what the client asked for."""
        while True:
            for key, _ in self.selector.select():
                if key.fileobj is sys.stdin:
                    return None
                if key.fileobj is self.wakeup:
                    self.wakeup.recv(4096)
                    self.send_statuses()
                elif key.fileobj is self.listener:
                    if (request := self.fork()) is not None:
                        return request
                elif key.fileobj in self.clients:
                    self.pass_signal(key.fileobj)

    def fork(self) -> dict[str, Any] | None:
        connection, _ = self.listener.accept()
        header, files, _, _ = socket.recv_fds(connection, 8, 253)
        size, data = struct.unpack("q", header)[0] if len(header) == 8 else 1, b""
        while len(data) < size and (part := connection.recv(size - len(data))):
            data += part
        if len(data) < size:  # its client was killed while it asked
            for number in files:
                os.close(number)
            connection.close()
            return None
        request: dict[str, Any] = json.loads(data)
        if (process := os.fork()) == 0:
            signal.set_wakeup_fd(-1)
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            self.selector.close()  # here and not by their deletion: their numbers will be those of other files
            for own in (self.listener, self.wakeup, self.waker, connection, *self.clients):
                own.close()
            take_over(request, files)
            return request
        for number in files:
            os.close(number)
        self.clients[connection] = process
        self.selector.register(connection, selectors.EVENT_READ)
        return None

    def pass_signal(self, connection: socket.socket) -> None:
        received = connection.recv(1)
        if received:
            os.kill(self.clients[connection], received[0])
        else:
            with suppress(ProcessLookupError):  # it has no group yet, or is done
                os.killpg(self.clients[connection], signal.SIGKILL)
            os.kill(self.clients[connection], signal.SIGKILL)
            self.selector.unregister(connection)

    def send_statuses(self) -> None:
        for connection, process in list(self.clients.items()):
            done, status = os.waitpid(process, os.WNOHANG)
            if done:
                del self.clients[connection]
                if connection in self.selector.get_map():
                    self.selector.unregister(connection)
                    with suppress(BrokenPipeError):  # its client has just gone
                        connection.send(struct.pack("i", status))
                connection.close()


def take_over(request: dict[str, Any], files: list[int]) -> None:
    """Gives a child the session, files, folder, environment, path and signals of its client."""
    os.setsid()
    high = [fcntl.fcntl(number, fcntl.F_DUPFD, 1000) for number in files]
    os.closerange(3, 1000)
    for source, number in zip(high, request["files"], strict=True):
        os.dup2(source, number)
        os.close(source)
    os.chdir(request["cwd"])
    os.environ.clear()
    os.environ.update(request["env"])
    sys.path[:0] = [place for place in request["env"].get("PYTHONPATH", "").split(os.pathsep) if place]
    sys.executable = request["executable"]
    multiprocessing.set_executable(sys.executable)
    tempfile.tempdir = None
    sys.stdout.reconfigure(line_buffering=os.isatty(1))  # type: ignore[union-attr]
    signal.pthread_sigmask(signal.SIG_SETMASK, request["mask"])


def run_words(words: list[str]) -> None:
    """What `python WORDS` does."""
    kind, *rest = words
    if kind == "-c":
        sys.argv = ["-c", *rest[1:]]
        exec(compile(rest[0], "<string>", "exec"), {"__name__": "__main__"})
    elif kind == "-m":
        sys.path.insert(0, os.getcwd())
        sys.argv = rest
        runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
    else:
        sys.path.insert(0, str(Path(kind).resolve().parent))
        sys.argv = words
        runpy.run_path(kind, run_name="__main__")


def end(run: Callable[[], None]) -> NoReturn:
    """Runs and ends as the interpreter does, but for the deletion of every module, which takes half a second."""
    code: Any = 0
    try:
        run()
    except SystemExit as error:
        code = error.code or 0
    except BaseException:
        traceback.print_exc()
        code = 1
    if isinstance(code, str):
        print(code, file=sys.stderr)
        code = 1
    threading._shutdown()  # type: ignore[attr-defined]  # waits for the threads that are no daemons
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    del sys.path[0]  # tests/
    for library in PRELOAD:
        importlib.import_module(library)
    gc.collect()
    gc.freeze()
    if (asked := Server(sys.argv[1]).run()) is not None:
        end(partial(run_words, asked["words"]))
