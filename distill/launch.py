"""Several processes on a CPU: `accelerate launch` announces them, and starts one."""

import os
import sys
from pathlib import Path

import psutil

from eval.errors import UserError

COUNT = ("--num_processes", "--num-processes")
CONFIG = ("--config_file", "--config-file")


def _value(words: list[str], names: tuple[str, ...]) -> str | None:
    """V of `--name V` or `--name=V` in the words of a command line."""
    for i, word in enumerate(words):
        name, equals, value = word.partition("=")
        if name in names:
            return value if equals else words[i + 1]
    return None


def asked_processes(words: list[str]) -> int | None:
    """How many processes a launcher's command line asks for, itself or by its config file; None if unsaid."""
    from accelerate.commands.config.config_args import default_config_file, load_config_from_file

    if (count := _value(words, COUNT)) is not None:
        return int(count)
    config = _value(words, CONFIG) or default_config_file
    return load_config_from_file(config).num_processes if Path(config).is_file() else None


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
