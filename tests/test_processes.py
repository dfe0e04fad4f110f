"""The helper of the tests with several processes: what fails there must fail here."""

import os
import time

import processes
import pytest
import torch
from torch import distributed


def summed(number):
    rank, total = distributed.get_rank(), torch.tensor(number)
    distributed.all_reduce(total)
    return rank, total


def waiting():
    if distributed.get_rank() == 1:
        distributed.barrier()


def dying():
    os._exit(3)


def raising():
    if distributed.get_rank() == 1:
        raise KeyError("of rank 1")
    time.sleep(60)


def test_results_are_in_the_order_of_ranks():
    results = processes.run(3, summed, 2.0)
    assert [rank for rank, _ in results] == [0, 1, 2]
    assert [total.item() for _, total in results] == [6.0] * 3


def test_an_exception_is_raised_with_the_traceback_of_its_process():
    with pytest.raises(KeyError, match="of rank 1") as raised:
        processes.run(2, raising)
    assert "in raising" in str(raised.value.__cause__)


def test_a_process_that_hangs_is_named_with_the_line_it_is_at():
    with pytest.raises(TimeoutError, match=r"ranks \[1\] did not return within 3 s(.|\n)*in waiting"):
        processes.run(2, waiting, timeout=3)


def test_a_process_that_dies_is_named():
    with pytest.raises(RuntimeError, match="rank 0 died with exit code 3"):
        processes.run(1, dying)
