"""The audio encoder of the embedded assistant as it is trained: transformers' Whisper encoder with two linear heads,
its log-mel spectrogram, and the losses."""

from __future__ import annotations

import math

import numpy as np
import torch
import torch.nn.functional as F
from audio_windows import EVENTS, FRAME, FRAMES, HEADS, RATE, SECONDS, UNKNOWN, WINDOW, Window
from torch import Tensor, nn

# Where each attention head looks at the start of training, in frames from its own; None: anywhere. See `initialize`.
LOOK = ((-6, -3, 0, 3, 6), (-10, -5, 0, 5, 10), (-16, -8, 0, 8, 16), (-20, 0, 20, None, None))
SLOWEST = (26, 26, 44, 44)  # the slowest position code that a layer's heads compare: the higher, the wider they look


class Encoder(nn.Module):
    """Whisper's encoder and the two linear heads that teach it."""

    def __init__(self, attention: str) -> None:
        super().__init__()
        from transformers import WhisperConfig, WhisperModel

        # The decoder is an empty stub: zero layers, eight words. Nothing here decodes with it, but the file stays one
        # that transformers' WhisperModel loads.
        self.config = WhisperConfig(
            d_model=160, encoder_layers=4, encoder_attention_heads=5, encoder_ffn_dim=480, num_mel_bins=80,
            max_source_positions=FRAMES, dropout=0.1, decoder_layers=0, decoder_attention_heads=5, decoder_ffn_dim=160,
            max_target_positions=8, vocab_size=8, pad_token_id=0, bos_token_id=1, eos_token_id=2,
            decoder_start_token_id=1, suppress_tokens=None, begin_suppress_tokens=None, attn_implementation=attention,
        )  # fmt: skip
        self.whisper = WhisperModel(self.config)
        initialize(self.whisper.encoder)
        self.event_head = nn.Linear(160, len(EVENTS))
        self.fact_head = nn.Linear(160, sum(len(values) for values in HEADS.values()))

    def features(self, mels: Tensor) -> Tensor:
        """(N, 80, 2 * S) log-mels -> (N, S, 160), S up to FRAMES. The encoder's own forward takes S = FRAMES only."""
        whisper = self.whisper.encoder
        hidden = F.gelu(whisper.conv2(F.gelu(whisper.conv1(mels)))).transpose(1, 2)
        hidden = hidden + whisper.embed_positions.weight[: hidden.shape[1]]
        hidden = F.dropout(hidden, self.config.dropout, self.training)
        for layer in whisper.layers:
            hidden = layer(hidden, None)
        return whisper.layer_norm(hidden)

    def facts(self, pooled: Tensor) -> dict[str, Tensor]:
        """(S, 160) mean features of S clips -> {head: (S, classes) logits}."""
        logits = self.fact_head(pooled).split([len(values) for values in HEADS.values()], dim=-1)
        return dict(zip(HEADS, logits, strict=True))


@torch.no_grad()
def initialize(encoder: nn.Module) -> None:
    """Start near a convolutional network, so that a few thousand steps are enough.

    The stock initialisation (every weight at 0.02) leaves the sound a fifteenth of the position code that is added to
    it, and heads that know nothing of time. Here the convolutions keep the scale of their input, and head h of layer l
    looks LOOK[l][h] frames away: with positions coded as sin(w t) and cos(w t), a query rotated by w * offset meets its
    key in sum of cos(w (t + offset - s)), which peaks at s = t + offset. Idea: convolutional initialisation of
    self-attention, d'Ascoli et al., ConViT, 2021.
    """
    for convolution in (encoder.conv1, encoder.conv2):
        nn.init.kaiming_normal_(convolution.weight)
    width = encoder.config.d_model
    size = width // encoder.config.encoder_attention_heads  # of a head; half of it sines, half cosines
    rows = torch.arange(size // 2)
    for layer, offsets, slowest in zip(encoder.layers, LOOK, SLOWEST, strict=True):
        chosen = torch.linspace(slowest - 26, slowest, size // 2).round().long()
        speed = torch.exp(-math.log(10000) / (width // 2 - 1) * chosen)  # radians per frame: transformers' `sinusoids`
        for linear in layer.modules():
            if isinstance(linear, nn.Linear):
                nn.init.xavier_uniform_(linear.weight)
        for head, offset in enumerate(offsets):
            if offset is None:
                continue
            query = layer.self_attn.q_proj.weight[head * size : (head + 1) * size]
            key = layer.self_attn.k_proj.weight[head * size : (head + 1) * size]
            for weight, shift in ((query, offset), (key, 0)):
                sine, cosine = 2 * torch.sin(speed * shift), 2 * torch.cos(speed * shift)
                weight.mul_(0.2)
                weight[rows, chosen] += cosine
                weight[rows, chosen + width // 2] += sine
                weight[rows + size // 2, chosen] -= sine
                weight[rows + size // 2, chosen + width // 2] += cosine


class LogMel(nn.Module):
    """WhisperFeatureExtractor's log-mel spectrogram, batched. Source of the formula: openai/whisper, audio.py."""

    def __init__(self) -> None:
        super().__init__()
        from transformers import WhisperFeatureExtractor

        self.extractor = WhisperFeatureExtractor(
            feature_size=80, sampling_rate=RATE, hop_length=160, chunk_length=SECONDS
        )
        self.register_buffer("filters", torch.tensor(self.extractor.mel_filters, dtype=torch.float32))  # (201, 80)
        self.register_buffer("hann", torch.hann_window(400))

    def forward(self, waves: Tensor, tilt: Tensor | None = None) -> Tensor:
        """(N, T) float32 samples -> (N, 80, T / 160). `tilt` (N, 80, 1) is added to log10 of the power."""
        spectrum = torch.stft(waves, 400, 160, window=self.hann, return_complex=True)[..., :-1].abs() ** 2
        mels = (self.filters.T @ spectrum).clamp(min=1e-10).log10()
        if tilt is not None:
            mels = mels + tilt
        return (torch.maximum(mels, mels.amax(dim=(1, 2), keepdim=True) - 8.0) + 4.0) / 4.0


def pool(features: Tensor, frames: list[int]) -> Tensor:
    """Mean of features (N, S, D) over the first frames[i] frames of row i: (N, D)."""
    ends = torch.tensor(frames, device=features.device)[:, None]
    inside = (torch.arange(features.shape[1], device=features.device) < ends).float()
    return torch.einsum("ns,nsd->nd", inside / ends, features)


def training_loss(encoder: Encoder, mels: Tensor, windows: list[Window]) -> dict[str, Tensor]:
    """{"events": cross-entropy over frames, "label": over clips, "facts": sum over the other heads}, label-mixed."""
    with torch.autocast(mels.device.type, torch.bfloat16):
        features = encoder.features(mels)
    features = features.float()
    device = features.device

    shares = torch.tensor([window.share for window in windows], device=device)
    events = torch.tensor(np.stack([window.events for window in windows]), device=device)  # (N, 2, S)
    logits = encoder.event_head(features).transpose(1, 2)  # (N, classes, S)
    first, second = (F.cross_entropy(logits, events[:, i], reduction="none") for i in (0, 1))
    per_frame = shares[:, None] * first + (1 - shares[:, None]) * second
    event_loss = per_frame.sum() / (events[:, 0] != UNKNOWN).sum().clamp(min=1)

    facts = encoder.facts(pool(features, [-(-window.end // FRAME) for window in windows]))
    labels = [[window.facts["label"] for window in windows], [window.second for window in windows]]
    targets = torch.tensor([[HEADS["label"].index(name) for name in names] for names in labels], device=device)
    first, second = (F.cross_entropy(facts["label"], t, reduction="none", label_smoothing=0.05) for t in targets)
    label_loss = (shares * first + (1 - shares) * second).mean()

    fact_loss = torch.zeros((), device=device)
    for head, values in HEADS.items():
        known = [i for i, window in enumerate(windows) if head in window.facts]
        if head != "label" and known:
            target = torch.tensor([values.index(windows[i].facts[head]) for i in known], device=device)
            fact_loss = fact_loss + F.cross_entropy(facts[head][known], target, reduction="sum") / len(windows)
    return {"events": event_loss, "label": label_loss, "facts": fact_loss}


@torch.no_grad()
def read_facts(
    encoder: Encoder, log_mel: LogMel, waves: list[np.ndarray], device: torch.device
) -> list[dict[str, str]]:
    """{head: answer} of each clip, from the mean of its frames over all its windows, float32, no augmentation."""
    encoder.eval()
    pieces = [(i, wave[at : at + WINDOW]) for i, wave in enumerate(waves) for at in range(0, len(wave), WINDOW)]
    sums, counts = torch.zeros(len(waves), 160, device=device), torch.zeros(len(waves), device=device)
    for at in range(0, len(pieces), 32):
        part = pieces[at : at + 32]
        padded = np.stack([np.pad(wave, (0, WINDOW - len(wave))) for _, wave in part])
        features = encoder.features(log_mel(torch.from_numpy(padded).to(device)))
        for (i, wave), feature in zip(part, features, strict=True):
            frames = -(-len(wave) // FRAME)
            sums[i] += feature[:frames].sum(0)
            counts[i] += frames
    logits = encoder.facts(sums / counts[:, None])
    encoder.train()
    answers = {head: [HEADS[head][k] for k in values.argmax(1).tolist()] for head, values in logits.items()}
    return [{head: values[i] for head, values in answers.items()} for i in range(len(waves))]
