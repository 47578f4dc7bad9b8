"""The contract of generators, for ``mmllm.testing.check_component``."""

from __future__ import annotations

import pickle
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from mmllm.config.base import BuildContext
from mmllm.config.families import CodeGeneratorConfig, GeneratorConfig, Target
from mmllm.contract import ContractError, require
from mmllm.generators.base import Artifact, CodeGenerator, Condition, Generator, MediaGenerator


def check_generator(config: GeneratorConfig, media: Sequence[Any] | None) -> None:
    """The contract of a generator, and of what it is told: a condition or codes."""
    context = BuildContext(dtype=torch.float32)
    generator = config.build(context)
    require(generator is not None, config, "a tiny generator needs no files", "build() gave None")
    assert generator is not None
    _check_frozen(config, generator)
    target, examples = config.target(context), list(media) if media is not None else _examples(config)
    targets = _check_targets(config, target, examples)
    if isinstance(config, CodeGeneratorConfig):
        _check_codes(config, cast(CodeGenerator, generator), targets)
    else:
        _check_condition(config, cast(Generator, generator), targets)


def _check_frozen(config: GeneratorConfig, generator: MediaGenerator) -> None:
    generator.train()
    moving = [name for name, p in generator.named_parameters() if p.requires_grad]
    require(not moving, config, "a generator is frozen", f"{moving[:3]} would train")
    awake = [name for name, m in generator.named_modules() if m.training]
    require(not awake, config, "a generator stays in evaluation mode", f"{awake[:3]} are in training mode")


def _check_targets(config: GeneratorConfig, target: Target, examples: Sequence[Any]) -> Tensor:
    targets = [target(example) for example in examples]
    copied = pickle.loads(pickle.dumps(target))
    same = all(torch.equal(copied(e), t) for e, t in zip(examples, targets, strict=True))
    require(same, config, "a pickled target is equal, and targets are deterministic", "tensors differ")
    require(len({t.shape for t in targets}) == 1, config, "targets have one shape", str([t.shape for t in targets]))
    return torch.stack(targets)


def _check_condition(config: GeneratorConfig, generator: Generator, targets: Tensor) -> None:
    shapes = config.condition_shape(BuildContext(weights=False))
    text = generator.encode_text(["one", "two words"])
    found = {name: tuple(value.shape[1:]) for name, value in text.streams.items()}
    require(found == shapes, config, "condition_shape is that of encode_text", f"{shapes} and {found}")
    streams = {name: value.clone().requires_grad_() for name, value in text.streams.items()}
    losses = generator.denoising_loss(Condition(streams, text.masks), targets[:2])
    require(losses.shape == (2,), config, "denoising_loss is (N,)", str(tuple(losses.shape)))
    torch.autograd.backward(losses.sum())
    dead = [name for name, value in streams.items() if value.grad is None or not value.grad.any()]
    require(not dead, config, "the loss depends on every stream of the condition", f"not on {dead}")

    seen: list[tuple[int, int]] = []
    how = generator.sampling.with_(seed=1, steps=2)

    def listen(done: int, total: int) -> bool:
        seen.append((done, total))
        return True

    made = generator.generate(text, how, listen)
    require(len(made) == 2, config, "generate makes one medium per item", str(len(made)))
    require(seen == [(1, 2), (2, 2)], config, "on_step hears of every step", str(seen))
    require(generator.generate(text, how, lambda *_: False) == [], config, "on_step can stop it", "it went on")
    _check_repeatable(config, generator.suffix, (made[0], generator.generate(text, how)[0]))


def _check_codes(config: CodeGeneratorConfig, generator: CodeGenerator, targets: Tensor) -> None:
    offline = BuildContext(weights=False)
    codes, group = config.codes(offline), config.tokens(offline, None)
    require(generator.codes == codes, config, "codes are those of the module", f"{codes} and {generator.codes}")
    require(codes.size > 1, config, "a code is one of several", f"{codes.size}")
    fixed = len(group.places[0]) == len(group.places[-1]) == 1 and group.places[0].start == 0
    require(fixed, config, "a group begins with token 0 and ends with one that is no code", str(group.places[:1]))
    shape = (len(targets), codes.length * codes.codebooks)
    found = generator.encode(targets)
    good = found.shape == shape and found.dtype == torch.int64
    require(good, config, "codes are int64 (N, P)", f"{found.dtype} {tuple(found.shape)}, expected {shape}")
    low, high = int(found.min()), int(found.max())
    require(low >= 0 and high < codes.size, config, "codes are from 0 to size - 1", f"{low} to {high}")
    alone = torch.cat([generator.encode(one[None]) for one in targets])
    require(torch.equal(alone, found), config, "an item's codes do not depend on what it is batched with", "they do")

    seen: list[tuple[int, int]] = []

    def listen(done: int, total: int) -> bool:
        seen.append((done, total))
        return True

    made = generator.generate(found, on_step=listen)
    require(len(made) == len(targets), config, "generate makes one medium per item", str(len(made)))
    require(bool(seen) and seen[-1][0] == seen[-1][1], config, "on_step hears of every step", str(seen))
    require(generator.generate(found, on_step=lambda *_: False) == [], config, "on_step can stop it", "it went on")
    _check_repeatable(config, generator.suffix, (made[0], generator.generate(found[:1])[0]))
    others = [generator.generate((found + shift) % codes.size)[0] for shift in (0, 1)]
    require(_bytes(others[0], generator.suffix) != _bytes(others[1], generator.suffix), config, "codes decide", "not")


def _check_repeatable(config: GeneratorConfig, suffix: str, made: tuple[Artifact, Artifact]) -> None:
    one, two = (_bytes(item, suffix) for item in made)
    require(one == two, config, "a seed decides what is made", "two runs with one seed differ")


def _bytes(made: Artifact, suffix: str) -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / f"made{suffix}"
        made.save(file)
        return file.read_bytes()


def _examples(config: GeneratorConfig) -> list[Any]:
    rng = np.random.default_rng(0)
    pictures = [Image.fromarray(rng.integers(0, 256, (h, w, 3), dtype=np.uint8)) for h, w in ((20, 30), (64, 8))]
    made: dict[str, list[Any]] = {
        "image": pictures,
        "audio": [rng.normal(0, 0.1, size).astype(np.float32) for size in (1, 3000)],
        "video": [pictures[:1] * 9, pictures[1:] * 2],
    }
    if config.media not in made:
        raise ContractError(
            f"{config.kind!r}: no examples of {config.media!r}; call check_component(config, media=[…])"
        )
    return made[config.media]
