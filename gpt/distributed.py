"""Ranks: the processes that torchrun starts to train one model, and how they talk to each other."""

import contextlib
import datetime
import os
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed
from tqdm import tqdm

from gpt.device import select_device
from gpt.errors import UserError

# Set together by torchrun. A few of them alone are left over from another launcher or a notebook.
TORCHRUN_VARIABLES = ("TORCHELASTIC_RUN_ID", "RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR",
                      "MASTER_PORT")


@dataclass
class Ranks:
    """This process among the `world_size` ranks of a run. Without torchrun: rank 0 of 1."""

    rank: int
    world_size: int
    device: torch.device
    timeout: datetime.timedelta = datetime.timedelta(minutes=10)
    control_group: Any = None  # gloo, on the CPU, for everything but gradients
    launcher: int = 0  # process id of torchrun

    @property
    def is_master(self) -> bool:
        """Whether this rank prints and writes files."""
        return self.rank == 0

    def print(self, text: str) -> None:
        """Print a line, on rank 0 only, above the progress bar if there is one."""
        if self.is_master:
            with contextlib.suppress(OSError):  # a full disk, a closed terminal: the run goes on
                tqdm.write(text)
                sys.stdout.flush()

    def barrier(self) -> None:
        """Wait for all ranks. Raises RuntimeError with the ranks still missing after `timeout`."""
        if self.world_size > 1:
            if os.getppid() != self.launcher:  # nobody else would stop this orphan
                raise UserError("torchrun has exited: rerun the same command to resume")
            torch.distributed.monitored_barrier(self.control_group, self.timeout,
                                                wait_all_ranks=True)

    def mean(self, *values: torch.Tensor | float) -> list[float]:
        """Return each of the `values` (scalars) averaged over all ranks, on every rank.

        Waits for the device and for all ranks.
        """
        self.barrier()  # first: float() waits for the device, which hangs if a rank does
        means = torch.tensor([float(value) for value in values], dtype=torch.float64)
        if self.world_size > 1:
            torch.distributed.all_reduce(means, group=self.control_group)
            means /= self.world_size
        return means.tolist()

    def broadcast(self, value: Any) -> Any:
        """Return rank 0's `value`, made of plain Python values, on every rank."""
        values = [value]
        if self.world_size > 1:
            torch.distributed.broadcast_object_list(values, 0, self.control_group)
        return values[0]

    def assert_equal(self, values: dict[str, Any]) -> None:
        """Raise UserError naming the first value that differs from rank 0's."""
        expected = self.broadcast(values)
        for name in {**expected, **values}:
            if values.get(name) != expected.get(name):
                raise UserError(f"rank {self.rank} has {name} {values.get(name)}, rank 0 has "
                                f"{expected.get(name)}: start all ranks with the same flags, the "
                                f"same data and one log_dir that all of them see")


@contextlib.contextmanager
def init_ranks(device: str, rank_timeout: float) -> Iterator[Ranks]:
    """Select this process's device and, under torchrun, join the other ranks: over NCCL on CUDA
    GPUs, one for each rank, and over gloo on CPUs.

    device: see `gpt.device.select_device`. rank_timeout: seconds that ranks wait for one another.
    """
    selected = select_device(device)
    under_torchrun = all(os.environ.get(name) for name in TORCHRUN_VARIABLES)
    if not under_torchrun or os.environ["WORLD_SIZE"] == "1":
        yield Ranks(0, 1, selected)
        return
    rank, local_rank = int(os.environ["RANK"]), int(os.environ["LOCAL_RANK"])
    world_size = int(os.environ["WORLD_SIZE"])
    is_cuda = selected.type == "cuda"
    if is_cuda and local_rank >= torch.cuda.device_count():
        raise UserError(f"local rank {local_rank} has no GPU: pass "
                        f"--nproc_per_node={torch.cuda.device_count()}, the number of GPUs")
    selected = torch.device("cuda", local_rank) if is_cuda else torch.device("cpu")
    if is_cuda:
        torch.cuda.set_device(selected)
    timeout = datetime.timedelta(seconds=rank_timeout)
    # Keep the reference: in some set-ups rank 0 hosts this store.
    torchrun_store = next(torch.distributed.rendezvous("env://", timeout=timeout))[0]
    store = create_store(torchrun_store, rank, timeout)
    # NCCL kills a process that waits too long, so the barrier must name the hung rank before that.
    torch.distributed.init_process_group(
        "nccl" if is_cuda else "gloo", store=store, rank=rank, world_size=world_size,
        timeout=timeout + datetime.timedelta(seconds=60 if is_cuda else 0),
        device_id=selected if is_cuda else None)
    control_group = torch.distributed.new_group(backend="gloo", timeout=timeout)
    ranks = Ranks(rank, world_size, selected, timeout, control_group, os.getppid())
    yield ranks
    ranks.barrier()  # torchrun stops all ranks as soon as one exits with an error
    torch.distributed.destroy_process_group()


def create_store(torchrun_store: torch.distributed.Store, rank: int,
                 timeout: datetime.timedelta) -> torch.distributed.Store:
    """Return a new store, which rank 0 hosts and through which the ranks find one another.

    torchrun's store survives restarts and still holds the addresses of dead ranks, to which PyTorch
    would try to connect. It is only used to pass on the port of the new store.
    """
    host, deadline = os.environ["MASTER_ADDR"], time.monotonic() + timeout.total_seconds()
    if rank == 0:
        store = torch.distributed.TCPStore(host, 0, is_master=True, wait_for_workers=False)
        torchrun_store.set("port of rank 0", str(store.port))
        store.set_timeout(timeout)
        return store
    while True:
        port = int(torchrun_store.get("port of rank 0"))
        try:
            store = torch.distributed.TCPStore(host, port, timeout=datetime.timedelta(seconds=2))
            store.set_timeout(timeout)
            return store
        except torch.distributed.DistError:  # a stale port, of a rank 0 that has died
            if time.monotonic() > deadline:
                raise
