"""Runs a function in several processes of this machine, which form torch.distributed's default group (gloo)."""

from __future__ import annotations

import faulthandler
import multiprocessing
import os
import pickle
import signal
import tempfile
import time
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from multiprocessing.pool import ExceptionWithTraceback
from pathlib import Path
from typing import Any

import torch
from torch import distributed

PRELOADED = [
    "mbf_kernels.testing",
    "mbf_optim",
    "pytest",
    "torch._dynamo",  # the first optimizer of a process imports it
    "torch.distributed.checkpoint.state_dict",
    "torch.distributed.fsdp",
]


def run(world_size: int, function: Callable, *args: Any, timeout: float = 60.0) -> list:
    """``function(*args)`` in every process; what it returned, by rank.

    Processes are forked from one that has imported torch, so that they start in milliseconds.

    Args:
        function: of a module, by name; it and its arguments and results go through pickle.
        timeout: in seconds, for all.

    Raises what a process raised first, with that one's traceback as its cause; RuntimeError for one that died and
    TimeoutError for those that did not return, with the lines they were at. The others are ended then.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    with tempfile.TemporaryDirectory() as folder:
        workers = {}
        try:
            for rank in range(world_size):
                ours, theirs = context.Pipe()
                process = context.Process(
                    target=_work, args=(rank, world_size, folder, theirs, function, args), daemon=True
                )
                process.start()
                theirs.close()  # so that a process that dies closes the pipe
                workers[ours] = process
            return _answers(workers, Path(folder), timeout)
        finally:
            for process in workers.values():
                process.kill()
                process.join()


def _answers(workers: dict[Connection, Any], folder: Path, timeout: float) -> list:
    deadline = time.monotonic() + timeout
    rank_of = {pipe: rank for rank, pipe in enumerate(workers)}
    results = {}
    while len(results) < len(workers):
        waiting = [pipe for pipe in workers if rank_of[pipe] not in results]
        ready = wait(waiting, max(0.0, deadline - time.monotonic()))
        if not ready:
            for pipe in waiting:
                _abort(workers[pipe])
            ranks = [rank_of[pipe] for pipe in waiting]
            raise TimeoutError(f"ranks {ranks} did not return within {timeout} s\n{_traces(folder, ranks)}")
        for pipe in ready:
            rank = rank_of[pipe]
            try:
                result, error = pickle.loads(pipe.recv_bytes())
            except EOFError:
                workers[pipe].join()
                raise RuntimeError(
                    f"rank {rank} died with exit code {workers[pipe].exitcode}\n{_traces(folder, [rank])}"
                ) from None
            if error is not None:
                raise error
            results[rank] = result
    return [results[rank] for rank in range(len(workers))]


def _abort(process: Any) -> None:
    """Ends it by the signal at which faulthandler writes where it is."""
    os.kill(process.pid, signal.SIGABRT)
    process.join()


def _traces(folder: Path, ranks: list[int]) -> str:
    return "\n".join(f"rank {rank}:\n{(folder / str(rank)).read_text()}" for rank in ranks)


def _work(rank: int, world_size: int, folder: str, pipe: Connection, function: Callable, args: tuple) -> None:
    with open(Path(folder) / str(rank), "w") as trace:
        faulthandler.enable(trace)
        torch.set_num_threads(1)
        try:
            distributed.init_process_group(
                "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world_size
            )
            answer = function(*args), None
        except Exception as error:
            answer = None, ExceptionWithTraceback(error, error.__traceback__)
        pipe.send_bytes(pickle.dumps(answer))
        pipe.poll(None)  # others may still be talking to this one: until the parent has all answers
