"""Pairs for the retrieval heads, and what one of several processes computes of them. Imports torch alone: it is spawned."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import torch
from torch import Tensor, distributed

from mmllm.projectors.retrieval import RetrievalHeads

WIDTHS = (5, 4, 3)  # backbone, encoder, shared space
SHARES = (slice(0, 4), slice(0, 0), slice(4, 5))


def example(count: int = 5) -> tuple[RetrievalHeads, Tensor, Tensor]:
    """Heads, signals and encoder features of ``count`` pairs."""
    torch.manual_seed(1)
    heads = RetrievalHeads(*WIDTHS)
    return heads, torch.randn(count, 2, WIDTHS[0]), torch.randn(count, 3, WIDTHS[1])


def loss_of(heads: RetrievalHeads, signals: Tensor, features: Tensor) -> Tensor:
    seen = torch.ones(features.shape[:2], dtype=torch.bool)
    return heads.loss(heads.embed_signals(signals), heads.embed_media(features, seen))


def shares(rank: int, port: int, results: Any) -> None:
    """One of three processes: 4 pairs for the first, none for the second, 1 for the third."""
    torch.set_num_threads(1)
    world, patience = len(SHARES), timedelta(minutes=20)
    store = distributed.TCPStore("127.0.0.1", port, world, rank == 0, timeout=patience)
    distributed.init_process_group("gloo", store=store, rank=rank, world_size=world, timeout=patience)
    heads, signals, features = example()
    loss = loss_of(heads, signals[SHARES[rank]], features[SHARES[rank]])
    loss.backward()
    gradients = {name: [] if p.grad is None else p.grad.tolist() for name, p in heads.named_parameters()}
    results.put((loss.item(), gradients))
    distributed.barrier()
    distributed.destroy_process_group()
