"""The error of a process whose gang has lost another one."""

from __future__ import annotations

import os

import torch
import torch.distributed as dist

from tests.forks import free_port, gang_environment, run_forks
from vembed_fs2.recipes.launch import find_connection_error


def lose_a_process() -> None:
    dist.init_process_group("gloo")
    dist.barrier()
    if dist.get_rank() == 1:
        os._exit(0)
    caught = None
    while caught is None:
        try:
            dist.all_reduce(torch.ones(1))
        except RuntimeError as ex:
            caught = ex
    wrapped = ValueError()
    wrapped.__cause__ = caught
    assert find_connection_error(wrapped) is caught, caught


def test_what_torch_says_of_a_lost_process_is_recognized() -> None:
    port = free_port()
    ranks = [{**os.environ, **gang_environment(rank, 2, port)} for rank in range(2)]
    run_forks(lose_a_process, environments=ranks).expect(0)
