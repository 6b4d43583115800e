"""What torchrun tells this process: rank, world size, device; and what ranks must agree on."""

import contextlib
import datetime
import os
import time
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed

from gpt.device import select_device
from gpt.errors import UserError
from gpt.roll_call import RollCall


@dataclass
class Distributed:
    """This process's place in the run. Without torchrun: rank 0 of 1."""

    rank: int
    world_size: int
    device: torch.device
    roll_call: RollCall | None = None

    @property
    def is_master(self) -> bool:
        """Whether this is the process that prints and writes files."""
        return self.rank == 0

    def all_gather(self, values: torch.Tensor) -> list[list[float]]:
        """The `values` (n,) of every rank, known on each of them: world_size lists. Waits for the device."""
        if self.world_size == 1:
            return [values.tolist()]
        table = torch.zeros(self.world_size, len(values), dtype=values.dtype, device=self.device)
        table[self.rank] = values
        torch.distributed.all_reduce(table)  # each row is zero on all ranks but one
        rows = table.tolist()
        self.progress()
        return rows

    def any(self, flag: bool) -> bool:
        """Whether `flag` is true on any rank; every rank must ask."""
        return any(vote for vote, in self.all_gather(torch.tensor([float(flag)])))

    def progress(self) -> None:
        """Say that this rank is at work, where it meets the others only after a long time."""
        if self.roll_call:
            self.roll_call.progress()

    def barrier(self) -> None:
        """Wait until every rank has come this far."""
        if self.world_size > 1:
            torch.distributed.barrier()

    def check_same(self, mine: dict[str, Any], advice: str, alike: str = "") -> None:
        """Raise UserError, with the rank, the entry and `advice`, unless all ranks have the same values in `mine`:
        all of those with the same `alike`, that is."""
        if self.world_size == 1:
            return
        everyone: list[Any] = [None] * self.world_size
        torch.distributed.all_gather_object(everyone, (alike, mine))
        self.progress()
        first: dict[str, int] = {}
        for rank, (kind, theirs) in enumerate(everyone):
            other = first.setdefault(kind, rank)
            for name, value in theirs.items():
                if value != (expected := everyone[other][1].get(name)):
                    raise UserError(f"rank {rank} has {name} {value}, rank {other} has {expected}: {advice}")


@contextlib.contextmanager
def joined(device: str, rank_timeout: float) -> Iterator[Distributed]:
    """Choose this process's device, and be one of the process group if torchrun started several.

    `device`: "auto" takes CUDA, else MPS, else the CPU; any other name is taken as PyTorch knows it. Several
    processes talk over NCCL on CUDA and over gloo on the CPU; where they do not meet for `rank_timeout` seconds the
    run ends with the names of those that are missing. Of the exceptions of several ranks one is raised and the other
    ranks end in silence, see `RollCall.blame`. Raises UserError for a device that is not there.
    """
    rank, local_rank = int(os.environ.get("RANK", 0)), int(os.environ.get("LOCAL_RANK", 0))
    world_size = int(os.environ.get("WORLD_SIZE", 1))
    chosen = select_device(device)
    if world_size == 1:
        yield Distributed(rank, world_size, chosen)
        return
    if device == "auto" and chosen.type == "mps":
        chosen = torch.device("cpu")
    if chosen.type == "cuda":
        if local_rank >= torch.cuda.device_count():
            raise UserError(f"local rank {local_rank} has no GPU, this machine has {torch.cuda.device_count()}: "
                            f"use --nproc_per_node={torch.cuda.device_count()}")
        chosen = torch.device("cuda", local_rank)
        torch.cuda.set_device(chosen)
    elif chosen.type != "cpu":
        raise UserError(f"device {device!r} cannot be shared by {world_size} processes: use cuda or cpu")
    # PyTorch's own timeout would end the process with less to say: it is left behind ours.
    timeout = datetime.timedelta(seconds=min(rank_timeout, 1e8) + 60)
    try:
        store, _, _ = next(torch.distributed.rendezvous("env://", timeout=timeout))
    except torch.distributed.DistError as error:
        raise UserError(f"the {world_size} processes cannot meet at {os.environ.get('MASTER_ADDR')}:"
                        f"{os.environ.get('MASTER_PORT')} ({str(error).splitlines()[0]})") from None
    store = meet(store, rank, world_size, rank_timeout)
    roll_call = RollCall(store, rank, world_size, rank_timeout)
    try:
        torch.distributed.init_process_group("nccl" if chosen.type == "cuda" else "gloo", timeout=timeout, store=store,
                                             rank=rank, world_size=world_size,
                                             device_id=chosen if chosen.type == "cuda" else None)
        yield Distributed(rank, world_size, chosen, roll_call)
    except Exception as error:
        if (to_raise := roll_call.blame(error)) is error:
            raise
        raise to_raise from None
    roll_call.over = True
    torch.distributed.destroy_process_group()


def meet(store: torch.distributed.Store, rank: int, world_size: int, timeout: float) -> torch.distributed.Store:
    """Wait until all ranks have started, and return a part of `store` that is only theirs.

    torchrun keeps one store for all its restarts, and in it the addresses of processes that are dead: a restarted rank
    that reads them waits for ever. Its restart count cannot tell the starts apart, as each machine counts its own.
    So rank 0 makes up a name and hands it to whoever asks, until every rank has used that name to say that it heard.

    Raises UserError that names the ranks that have not come within `timeout` seconds.
    """
    mine, deadline = uuid.uuid4().hex, time.monotonic() + timeout
    store.set(f"ask {rank}", mine)
    if rank > 0:
        while not store.check([f"answer {mine}"]):
            if time.monotonic() > deadline:
                raise UserError(f"rank 0 of {world_size} has not started within {timeout:g} s, see --rank_timeout")
            time.sleep(0.05)
        name = store.get(f"answer {mine}").decode()
        store.set(f"{name} heard by {rank}", "")
        return torch.distributed.PrefixStore(name, store)
    missing = set(range(1, world_size))
    while missing:
        for other in sorted(missing):
            if store.check([f"ask {other}"]):  # perhaps that of a dead one: it will not say that it heard
                store.set("answer " + store.get(f"ask {other}").decode(), mine)
        missing = {other for other in missing if not store.check([f"{mine} heard by {other}"])}
        if time.monotonic() > deadline:
            raise UserError(f"rank {', '.join(map(str, sorted(missing)))} of {world_size} has not started within "
                            f"{timeout:g} s, see --rank_timeout")
        time.sleep(0.05)
    return torch.distributed.PrefixStore(mine, store)
