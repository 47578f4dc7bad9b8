"""``check_component``: the whole contract of a component, run on its ``tiny()`` version.

For authors of components, ours and third parties': call it in a test of your own. It needs no network, no weights and
no GPU, and takes about a second. Every failure names the clause of the contract that is broken.
"""

from __future__ import annotations

import copy
import pickle
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from mmllm.adapters.base import Adapter
from mmllm.backbones.base import Backbone
from mmllm.config.base import BuildContext, ComponentConfig
from mmllm.config.families import (
    AdapterConfig,
    BackboneConfig,
    EncoderConfig,
    FusionConfig,
    LayoutProjectorConfig,
    OutputProjectorConfig,
    Preprocessor,
    ProjectorConfig,
    Shape,
)
from mmllm.contract import ContractError
from mmllm.contract import equal as _equal
from mmllm.contract import require as _require
from mmllm.contract_of_fusion import check_fusing
from mmllm.contract_of_generators import check_generator
from mmllm.fusion.base import Fusion, Seen

__all__ = ["ContractError", "check_component"]

TINY_LIMIT = 500_000  # parameters
INPUT_DIM, OUTPUT_DIM = 24, 40  # of the projectors under test
LENGTHS = (1, 2, 5, 18)  # features per item of the projectors under test


def check_component(config: ComponentConfig, *, media: Sequence[Any] | None = None) -> None:
    """Run the contract of ``config``'s family. Raises ``ContractError``: the component, the clause, what was found.

    ``media`` are decoded examples for an encoder or generator of a modality that mmllm does not know: at least two, of
    different sizes, the smallest possible among them.
    """
    checks: dict[str, Callable[[Any], None]] = {
        "encoder": lambda tiny: _check_encoder(tiny, media),
        "input_projector": _check_projector,
        "fusion": _check_fusion,
        "output_projector": _check_output_projector,
        "generator": lambda tiny: check_generator(tiny, media),
        "backbone": _check_backbone,
        "adapter": _check_adapter,
    }
    check = checks.get(config.family)
    if check is None:
        raise TypeError(f"found a {type(config).__name__}, expected one of {', '.join(checks)}")
    _check_config(config)
    _check_config(config.tiny())
    torch.manual_seed(0)
    check(config.tiny())


def _check_config(config: ComponentConfig) -> None:
    cls = type(config)
    again = cls.model_validate(config.model_dump(mode="json"))
    _require(again == config, config, "a config survives dump and load", f"{again} from {config}")
    _require(cls.model_fields["kind"].default == config.kind, config, "kind has its own value as default", "another")
    tiny = config.tiny()
    _require(type(tiny) is cls, config, "tiny() is of the same class", f"a {type(tiny).__name__}")


def _check_module(config: ComponentConfig, build: Callable[[BuildContext], nn.Module]) -> nn.Module:
    """Clauses that hold for the module of every family; returns the module in float32, in evaluation mode."""
    module = build(BuildContext(dtype=torch.float32, weights=False)).eval()
    count = sum(p.numel() for p in module.parameters())
    _require(count <= TINY_LIMIT, config, "tiny() is tiny", f"{count} parameters, at most {TINY_LIMIT} allowed")
    with torch.device("meta"):
        shell = build(BuildContext(weights=False))
    real = [name for name, p in shell.named_parameters() if p.device.type != "meta"]
    _require(not real, config, "a build on the meta device allocates nothing", f"{real[:3]} are not on it")
    shapes = {name: p.shape for name, p in shell.named_parameters()}
    same = shapes == {name: p.shape for name, p in module.named_parameters()}
    _require(same, config, "a build on the meta device has the real shapes", "names or shapes differ")
    return module


def _check_saving(
    config: ComponentConfig, module: nn.Module, build: Callable[[BuildContext], nn.Module], run: Callable[[Any], Tensor]
) -> None:
    """State saved to safetensors and read into a fresh module gives the same outputs."""
    from safetensors.torch import load_model, save_model

    with tempfile.TemporaryDirectory() as folder:
        path = str(Path(folder) / "state.safetensors")
        save_model(module, path)
        torch.manual_seed(1)
        fresh = build(BuildContext(dtype=torch.float32, weights=False)).eval()
        load_model(fresh, path)
    with torch.no_grad():
        _equal(config, "state saved and loaded gives equal outputs", run(fresh), run(module), 0.0)


def _check_prefix(config: ComponentConfig, mask: Tensor, counts: Sequence[int], clause: str) -> None:
    """A bool mask whose true entries come first and number ``counts``."""
    _require(mask.dtype == torch.bool, config, "the mask is bool", str(mask.dtype))
    expected = torch.arange(mask.shape[1])[None] < torch.tensor(list(counts))[:, None]
    _require(torch.equal(mask, expected), config, clause, f"{mask.sum(1).tolist()} real ones, expected {list(counts)}")


# Encoders -------------------------------------------------------------------------------------------------------------
def _examples(config: ComponentConfig, preprocess: Preprocessor) -> list[Any]:
    rng = np.random.default_rng(0)
    if preprocess.media == "image":
        sizes = ((1, 1), (20, 30), (64, 8), (3, 90))
        return [Image.fromarray(rng.integers(0, 256, (h, w, 3), dtype=np.uint8)) for h, w in sizes]
    if preprocess.media == "audio":
        rate = preprocess.decode_options["sample_rate"]
        return [rng.normal(0, 0.1, size).astype(np.float32) for size in (1, rate // 7, rate, 3 * rate // 2 + 1)]
    if preprocess.media == "video":
        count = preprocess.decode_options["frames"] * preprocess.decode_options.get("clips", 1)
        shapes = ((1, 1), (20, 30), (64, 8))
        clips = (rng.integers(0, 256, (count, h, w, 3), dtype=np.uint8) for h, w in shapes)
        return [[Image.fromarray(frame) for frame in clip] for clip in clips]
    if preprocess.media == "point_cloud":
        shape = (preprocess.decode_options["points"], 6)
        return [rng.random(shape, dtype=np.float32) * size for size in (1e-3, 1, 1e3)]
    found = f"media {preprocess.media!r} and none given; call check_component(config, media=[…])"
    raise ContractError(f"{config.family} {config.kind!r}: examples are needed: {found}")


def _check_encoder(config: EncoderConfig, media: Sequence[Any] | None) -> None:
    context = BuildContext(weights=False)
    preprocess = config.preprocessor(context)
    examples = list(media) if media is not None else _examples(config, preprocess)
    items = [preprocess(example) for example in examples]
    copied = pickle.loads(pickle.dumps(preprocess))  # what a data loader does to send it to its workers
    for example, item in zip(examples, items, strict=True):
        for other, clause in (
            (preprocess, "preprocessing is deterministic"),
            (copied, "a pickled preprocessor is equal"),
        ):
            again = other(example)
            same = again.keys() == item.keys() and all(torch.equal(again[key], item[key]) for key in item)
            _require(same, config, clause, "tensors differ")
    counts = [preprocess.num_tokens(item) for item in items]
    _require(min(counts) >= 1, config, "every item gives at least one feature", f"num_tokens {counts}")

    encoder = _check_module(config, config.build)
    with torch.no_grad():
        features, mask = encoder(preprocess.collate(items))
        again, _ = encoder(preprocess.collate(items))
        alone = [encoder(preprocess.collate([item])) for item in items]
        low, _ = config.build(BuildContext(dtype=torch.bfloat16, weights=False)).eval()(preprocess.collate(items))
    _equal(config, "the forward is deterministic in evaluation mode", again, features, 0.0)
    dim = encoder.output_dim
    _require(
        features.ndim == 3 and features.shape[2] == dim, config, "features are (N, S, output_dim)", str(features.shape)
    )
    _require(features.dtype == torch.float32, config, "features have the module's dtype", str(features.dtype))
    low_ok = low.dtype == torch.bfloat16 and bool(low.isfinite().all())
    _require(low_ok, config, "it runs in bfloat16", f"{low.dtype}, finite: {bool(low.isfinite().all())}")
    _check_prefix(config, mask, counts, "num_tokens is the number of real features, which come first")
    for index, (single, single_mask) in enumerate(alone):
        count = counts[index]
        _check_prefix(config, single_mask, [count], "num_tokens is the number of real features, which come first")
        clause = "an item's features do not depend on what it is batched with"
        _equal(config, clause, features[index, :count], single[0, :count], 1e-5 * max(1.0, float(single.abs().max())))
    _check_saving(config, encoder, config.build, lambda module: module(preprocess.collate(items))[0])


# Projectors -----------------------------------------------------------------------------------------------------------
def _check_projector(config: ProjectorConfig) -> None:
    def build(context: BuildContext) -> nn.Module:
        return config.build(context, input_dim=INPUT_DIM, output_dim=OUTPUT_DIM)

    told: list[Tensor] = []  # what the module takes behind features and mask
    if isinstance(config, LayoutProjectorConfig):
        examples = config.layout_examples()
        lengths, counts = [length for length, _ in examples], [config.num_outputs_on(layout) for _, layout in examples]
        told = [torch.tensor([layout for _, layout in examples])]
    else:
        lengths, counts = list(LENGTHS), [config.num_outputs(length) for length in LENGTHS]
    _require(min(counts) >= 1, config, "num_outputs is at least 1", f"{counts} for lengths {lengths}")
    projector = _check_module(config, build)
    mask = torch.arange(max(lengths))[None] < torch.tensor(lengths)[:, None]
    features = torch.randn(len(lengths), max(lengths), INPUT_DIM).masked_fill(~mask[..., None], 0)
    with torch.no_grad():
        found, found_mask = projector(features, mask, *told)
        loud, _ = projector(torch.where(mask[..., None], features, torch.full((), 1e3)), mask, *told)
        low, _ = build(BuildContext(dtype=torch.bfloat16, weights=False)).eval()(features.bfloat16(), mask, *told)
    shape = (len(lengths), max(counts), OUTPUT_DIM)
    _require(found.shape == shape, config, "outputs are (N, Q, output_dim)", f"{tuple(found.shape)}, expected {shape}")
    _check_prefix(config, found_mask, counts, "num_outputs is the number of real outputs, which come first")
    low_ok = low.dtype == torch.bfloat16 and bool(low.isfinite().all())
    _require(low_ok, config, "it runs in bfloat16", f"{low.dtype}, finite: {bool(low.isfinite().all())}")
    real = found_mask[..., None]
    clause = "features behind the mask never influence real outputs"
    _equal(config, clause, loud.masked_fill(~real, 0), found.masked_fill(~real, 0), 1e-5)
    for index, length in enumerate(lengths):
        one = slice(index, index + 1)
        with torch.no_grad():
            single, _ = projector(features[one, :length], mask[one, :length], *(layouts[one] for layouts in told))
        clause = "an item's outputs do not depend on what it is batched with"
        _equal(config, clause, found[index, : counts[index]], single[0], 1e-5)
    projector.train()
    outputs, _ = projector(features, mask, *told)
    (outputs * torch.randn_like(outputs)).masked_fill(~real, 0).sum().backward()
    _check_gradients(config, projector)
    projector.eval()
    _check_saving(config, projector, build, lambda module: module(features, mask, *told)[0])


# Fusion ---------------------------------------------------------------------------------------------------------------
def _check_fusion(config: FusionConfig) -> None:
    layers, width = 4, config.width(INPUT_DIM)

    def build(context: BuildContext) -> Fusion:
        return config.build(context, hidden_dim=OUTPUT_DIM, media_dim=width, num_layers=layers)

    module = _check_module(config, build)
    assert isinstance(module, Fusion)
    inside = len(module.at) == len(module.blocks) > 0 and set(module.at) <= set(range(layers))
    _require(inside, config, "it sits before blocks of the backbone", f"before {list(module.at)} of {layers}")
    given = check_fusing(config, module, build(BuildContext(dtype=torch.bfloat16, weights=False)), OUTPUT_DIM, width)
    hidden, media, places = given

    def run(fusion: Any) -> Tensor:
        found: Tensor = fusion.fuse(0, hidden, Seen(media, places, (3, 6)))
        return found

    sum(module.fuse(i, hidden, Seen(media, places, (3, 6))).pow(2).sum() for i in range(len(module.at))).backward()  # type: ignore[union-attr]
    _check_gradients(config, module)
    _check_saving(config, module, build, run)


# Output projectors -----------------------------------------------------------------------------------------------------
CONDITION: dict[str, Shape] = {"text": (7, 12), "pooled": (1, 5)}  # what the output projectors under test give
SIGNALS = (1, 3, 8)


def _check_output_projector(config: OutputProjectorConfig) -> None:
    for signals in SIGNALS:

        def build(context: BuildContext, signals: int = signals) -> nn.Module:
            return config.build(context, input_dim=INPUT_DIM, num_signals=signals, condition_shape=CONDITION)

        module, given = _check_module(config, build), torch.randn(3, signals, INPUT_DIM)
        with torch.no_grad():
            found, alone = module(given), module(given[:1])
            low = build(BuildContext(dtype=torch.bfloat16, weights=False)).eval()(given.bfloat16())
        shapes = {name: tuple(value.shape[1:]) for name, value in found.items()}
        _require(shapes == CONDITION, config, "the condition has the generator's shape", f"{shapes}, not {CONDITION}")
        for name in CONDITION:
            clause = "an item's condition does not depend on what it is batched with"
            _equal(config, clause, found[name][:1], alone[name], 1e-5)
            _require(low[name].isfinite().all(), config, "it runs in bfloat16", "values that are not finite")
        module.train()
        sum((value * torch.randn_like(value)).sum() for value in module(given).values()).backward()
        _check_gradients(config, module)
        _check_saving(config, module.eval(), build, lambda fresh, given=given: fresh(given)["text"])  # type: ignore[misc]


def _check_gradients(config: ComponentConfig, module: nn.Module) -> None:
    trainable = {name: p for name, p in module.named_parameters() if p.requires_grad}
    missing = [name for name, p in trainable.items() if p.grad is None or not p.grad.isfinite().all()]
    _require(not missing, config, "gradients reach every parameter", f"none, or not finite, at {missing[:3]}")


# Backbones and adapters -----------------------------------------------------------------------------------------------
def _check_backbone(config: BackboneConfig) -> None:
    new, signals = 3, 2

    def build(context: BuildContext) -> Backbone:
        return config.build(context, num_new_tokens=new, num_signals=signals)

    context = BuildContext(weights=False)
    module = _check_module(config, build)
    assert isinstance(module, Backbone)
    rows = config.vocab_rows(context)
    tokenizer = config.tokenizer(context)
    _require(module.vocab_rows == rows, config, "vocab_rows is the module's", f"{rows} and {module.vocab_rows}")
    _require(tokenizer.chat_template is not None, config, "the tokenizer has a chat template", "none")
    _require(
        len(tokenizer) <= rows, config, "the table has a row for every token", f"{rows} for {len(tokenizer)} tokens"
    )

    ids = torch.randint(0, rows, (2, 7))
    ids[0, 2:5] = torch.arange(rows, rows + new)
    mask = torch.ones_like(ids)
    with torch.no_grad():
        embedded = module.embed(ids)
        _require(
            embedded.shape == (2, 7, module.hidden_dim), config, "embed gives (..., D)", str(tuple(embedded.shape))
        )
        rows_of_new = module.new_tokens.weight if module.new_tokens is not None else torch.empty(0)
        _equal(config, "new tokens have rows of their own", embedded[0, 2:5], rows_of_new.to(embedded.dtype), 0.0)
        replies = torch.tensor([[0, 4, 7], [1, 2, 3], [1, 5, 7]])  # predicted from positions 3 on, 1 and 2, 4 on
        logits = module(embedded, mask, replies=replies).logits
        wanted = (2, 7, rows + signals)
        _require(logits.shape == wanted, config, "logits are (B, T, vocab_rows + signals)", str(tuple(logits.shape)))
        positions = torch.tensor([12, 3, 6, 8])
        asked = module(embedded, mask, positions=positions, states_at=positions[:2], replies=replies)
        clause = "logits at asked positions are those of the full forward"
        _equal(config, clause, asked.logits, logits.flatten(0, 1)[positions], 1e-5)
        shape = None if asked.states is None else tuple(asked.states.shape)
        _require(shape == (2, module.hidden_dim), config, "states at K' positions are (K', D)", str(shape))
        assert asked.states is not None
        again = torch.nn.functional.linear(asked.states, module.tables()[1].to(asked.states.dtype))
        close = torch.allclose(again, asked.logits[:2, :rows], atol=1e-4)
        same = torch.equal(again.argmax(-1), asked.logits[:2, :rows].argmax(-1))
        _require(close or same, config, "states are what the head reads", "the head gives other logits")
        padded = torch.cat([embedded[:1], torch.randn(1, 3, module.hidden_dim)], dim=1)
        seen = module(padded, torch.tensor([[1] * 7 + [0] * 3]), replies=replies[:1]).logits
        _equal(config, "padding never influences real positions", seen[0, 3:7], logits[0, 3:], 1e-4)
        # Row 0 decoded from its reply on, beside a shorter row: padded in front, so that both end together.
        beside = torch.stack([embedded[0], torch.cat([torch.randn(2, module.hidden_dim), embedded[1, :5]])])
        shown = torch.tensor([[1] * 7, [0, 0] + [1] * 5])
        places = (shown.cumsum(dim=1) - 1).clamp(min=0)
        cache, steps = module.new_cache(), []
        for start, stop in ((0, 4), (4, 5), (5, 6), (6, 7)):
            given = beside[:, start:stop], shown[:, :stop], places[:, start:stop]
            steps.append(module(*given, cache=cache).logits[:, -1])
        alone = module(embedded[1:, :5], replies=torch.tensor([[0, 2, 5]])).logits
        decoded, clause = torch.stack(steps, dim=1), "decoding with the cache gives the logits of the full forward"
        _equal(config, clause, decoded[0], logits[0, 3:], 1e-4)
        _equal(config, f"{clause}, for a padded row as well", decoded[1], alone[0, 1:], 1e-4)
        low = build(BuildContext(dtype=torch.bfloat16, weights=False)).eval()
        low_logits = low(low.embed(ids), mask, replies=replies).logits
    _require(low_logits.isfinite().all(), config, "it runs in bfloat16", "logits that are not finite")
    module(module.embed(ids), mask, replies=replies).logits.float().logsumexp(-1).sum().backward()
    _check_gradients(config, module)
    _check_saving(config, module, build, lambda fresh: fresh(fresh.embed(ids), mask, replies=replies).logits)


def _check_adapter(config: AdapterConfig) -> None:
    from mmllm.backbones.causal_lm import CausalLMConfig

    def attach(context: BuildContext) -> Adapter:
        return config.attach(CausalLMConfig().tiny().build(context, num_new_tokens=0).model)

    def build(context: BuildContext) -> nn.Module:
        return attach(context).model

    context = BuildContext(dtype=torch.float32, weights=False)
    _check_module(config, build)
    base = CausalLMConfig().tiny().build(context, num_new_tokens=0).model
    before = {id(p) for p in base.parameters()}
    values = copy.deepcopy([p.detach() for p in base.parameters()])
    originals = list(base.parameters())
    attached = config.attach(base)
    adapted = attached.model
    trainable = [name for name, p in adapted.named_parameters() if p.requires_grad]
    of_base = [name for name, p in adapted.named_parameters() if p.requires_grad and id(p) in before]
    _require(bool(trainable), config, "an adapter has parameters of its own to train", "none")
    _require(not of_base, config, "an adapter leaves the base model frozen", f"{of_base[:3]} would train")
    other = sorted(set(trainable) ^ {name for name, _ in adapted.named_parameters() if attached.owns(name)})
    _require(not other, config, "it owns what it trains, and nothing else", f"different for {other[:3]}")
    same = all(torch.equal(old, new) for old, new in zip(values, originals, strict=True))
    _require(same, config, "applying an adapter does not change the base weights", "they changed")
    ids = torch.arange(6)[None]
    adapted(input_ids=ids).logits.float().logsumexp(-1).sum().backward()
    _check_gradients(config, adapted)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if attached.owns(name):
                parameter.normal_(std=0.5)  # far from where it began, so that what is lost would show
    _check_saving(config, adapted.eval(), build, lambda module: module(input_ids=ids).logits)
    torch.manual_seed(1)
    fresh = attach(context)
    kept = {name: p.detach() for name, p in adapted.named_parameters() if not attached.owns(name)}
    fresh.model.load_state_dict(kept, strict=False)
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        attached.save(Path(folder) / "adapter")
        fresh.load(Path(folder) / "adapter")
        found, expected = fresh.model.eval()(input_ids=ids).logits, adapted(input_ids=ids).logits
    _equal(config, "its own files put into another model give equal outputs", found, expected, 0.0)
