"""A process of a test joins the others, by torch.distributed's gloo."""

from __future__ import annotations

import datetime
import os

import torch
import torch.distributed as dist


def join(rank: int, folder: str, count: int) -> None:
    """Makes this process one of ``count`` ranks that meet in a folder, with one thread for each."""
    torch.set_num_threads(1)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/rendezvous",
        rank=rank,
        world_size=count,
        timeout=datetime.timedelta(seconds=60),
    )
