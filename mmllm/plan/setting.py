"""Where a plan is asked for: devices, sharding, lengths. The machines that it knows, with their sources."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from mmllm.config.base import suggest
from mmllm.errors import ConfigError

Sharding = Literal["none", "ddp", "zero-2", "zero-3", "fsdp"]
SHARDINGS: tuple[Sharding, ...] = ("none", "ddp", "zero-2", "zero-3", "fsdp")
GB = 1e9


@dataclass(frozen=True)
class Device:
    """``memory`` in bytes, ``half`` and ``full`` the peak of dense matrix products in FLOP/s with bf16 (fp16) and float32."""

    memory: float
    half: float
    full: float
    source: str
    kind: Literal["cuda", "cpu"] = "cuda"


# Peaks without sparsity, as the makers' data sheets say; float32 is that of plain units (torch's default does not use TF32).
DEVICES = {
    "h200": Device(141 * GB, 989e12, 67e12, "NVIDIA H200 data sheet, SXM"),
    "h100": Device(80 * GB, 989e12, 67e12, "NVIDIA H100 data sheet, SXM"),
    "a100-80gb": Device(80 * GB, 312e12, 19.5e12, "NVIDIA A100 data sheet, SXM 80 GB"),
    "a100-40gb": Device(40 * GB, 312e12, 19.5e12, "NVIDIA A100 data sheet, 40 GB"),
    "l40s": Device(48 * GB, 362e12, 91.6e12, "NVIDIA L40S data sheet"),
    "a10g": Device(24 * GB, 70e12, 35e12, "NVIDIA A10G data sheet"),
    "v100-32gb": Device(32 * GB, 125e12, 15.7e12, "NVIDIA V100 data sheet, SXM2 (fp16: it has no bf16)"),
    "t4": Device(16 * GB, 65e12, 8.1e12, "NVIDIA T4 data sheet (fp16: it has no bf16)"),
    "rtx-4090": Device(24 * GB, 165.2e12, 82.6e12, "NVIDIA Ada GPU architecture paper, table 2: fp32 accumulation"),
    "rtx-3090": Device(24 * GB, 71e12, 35.6e12, "NVIDIA Ampere GA102 paper, table 2: fp32 accumulation"),
    "cpu": Device(float("inf"), 1e11, 1e11, "a laptop's order of magnitude, not a data sheet", kind="cpu"),
}


@dataclass(frozen=True)
class Setting:
    """What a plan cannot read from the configuration.

    ``length`` tokens to a sample (None: the stage's ``max_length``), of which ``supervised`` is the share that is predicted among
    those that are no media. ``context`` tokens are held at inference (None: the longest of the stages). ``samples`` is the
    size of a stage's data where their files are not there; ``utilisation`` the share of the device's peak that training reaches.
    """

    devices: int = 1
    sharding: Sharding = "none"
    device: str = "a100-80gb"
    utilisation: float = 0.4
    length: int | None = None
    supervised: float = 1.0
    context: int | None = None
    samples: int | None = None

    def __post_init__(self) -> None:
        problems = []
        if self.device not in DEVICES:
            text = f"unknown device {self.device!r}{suggest(self.device, DEVICES)}; known are {', '.join(DEVICES)}"
            problems.append(("--device", text))
        if self.sharding == "none" and self.devices > 1:
            text = f"{self.devices} devices have to share the work: choose ddp, zero-2, zero-3 or fsdp"
            problems.append(("--sharding", text))
        if not 0 < self.utilisation <= 1:
            problems.append(("--utilisation", f"{self.utilisation}; expected a share above 0 and at most 1"))
        if not 0 < self.supervised <= 1:
            problems.append(("--supervised", f"{self.supervised}; expected a share above 0 and at most 1"))
        if problems:
            raise ConfigError(problems)

    @property
    def machine(self) -> Device:
        return DEVICES[self.device]
