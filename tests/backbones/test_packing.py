"""Several sequences in one row: each is computed as if it were alone, for every family that can, and no other is tried."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from mmllm.backbones import causal_lm_module, language_model_module, linear_cross_entropy
from mmllm.backbones.base import Backbone
from mmllm.backbones.causal_lm import CausalLMConfig
from mmllm.backbones.packing import PACKED
from mmllm.backbones.seq2seq import Seq2SeqConfig
from mmllm.config.base import BuildContext
from mmllm.errors import MmllmError

CONTEXT = BuildContext(dtype=torch.float32)
LENGTHS = [5, 1, 9, 4]
TRIMS = "last layer trimmed"
PACKING = [
    "llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text", "olmo2", "phi", "phi3", "opt", "gpt2", "gpt_neox",
    "mixtral", "olmoe", "stablelm",
]  # fmt: skip


def backbone(model_type: str, **options: Any) -> Backbone:
    torch.manual_seed(0)
    numbers = {"model_type": model_type, **options.pop("numbers", {})}
    tiny = CausalLMConfig(architecture=numbers, **options).tiny()
    tiny = tiny.model_copy(update={"architecture": {**(tiny.architecture or {}), **numbers}})
    return tiny.build(CONTEXT, num_new_tokens=6, num_signals=2).eval()  # some families have dropout


def embedded(model: Backbone) -> Tensor:
    return model.embed(torch.randint(0, 260, (1, sum(LENGTHS)), generator=torch.Generator().manual_seed(1)))


def gradients(model: Backbone, row: Tensor, packed: bool) -> tuple[Tensor, Tensor]:
    """Logits ``(T, V)`` of all sequences, and the gradient of the row's embeddings."""
    row = row.detach().requires_grad_(True)
    if packed:
        logits = model(row, lengths=torch.tensor(LENGTHS)).logits[0]
    else:
        logits = torch.cat([model(piece).logits[0] for piece in torch.split(row, LENGTHS, dim=1)])
    (logits.square().sum() / len(logits)).backward()
    assert row.grad is not None
    return logits.detach(), row.grad


@pytest.mark.parametrize("model_type", PACKING)
def test_sequences_of_a_row_equal_those_alone(model_type: str) -> None:
    model = backbone(model_type)
    alone = gradients(model, embedded(model), packed=False)
    if not model.start_packing():
        assert model_type in ("gemma2",), "its attention caps scores, which torch's fused attention cannot"
        return
    packed = gradients(model, embedded(model), packed=True)
    for found, expected in zip(packed, alone, strict=True):
        torch.testing.assert_close(found, expected, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("model_type", ["mamba", "rwkv", "bloom", "jamba", "recurrent_gemma"])
def test_a_family_without_separable_attention_stays_as_it_was(model_type: str) -> None:
    model = backbone(model_type)
    before = model(embedded(model)).logits
    assert not model.start_packing()
    with pytest.raises(MmllmError, match="padded batch"):
        model(embedded(model), lengths=torch.tensor(LENGTHS))
    torch.testing.assert_close(model(embedded(model)).logits, before, atol=0, rtol=0)


def test_an_encoder_decoder_does_not_pack() -> None:
    assert not Seq2SeqConfig(architecture={"model_type": "t5"}).tiny().build(CONTEXT, num_new_tokens=1).start_packing()


def test_a_sliding_window_ends_within_its_sequence() -> None:
    model = backbone("mistral", numbers={"sliding_window": 3})
    alone = gradients(model, embedded(model), packed=False)
    wide = gradients(backbone("mistral", numbers={"sliding_window": 64}), embedded(model), packed=False)
    assert not torch.allclose(alone[0], wide[0], atol=1e-3), "the window matters"
    assert model.start_packing()
    for found, expected in zip(gradients(model, embedded(model), packed=True), alone, strict=True):
        torch.testing.assert_close(found, expected, atol=2e-5, rtol=1e-4)


def test_padded_batches_go_on_as_before() -> None:
    model, mask = backbone("llama"), torch.tensor([[1] * 7, [0, 0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0, 0]])
    rows = model.embed(torch.randint(0, 260, (3, 7), generator=torch.Generator().manual_seed(2)))
    before = model(rows, mask).logits[mask.bool()]
    assert model.start_packing()
    assert model.start_packing(), "twice is once"
    torch.testing.assert_close(model(rows, mask).logits[mask.bool()], before, atol=1e-6, rtol=0)


@pytest.mark.parametrize("adapter", ["lora", "ia3", "adapter", "prefix_tuning"])
def test_adapters_pack_where_they_can(adapter: str) -> None:
    model = backbone("llama", adapter={"kind": adapter})
    for parameter in model.parameters():
        parameter.data += 0.02 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(3))
    alone = gradients(model, embedded(model), packed=False)
    assert model.start_packing() == (adapter != "prefix_tuning")
    if adapter != "prefix_tuning":
        for found, expected in zip(gradients(model, embedded(model), packed=True), alone, strict=True):
            torch.testing.assert_close(found, expected, atol=2e-5, rtol=1e-4)


def test_packing_survives_activation_checkpointing() -> None:
    model = backbone("llama")
    plain = gradients(model, embedded(model), packed=False)
    assert model.start_packing()
    for module in model.model.modules():
        module.training |= hasattr(module, "gradient_checkpointing")
    model.model.gradient_checkpointing_enable({"use_reentrant": False})  # type: ignore[operator]
    for found, expected in zip(gradients(model, embedded(model), packed=True), plain, strict=True):
        torch.testing.assert_close(found, expected, atol=2e-5, rtol=1e-4)


def test_an_attention_of_the_users_choice_is_kept() -> None:
    model = backbone("llama", attention="eager")
    assert not model.start_packing()
    assert model.model.config._attn_implementation == "eager"  # type: ignore[union-attr]


# ---- the last layer


@pytest.mark.parametrize("model_type", [*PACKING, "mamba", "bloom", "rwkv"])
@pytest.mark.parametrize("checkpointed", [False, True])
def test_a_trimmed_last_layer_gives_the_same(model_type: str, checkpointed: bool) -> None:
    model = backbone(model_type)
    if checkpointed:
        if not model.model.supports_gradient_checkpointing or model_type in ("opt", "rwkv", "mamba"):
            pytest.skip("does it otherwise, or not at all")
        for module in model.model.modules():
            module.training |= hasattr(module, "gradient_checkpointing")
        model.model.gradient_checkpointing_enable({"use_reentrant": False})  # type: ignore[operator]
    asked, states_at = torch.tensor([2, 9, 10, 18]), torch.tensor([3, 9])

    def results() -> list[Tensor]:
        row = embedded(model).detach().requires_grad_(True)
        out = model(row, positions=asked, states_at=states_at)
        assert out.states is not None
        (out.logits.square().mean() + out.states.square().mean()).backward()
        assert row.grad is not None
        return [out.logits.detach(), out.states.detach(), row.grad]

    before = results()
    trimmed = TRIMS in model.take_short_cuts()
    assert trimmed == (model_type in TRIMMED), "say so in the list below when a family joins or leaves"
    for found, expected in zip(results(), before, strict=True):
        torch.testing.assert_close(found, expected, atol=2e-5, rtol=1e-4)
    whole = model(embedded(model)).logits
    torch.testing.assert_close(whole[0, asked], before[0], atol=2e-5, rtol=1e-4, msg="without positions: all of them")


TRIMMED = {"llama", "mistral", "qwen2", "qwen3", "gemma", "mixtral", "olmoe"}


def test_a_trimmed_layer_computes_only_what_is_asked() -> None:
    model, seen = backbone("llama"), list[int]()
    assert TRIMS in model.take_short_cuts()
    layers = [m for name, m in model.named_modules() if name.endswith(".mlp")]
    for layer in layers:
        layer.register_forward_pre_hook(lambda _, args: seen.append(args[0].shape[1]))
    model(embedded(model), positions=torch.tensor([3, 7]))
    assert seen == [sum(LENGTHS)] * (len(layers) - 1) + [2]


def test_compiled_layers_stay_whole_and_apart() -> None:
    model = backbone("llama")
    model.compile_layers()
    assert TRIMS not in model.take_short_cuts()
    assert not model.start_packing()


def test_half_precision_does_not_hide_a_short_cut_that_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    model = backbone("qwen2", adapter={"kind": "lora"})
    for name, parameter in model.named_parameters():
        parameter.data = parameter.data.to(
            torch.bfloat16 if parameter.ndim >= 2 and "lora" not in name else torch.float32
        )
    assert TRIMS in model.take_short_cuts()
    assert model.start_packing()
    other = backbone("qwen2")
    other.to(torch.bfloat16)
    monkeypatch.setattr(causal_lm_module, "as_mask", lambda lengths: None)
    monkeypatch.setattr(causal_lm_module, "restarted", lambda lengths, device: torch.arange(8)[None])
    assert not other.start_packing(), "every place sees all sequences before it"


def test_trimming_and_packing_go_together() -> None:
    model = backbone("qwen2")
    row = embedded(model)
    asked = torch.tensor([4, 5, 14, 18])
    alone = torch.cat([model(piece).logits[0] for piece in torch.split(row, LENGTHS, dim=1)])[asked]
    assert model.start_packing()
    assert TRIMS in model.take_short_cuts()
    assert model.model.config._attn_implementation == PACKED  # type: ignore[union-attr]
    found = model(row, positions=asked, lengths=torch.tensor(LENGTHS)).logits
    torch.testing.assert_close(found, alone, atol=2e-5, rtol=1e-4)


# ---- head and loss


@pytest.mark.parametrize("model_type", ["llama", "gemma2", "phi", "mamba", "rwkv", "gpt2"])
@pytest.mark.parametrize("piece", [300, 1 << 24])
def test_a_loss_in_pieces_equals_that_of_all_logits(
    model_type: str, piece: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(linear_cross_entropy, "PIECE", piece)
    model, asked = backbone(model_type), torch.tensor([1, 5, 6, 17])
    targets = torch.tensor([3, 271, 273, 0])  # words, and a signal token

    def results() -> dict[str, Tensor]:
        model.zero_grad()
        row = embedded(model).detach().requires_grad_(True)
        out = model(row, positions=asked, states_at=torch.tensor([2, 6]), targets=targets)
        assert out.loss is not None
        (out.loss * 0.5).backward()
        gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
        assert row.grad is not None
        return {"loss": out.loss.detach(), "row": row.grad, "states": out.states.detach(), **gradients}  # type: ignore[union-attr]

    before = results()
    taken = model.take_short_cuts()
    assert ("loss in pieces" in taken) == (model_type != "gemma2"), "which caps its logits behind the head"
    after = results()
    assert before.keys() == after.keys()
    for name, expected in before.items():
        error = (after[name] - expected).abs().max() / expected.abs().max().clamp(min=1.0)
        assert error < 2e-5, name


def test_a_loss_of_no_positions_is_zero_and_has_gradients() -> None:
    model = backbone("llama")
    assert model.take_short_cuts() == ["last layer trimmed", "loss in pieces"]
    row, none = embedded(model).detach().requires_grad_(True), torch.zeros(0, dtype=torch.int64)
    out = model(row, positions=none, targets=none)
    assert out.loss == 0
    out.loss.backward()  # type: ignore[union-attr]
    assert row.grad is not None
    assert not row.grad.any()


def test_a_trained_head_costs_nothing_where_nothing_is_learned() -> None:
    weight = torch.randn(50, 4, requires_grad=True)
    with torch.no_grad():
        loss = linear_cross_entropy.linear_cross_entropy(torch.randn(3, 4), weight, None, None, torch.tensor([1, 2, 3]))
    assert loss.grad_fn is None
    states = torch.randn(3, 4, requires_grad=True)
    loss = linear_cross_entropy.linear_cross_entropy(states, weight, None, None, torch.tensor([1, 2, 3]))
    loss.backward()
    assert weight.grad is not None
    torch.testing.assert_close(weight.grad.sum(dim=0), torch.zeros(4), atol=1e-5, rtol=0)


def test_float16_has_its_gradients_behind_the_scale(monkeypatch: pytest.MonkeyPatch) -> None:
    model = backbone("llama")
    assert "loss in pieces" in model.take_short_cuts()
    monkeypatch.setattr(language_model_module, "linear_cross_entropy", None)
    positions = torch.arange(4)
    with torch.autocast("cpu", torch.float16):
        assert model(embedded(model), positions=positions, targets=positions).loss is not None


def test_only_one_row_of_logits_exists_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linear_cross_entropy, "PIECE", 272)
    model, seen = backbone("llama"), list[int]()
    model.take_short_cuts()
    real = linear_cross_entropy.F.linear

    def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        seen.extend([len(x)] if len(weight) == 272 and x.ndim == 2 else [])
        return real(x, weight, bias)

    monkeypatch.setattr(linear_cross_entropy.F, "linear", linear)
    positions = torch.arange(6)
    out = model(embedded(model), positions=positions, targets=positions)
    assert seen == [1] * 6
    assert out.logits.shape[0] == 1
