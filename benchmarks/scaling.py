"""Many processes: what sharding costs on machines that are not here, and what a second process gains on this one.

    python -m benchmarks.scaling [--json] [--only simulation processes] [--devices 64] [--layers 80]

**simulation**: a step of a stage with a 70B backbone (Llama 2's numbers) on 64 GPUs, without any. A process group that only
pretends to exchange, and fake tensors: torch's own ``fully_shard`` and the model's own code run as on the first of 64
processes, and every allocation and every collective is written down. Beside it stands what ``mmllm plan`` says of the same.

**processes**: samples/s of two processes over those of one with as many samples per process (gloo, one thread each), and the bytes
that travel, which are those of trained gradients. Rounds alternate; medians.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import distributed
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from benchmarks.processes import processes
from mmllm.config.base import BuildContext
from mmllm.config.run import RunConfig
from mmllm.plan import Setting, make_plan

LLAMA_70B = {
    "model_type": "llama",
    "hidden_size": 8192,
    "intermediate_size": 28672,
    "num_hidden_layers": 80,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "vocab_size": 32000,
    "max_position_embeddings": 4096,
}
CLIP_L = {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "image_size": 336,
    "patch_size": 14,
}
ASSISTANT = {
    "inputs": {
        "image": {
            "encoder": {"kind": "clip", "architecture": CLIP_L, "select_layer": -2},
            "projector": {"kind": "mlp", "depth": 2},
        }
    },
    "backbone": {
        "kind": "causal_lm",
        "chat_template": "vicuna",
        "architecture": LLAMA_70B,
        "adapter": {"kind": "lora", "rank": 64, "alpha": 128},
    },
}
INSTRUCT = {
    "name": "instruct",
    "train": ["inputs.*.projector", "backbone.adapter"],
    "lr": 2.0e-4,
    "data": ["instructions.jsonl"],
    "batch_size": 128,
    "micro_batch_size": 2,
    "max_length": 2048,
    "max_steps": 5000,
    "gradient_checkpointing": True,
}


@dataclass
class Exchanged:
    """Collectives of one kind: how many, and the bytes that a process gets from (or, scattering, gives to) the others."""

    calls: int = 0
    bytes: int = 0


@dataclass
class Simulated:
    """One process of a step of the first stage.

    ``weights``, ``trained`` are the bytes of its share of all parameters and of the trained ones, ``even`` the former over what
    they would be if every tensor could be cut evenly. ``units`` are the bytes of what is gathered together: the blocks, and the
    rest (first). ``peak`` is the most that is alive at once, with AdamW's moments.
    """

    devices: int
    parameters: int
    weights: int
    trained: int
    even: float
    units: list[int]
    peak: int
    collectives: dict[str, Exchanged] = field(default_factory=dict)


def simulate(config: RunConfig, devices: int) -> Simulated:
    """Process 0 of ``devices`` takes a step of one micro-batch of the first stage, on fake tensors and with a process group that
    only pretends. Takes this process's default group; there must be none yet.
    """
    from itertools import chain

    from torch.testing._internal.distributed.fake_pg import FakeStore

    from mmllm.config.contradictions import matching
    from mmllm.model import MultimodalLM
    from mmllm.plan.batches import make_batch, modalities, usual_medium
    from mmllm.plan.memory import MOMENTS
    from mmllm.plan.simulate import HALF, Ledger, Rehearsal, fake_batch
    from mmllm.training.sharding import local, share_out
    from mmllm.training.stages import freeze, resolve, set_dtypes

    context, stage = BuildContext(weights=False), config.stages[0]
    with torch.device("meta"):
        model = MultimodalLM.from_config(config.model, context)
    set_dtypes(model, matching(chain.from_iterable(s.train for s in config.stages), model.parts()), config.precision)
    if config.short_cuts:
        model.backbone.take_short_cuts()
    shapes = {name: output.generator.condition_shape(context) for name, output in config.model.outputs.items()}
    mode = Rehearsal(model, shapes).mode
    total = sum(p.numel() * p.element_size() for p in model.parameters())
    distributed.init_process_group("fake", rank=0, world_size=devices, store=FakeStore())
    try:
        mesh = distributed.init_device_mesh("cpu", (devices,))
        with mode:
            share_out(model, mesh, reshard=True)
        freeze(model, resolve(stage, model.parts()), gradient_checkpointing=stage.gradient_checkpointing)
        shares = {p: local(p).numel() * p.element_size() for p in model.parameters()}
        trained = sum(size for p, size in shares.items() if p.requires_grad)
        present = {
            name: usual_medium(config.model.inputs[name], context)
            for name in modalities(config.model, stage, model.parts())
        }
        batch = make_batch(config.model, stage, context, present, length=stage.max_length, supervised=1.0)
        ledger, traffic = Ledger(), Travelling(devices)
        for tensor in (*map(local, model.parameters()), *model.buffers()):
            ledger.take(tensor)
        ledger.forget()
        with mode, ledger, traffic, following_resizes(ledger):
            with torch.autocast("cpu", dtype=HALF.get(config.precision), enabled=config.precision != "fp32"):
                losses = model(fake_batch(batch), stage.objectives)
            sum(losses.values()).backward()
        weights = sum(shares.values())
        return Simulated(
            devices,
            sum(p.numel() for p in model.parameters()),
            weights,
            trained,
            weights / (total / devices),
            traffic.units,
            weights + MOMENTS * trained + ledger.peak,
            traffic.found,
        )
    finally:
        distributed.destroy_process_group()


class Travelling(TorchDispatchMode):
    """Counts what collectives move, by kind. ``units`` are the sizes of the gathered tensors when they first occur."""

    def __init__(self, devices: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.devices, self.found, self.units = devices, dict[str, Exchanged](), list[int]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        names = {
            "_allgather_base_": "all-gather",
            "_reduce_scatter_base_": "reduce-scatter",
            "allreduce_": "all-reduce",
        }
        if func.namespace == "c10d":
            kind = names[func._opname]
            size = max(t.numel() * t.element_size() for t in tree_leaves(args) if isinstance(t, torch.Tensor))
            one = self.found.setdefault(kind, Exchanged())
            one.calls += 1
            one.bytes += round(size * (self.devices - 1) / self.devices * (2 if kind == "all-reduce" else 1))
            if kind == "all-gather":
                self.units.append(size)
        return func(*args, **(kwargs or {}))


@contextmanager
def following_resizes(ledger: Any) -> Iterator[None]:
    """Tell ``ledger`` of storages that become larger or smaller: `fully_shard` frees what was gathered by making it empty."""
    original = torch.UntypedStorage.resize_

    def resize(storage: torch.UntypedStorage, size: int) -> Any:
        found = original(storage, size)
        ledger.resized(storage)
        return found

    torch.UntypedStorage.resize_ = resize  # type: ignore[method-assign]
    try:
        yield
    finally:
        torch.UntypedStorage.resize_ = original  # type: ignore[method-assign]


def planned(config: RunConfig, devices: int) -> dict[str, Any]:
    """What ``mmllm plan`` says of the first stage; ``traffic`` of one micro-batch."""
    plan = make_plan(
        config, BuildContext(weights=False), Setting(devices=devices, sharding="fsdp", device="h200"), costs=True
    )
    assert plan.costs is not None
    cost = plan.costs.stages[config.stages[0].name]
    return {
        "weights": sum(cost.memory.weights.values()),
        "peak": cost.memory.peak,
        "gathered": cost.traffic.gathered,
        "reduced": cost.traffic.reduced,
    }


def seventy(devices: int, layers: int) -> RunConfig:
    """A 70B backbone with ``layers`` of its 80 layers, and one micro-batch to a step: traffic is proportional to their number."""
    model = json.loads(json.dumps(ASSISTANT))
    model["backbone"]["architecture"]["num_hidden_layers"] = layers
    stage = {**INSTRUCT, "batch_size": devices * INSTRUCT["micro_batch_size"]}
    return RunConfig.model_validate({"model": model, "stages": [stage], "precision": "bf16"})


def compare(config: RunConfig, devices: int) -> dict[str, Any]:
    """The simulation of a step of the first stage of ``config`` beside the plan."""
    found = simulate(config, devices)
    plan = planned(config, devices)
    moved = {
        name: found.collectives[kind].bytes
        for name, kind in (("gathered", "all-gather"), ("reduced", "reduce-scatter"))
    }
    measured = {"weights": found.weights, "peak": found.peak, **moved}
    shares = {name: plan[name] / value for name, value in measured.items()}
    return {"simulation": asdict(found), "plan": plan, "plan over simulation": shares}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print everything as JSON")
    parser.add_argument("--only", nargs="+", choices=["simulation", "processes"], default=["simulation", "processes"])
    parser.add_argument("--devices", type=int, default=64)
    parser.add_argument("--layers", type=int, default=80, help="layers of the 70B backbone (80)")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--samples", type=int, default=4, help="samples of a step on each process")
    options = parser.parse_args()
    results: dict[str, Any] = {"torch": torch.__version__}
    if "simulation" in options.only:
        results["simulation"] = compare(seventy(options.devices, options.layers), options.devices)
    if "processes" in options.only:
        results["processes"] = asdict(processes(options.rounds, options.samples))
    print(json.dumps(results, indent=2) if options.json else render(results))


def render(results: dict[str, Any]) -> str:
    lines = []
    if found := results.get("simulation"):
        simulated, plan, shares = found["simulation"], found["plan"], found["plan over simulation"]
        moved = {
            "gathered": simulated["collectives"]["all-gather"],
            "reduced": simulated["collectives"]["reduce-scatter"],
        }
        blocks = simulated["units"][1:]
        lines += [
            f"{simulated['parameters'] / 1e9:.1f} B parameters on {simulated['devices']} GPUs, one micro-batch:",
            f"  units: {simulated['units'][0] / 1e9:.2f} GB gathered once, blocks of {max(blocks) / 1e9:.2f} GB",
        ]
        for name in ("weights", "peak", "gathered", "reduced"):
            value = moved[name]["bytes"] if name in moved else simulated[name]
            calls = f" in {moved[name]['calls']} calls" if name in moved else ""
            lines.append(
                f"  {name:9} {value / 1e9:8.2f} GB simulated{calls}, {plan[name] / 1e9:8.2f} GB planned ({shares[name]:.3f})"
            )
    if found := results.get("processes"):
        clock, cpu = found["speedup"], found["cpu"]
        lines += [
            f"1 to 2 processes: {clock[0]:.2f} x samples/s by the clock ({clock[1]:.2f} to {clock[2]:.2f}), "
            f"{cpu[0]:.2f} x by processor time ({cpu[1]:.2f} to {cpu[2]:.2f}); "
            f"{found['bytes'] / 1e6:.2f} MB all-reduced in a step, {found['trained'] / 1e6:.2f} MB "
            "are trained"
        ]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
