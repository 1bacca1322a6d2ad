"""Several processes on a CPU: `accelerate launch --num_processes N --cpu` announces them, and starts one."""

import os
import sys

import psutil

from eval.errors import UserError

COUNT = ("--num_processes", "--num-processes")


def asked_processes(words: list[str]) -> int | None:
    """N of `--num_processes N` in the words of a launcher's command line; None where it does not stand."""
    for i, word in enumerate(words):
        name, equals, value = word.partition("=")
        if name in COUNT:
            return int(value if equals else words[i + 1])
    return None


def start_missing_processes() -> None:
    """Becomes `torchrun` where accelerate 1.15 left this process alone of several; else does nothing.

    Without an MPI host file its launcher sets the address of the process group but neither rank nor size, so
    that one process would train and call itself the only one.

    Raises:
        UserError: how many were asked for cannot be told.
    """
    told = os.environ.get("ACCELERATE_USE_CPU", "").lower() == "true" and "MASTER_PORT" in os.environ
    if not told or "RANK" in os.environ or any(name.startswith(("OMPI_", "PMI_")) for name in os.environ):
        return
    count = asked_processes(psutil.Process(os.getppid()).cmdline())
    if count is None:
        mend = "start them with torchrun --nproc_per_node N distill/train.py ..."
        raise UserError("accelerate launch --cpu", "one process of several was started", mend)
    for name in ("MASTER_ADDR", "MASTER_PORT"):
        del os.environ[name]
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(count)]
    os.execv(sys.executable, [sys.executable, *torchrun, *sys.argv])
