"""Commands in processes of their own, forked from one that has done the imports: real ones, to be killed."""

from __future__ import annotations

import multiprocessing
import os
import signal
import socket
import sys
import time
from collections.abc import Callable
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

IMPORTED = [
    "mlmx.commands.main",
    "mlmx.commands.train",
    "mlmx.training.trainer",
    "mlmx.evaluation.scoring",
    "mlmx.tracking.mlflow_run",
]
PATIENCE_SECONDS = 240
STEP_SECONDS = 0.05  # so that a busy machine looks in time, and the run is not over before it can be ended


def started(argv: list[str], outputs: Path, said: Path, environment: dict[str, str] | None = None) -> ForkServerProcess:
    """A running ``mlmx`` command; its exit code is the process's, what it prints goes to the file ``said``."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(IMPORTED)
    process = context.Process(target=_run, args=(argv, str(outputs), str(said), environment or {}))
    process.start()
    return process


def _run(argv: list[str], outputs: str, said: str, environment: dict[str, str]) -> None:
    os.environ.update(environment, MLMX_OUTPUTS=outputs)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # where the tests run behind a &, it would be ignored
    multiprocessing.set_start_method("fork", force=True)  # of what the command itself starts, as on a command line
    sys.stdout = sys.stderr = Path(said).open("a", encoding="utf-8", buffering=1)  # noqa: SIM115
    from mlmx.commands.main import main
    from mlmx.training.trainer import Trainer

    step = Trainer.training_step

    def slowly(*args: Any, **kwargs: Any) -> Any:
        time.sleep(STEP_SECONDS)
        return step(*args, **kwargs)

    Trainer.training_step = slowly  # type: ignore[method-assign]
    sys.exit(main(argv))


def free_port() -> int:
    """Below the range that outgoing connections are given: between asking and use nobody else is handed it."""
    for port in range(20000 + os.getpid() % 5000, 32000):
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) != 0:
                return port
    raise AssertionError("no free port")


def distributed() -> list[dict[str, str]]:
    """The environment of each of the two processes of a training, as ``torchrun --nproc-per-node 2`` sets it."""
    shared = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    return [{**shared, "RANK": rank, "LOCAL_RANK": rank} for rank in ("0", "1")]


def run_distributed(work: Callable[..., None], *args: Any) -> None:
    """Call ``work(rank, *args)``, a function of a module, in each of the two processes of a training."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(IMPORTED)
    processes = [context.Process(target=_work, args=(given, work, args)) for given in distributed()]
    for process in processes:
        process.start()
    assert [ended(process) for process in processes] == [0, 0]


def _work(environment: dict[str, str], work: Callable[..., None], args: tuple[Any, ...]) -> None:
    import torch

    os.environ.update(environment)
    torch.set_num_threads(1)
    work(int(environment["RANK"]), *args)


def ended(process: ForkServerProcess) -> int | None:
    """Its exit code, negative for a signal."""
    process.join(PATIENCE_SECONDS)
    if process.is_alive():
        process.kill()
        raise TimeoutError("a command did not end")
    return process.exitcode


def wait_until(what: Callable[[], bool], process: ForkServerProcess) -> None:
    """Look every millisecond."""
    until = time.monotonic() + PATIENCE_SECONDS
    while not what():
        if not process.is_alive() or time.monotonic() > until:
            raise AssertionError("the command ended before it could be interrupted")
        time.sleep(0.001)


def reached(folder: Path, step: int) -> bool:
    """Whether a run has logged the loss of an optimizer step."""
    path = folder / "metrics.jsonl"
    return path.is_file() and f'"step": {step},' in path.read_text(encoding="utf-8")
