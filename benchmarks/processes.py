"""What a second process gains: see ``benchmarks/scaling.py``."""

import multiprocessing
import socket
import statistics
import time
from collections import Counter
from dataclasses import dataclass
from typing import Any

import torch
from torch import distributed

from mmllm.config.base import BuildContext
from mmllm.config.run import RunConfig

STAGE = {
    "name": "instruct",
    "train": ["inputs.*.projector", "backbone.adapter"],
    "lr": 2.0e-4,
    "data": ["instructions.jsonl"],
    "max_length": 300,
}


@dataclass
class Ratio:
    """``speedup`` is samples/s of two processes over one's by the clock, ``cpu`` the same by processor time, which waiting does not
    count in: for machines that are busy otherwise. Both are (median, least, greatest) over the rounds. ``bytes`` is what a process
    hands to the all-reduce in a step, ``trained`` the bytes of the trained parameters.
    """

    speedup: tuple[float, float, float]
    cpu: tuple[float, float, float]
    bytes: int
    trained: int


SMALL = {  # PERFORMANCE.md's small224
    "inputs": {
        "image": {
            "encoder": {
                "kind": "clip",
                "architecture": {
                    "hidden_size": 384,
                    "intermediate_size": 1536,
                    "num_hidden_layers": 12,
                    "num_attention_heads": 6,
                    "image_size": 224,
                    "patch_size": 16,
                },
                "select_layer": -2,
            },
            "projector": {"kind": "mlp", "depth": 2},
        }
    },
    "backbone": {
        "kind": "causal_lm",
        "chat_template": "chatml",
        "architecture": {
            "model_type": "llama",
            "hidden_size": 512,
            "intermediate_size": 1376,
            "num_hidden_layers": 8,
            "num_attention_heads": 8,
            "num_key_value_heads": 8,
            "vocab_size": 32000,
        },
        "adapter": {"kind": "lora", "rank": 16, "alpha": 32},
    },
}


def processes(rounds: int, samples: int) -> Ratio:
    """Steps of ``samples`` samples per process, of one process and of two: each round both, one after the other."""
    spawn = multiprocessing.get_context("spawn")
    results = spawn.Queue()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    workers = [spawn.Process(target=_work, args=(rank, port, rounds, samples, results)) for rank in range(2)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
        if worker.exitcode:
            raise RuntimeError(f"a process ended with {worker.exitcode}")
    alone, together, size, trained = results.get()
    found = []
    for clock in range(2):
        ratios = [2 * one[clock] / both[clock] for one, both in zip(alone, together, strict=True)]
        found.append((statistics.median(ratios), min(ratios), max(ratios)))
    return Ratio(found[0], found[1], size, trained)


def _work(rank: int, port: int, rounds: int, samples: int, results: Any) -> None:
    """One of two processes. In every round the first takes a step alone, while the other waits; then both take one."""
    from torch.nn.parallel import DistributedDataParallel

    from mmllm.model import MultimodalLM
    from mmllm.plan.batches import make_batch, usual_medium
    from mmllm.training.loop import SummedLoss
    from mmllm.training.optimizer import build_optimizer
    from mmllm.training.stages import freeze, resolve, set_dtypes

    torch.set_num_threads(1)
    torch.manual_seed(0)
    distributed.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    stage = {**STAGE, "batch_size": 2 * samples, "micro_batch_size": samples}
    config, context = RunConfig.model_validate({"model": SMALL, "stages": [stage]}), BuildContext(weights=False)
    chosen = config.stages[0]
    model = MultimodalLM.from_config(config.model, context)
    parts = resolve(chosen, model.parts())
    set_dtypes(model, [part.name for part in parts], "fp32")
    freeze(model, parts, gradient_checkpointing=False)
    medium = {"image": usual_medium(config.model.inputs["image"], context)}
    batch = make_batch(config.model, chosen, context, medium, length=300, supervised=0.5)
    for one in batch.media.values():
        one.inputs = {name: torch.randn(t.shape) if t.is_meta else t for name, t in one.inputs.items()}
    loss = SummedLoss(model)
    together = DistributedDataParallel(loss)
    optimizer = build_optimizer(model, parts, chosen.optimizer)

    def step(run: torch.nn.Module) -> tuple[float, float]:
        start, used = time.perf_counter(), time.process_time()
        (run(batch)["text"] / batch.tokens).backward()
        optimizer.step()
        optimizer.zero_grad()
        return time.perf_counter() - start, time.process_time() - used

    counted = Counter[str]()
    together.register_comm_hook(counted, _counting)
    alone, both = [], []
    for number in range(rounds + 1):
        if rank == 0:
            with together.no_sync():
                alone.append(step(loss))
        distributed.barrier()
        both.append(step(together))
        distributed.barrier()
        if number == 0:  # the first round warms up, and DDP arranges its buckets anew behind it
            alone.clear()
            both.clear()
            counted.clear()
    slowest = torch.tensor(both, dtype=torch.float64)
    distributed.all_reduce(slowest, distributed.ReduceOp.MAX)
    if rank == 0:
        trained = sum(p.numel() * p.element_size() for part in parts for p in part.parameters.values())
        results.put((alone, slowest.tolist(), counted["bytes"] // rounds, trained))
    distributed.destroy_process_group()


def _counting(counted: Counter[str], bucket: distributed.GradBucket) -> torch.futures.Future[torch.Tensor]:
    """The all-reduce that DDP would do, and its bytes."""
    from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook

    counted["bytes"] += bucket.buffer().numel() * bucket.buffer().element_size()
    return allreduce_hook(distributed.group.WORLD, bucket)
