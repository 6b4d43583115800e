"""Ranks under torchrun: set-up, barriers, small collectives, and errors that name the rank that failed."""

import contextlib
import datetime
import os
import re
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed

from gpt.device import select_device
from gpt.errors import UserError


@dataclass
class Distributed:
    """Rank, world size and device of this process. Without torchrun: rank 0 of 1."""

    rank: int
    world_size: int
    device: torch.device
    rank_timeout: float = 600  # seconds
    launcher: int = 0  # process id of torchrun
    control_group: Any = None  # gloo, for everything but gradients
    barrier_group: Any = None  # gloo, for `wait` alone: a collective that times out breaks its group

    @property
    def is_master(self) -> bool:
        """Whether this rank prints and writes files."""
        return self.rank == 0

    def wait(self) -> None:
        """Wait for all ranks. After `rank_timeout` seconds rank 0 raises an error that names the missing ranks.

        Call it before a collective, in which one hung rank would hang all others.
        """
        if self.world_size > 1:
            if os.getppid() != self.launcher:
                raise UserError("torchrun has exited: rerun the same command to resume from the last checkpoint")
            torch.distributed.monitored_barrier(self.barrier_group, datetime.timedelta(seconds=self.rank_timeout),
                                                wait_all_ranks=True)

    def gather(self, values: torch.Tensor) -> list[list[float]]:
        """Return the `values` (n,) of all ranks as world_size lists, on every rank. Synchronizes with the device."""
        if self.world_size == 1:
            return [values.tolist()]
        self.wait()  # before values.cpu(), which waits for the device and so for collectives with other ranks
        values = values.cpu()
        gathered = [torch.empty_like(values) for _ in range(self.world_size)]
        torch.distributed.all_gather(gathered, values, self.control_group)
        return [row.tolist() for row in gathered]

    def broadcast(self, value: Any) -> Any:
        """Return rank 0's `value` (plain Python values) on every rank."""
        values = [value]
        if self.world_size > 1:
            self.wait()
            torch.distributed.broadcast_object_list(values, 0, self.control_group)
        return values[0]

    def assert_same(self, values: dict[str, Any], advice: str, group: str = "") -> None:
        """Raise UserError with rank, name and `advice` if two ranks of the same `group` have different `values`."""
        if self.world_size == 1:
            return
        gathered: list[Any] = [None] * self.world_size
        self.wait()
        torch.distributed.all_gather_object(gathered, (group, values), self.control_group)
        first: dict[str, int] = {}  # lowest rank of each group
        for rank, (rank_group, rank_values) in enumerate(gathered):
            other = first.setdefault(rank_group, rank)
            for name, value in rank_values.items():
                if value != (expected := gathered[other][1].get(name)):
                    raise UserError(f"rank {rank} has {name} {value}, rank {other} has {expected}: {advice}")


@contextlib.contextmanager
def init_distributed(device: str, rank_timeout: float) -> Iterator[Distributed]:
    """Select this rank's device and, under torchrun, initialize the process group: NCCL on CUDA, gloo on the CPU.

    device: see `gpt.device.select_device`. rank_timeout: seconds that ranks wait for one another. If several ranks
    fail, the first raises its exception and the others exit silently. Raises UserError if the device is not available.
    """
    rank, local_rank = int(os.environ.get("RANK", 0)), int(os.environ.get("LOCAL_RANK", 0))
    world_size = int(os.environ.get("WORLD_SIZE", 1))
    if world_size == 1:
        yield Distributed(rank, world_size, select_device(device))
        return
    rank_device, launcher = select_rank_device(device, local_rank, world_size), os.getppid()
    rank_timeout = min(rank_timeout, 1e8)
    store = None
    try:
        store = next(torch.distributed.rendezvous("env://", timeout=datetime.timedelta(seconds=rank_timeout)))[0]
        # torchrun keeps one store for all restarts, with the addresses of dead processes in it.
        store = torch.distributed.PrefixStore(f"attempt {os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)
        store.set(f"rank {rank}", "")
        store.wait([f"rank {r}" for r in range(world_size)], datetime.timedelta(seconds=rank_timeout))
    except torch.distributed.DistError as error:
        if store is None:
            raise UserError(f"rendezvous of {world_size} ranks at {os.environ.get('MASTER_ADDR')}:"
                            f"{os.environ.get('MASTER_PORT')} failed ({str(error).splitlines()[0]}): check that rank 0 "
                            f"runs there") from None
        missing = [str(r) for r in range(world_size) if not store.check([f"rank {r}"])]
        raise UserError(f"rank {', '.join(missing)} of {world_size} did not start within {rank_timeout:g} s: check its "
                        f"machine or raise --rank_timeout") from None
    is_cuda = rank_device.type == "cuda"
    dist = Distributed(rank, world_size, rank_device, rank_timeout, launcher)
    try:
        # NCCL kills the process when a collective times out: rank 0 must name the hung rank before that.
        torch.distributed.init_process_group(
            "nccl" if is_cuda else "gloo", store=store, rank=rank, world_size=world_size,
            timeout=datetime.timedelta(seconds=rank_timeout + (60 if is_cuda else 0)),
            device_id=rank_device if is_cuda else None)
        dist.control_group, dist.barrier_group = (
            torch.distributed.new_group(backend="gloo", timeout=datetime.timedelta(seconds=rank_timeout + extra))
            for extra in (0, 10))
        yield dist
    except Exception as error:
        if (to_raise := first_failure(error, dist, store)) is error:
            raise
        raise to_raise from None
    torch.distributed.destroy_process_group()


def select_rank_device(device: str, local_rank: int, world_size: int) -> torch.device:
    """Return the device of a rank on this machine. Raises UserError if there is no GPU left or it cannot be shared."""
    selected = select_device(device)
    if device == "auto" and selected.type == "mps":
        return torch.device("cpu")
    if selected.type == "cuda":
        if local_rank >= torch.cuda.device_count():
            raise UserError(f"local rank {local_rank} has no GPU (this machine has {torch.cuda.device_count()}): "
                            f"use --nproc_per_node={torch.cuda.device_count()}")
        selected = torch.device("cuda", local_rank)
        torch.cuda.set_device(selected)
    elif selected.type != "cpu":
        raise UserError(f"device {device!r} cannot be shared by {world_size} processes: use cuda or cpu")
    return selected


def first_failure(error: Exception, dist: Distributed, store: torch.distributed.Store) -> BaseException:
    """Return the exception to raise for `error`: itself, or a UserError that names the ranks that do not answer.

    If another rank failed first, return SystemExit, which prints nothing.
    """
    lost_contact = isinstance(error, torch.distributed.DistError) or isinstance(error, RuntimeError) and any(
        word in str(error) for word in ("gloo", "NCCL", "monitoredBarrier"))
    if lost_contact and dist.barrier_group and "monitoredBarrier" not in str(error):
        try:  # a collective does not say which rank is missing
            torch.distributed.monitored_barrier(dist.barrier_group, datetime.timedelta(seconds=10), wait_all_ranks=True)
        except RuntimeError as barrier_error:
            error = barrier_error
    silent = re.search(r"Ranks? ([\d, ]+) failed to pass monitoredBarrier", str(error)) or re.search(
        r"while waiting for send/recv from rank (0)", str(error))
    if dist.rank > 0:
        time.sleep(0.5)  # if all ranks fail, rank 0 reports it
    try:
        is_first = store.add("failures", 1) == 1
    except torch.distributed.DistError:  # torchrun has exited, and its store with it
        is_first = os.environ.get("LOCAL_RANK", "0") == "0"
    time.sleep(1 if is_first else 2)  # rank 0 may host the store; and the first error is printed before others exit
    if not is_first:
        return SystemExit(1)
    if silent:
        return UserError(f"rank {silent[1].strip(', ')} of {dist.world_size} does not answer (died, or hung for "
                         f"{dist.rank_timeout:g} s, --rank_timeout): rerun the same command to resume from the last "
                         f"checkpoint")
    if lost_contact:
        return UserError(f"lost contact with another rank ({' '.join(str(error).split())[:200]}): rerun the same "
                         f"command to resume from the last checkpoint")
    return error
