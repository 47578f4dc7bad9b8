"""How many parameters published systems have, part by part: what `mmllm plan` is held to, and a table of docs/zoo.md.

A line for each fact. ``part`` is a part of the plan, or a piece that one of the stages trains. ``published`` is the number that
the source states, or that the shapes in its code give (then exact). Where ours is off by more than 1 %, ``differs`` says why.
"""

from __future__ import annotations

from typing import NamedTuple


class Size(NamedTuple):
    config: str
    part: str
    published: int
    source: str
    differs: str = ""


LLAMA = "arXiv 2302.13971, table 2"
LLAMA2 = "arXiv 2307.09288: 7B and 13B in LLaMA's shapes"
IMAGE, AUDIO = "inputs.image.projector", "inputs.audio.projector"
LORA, LINEAR = "backbone.adapter", "inputs.image.projector.modules.language_projection"
OUT = "outputs.image.projector"

# BLIP-2's eyes as LAVIS (506965b) builds them: eva_vit.py with 39 blocks of 1408 and Qformer.py, BERT-base whose every second layer
# has cross-attention, without words' embeddings and text's feed-forward layers, behind `ln_vision`.
EVA_39 = (
    (3 * 14 * 14 + 1) * 1408 + 258 * 1408 + 39 * (4 * 1408**2 + 3 * 1408 + 2 * 2 * 1408 + 2 * 1408 * 6144 + 6144 + 1408)
)
_ATTENTION, _NORM = 4 * (768**2 + 768), 2 * 768
_CROSS = 2 * (768**2 + 768) + 2 * (1408 * 768 + 768) + _NORM
_FEED = 2 * 768 * 3072 + 3072 + 768 + _NORM
QFORMER = 12 * (_ATTENTION + _NORM + _FEED) + 6 * _CROSS + _NORM + 32 * 768 + 2 * 1408
LAVIS = "LAVIS 506965b, shapes of eva_vit.py"

# torch.nn.Transformer of MiniGPT-5: four pre-norm layers each way, 1024 wide, with 77 queries and the two layers of `fc`.
_BLOCK = 4 * (1024**2 + 1024)
_FF = 2 * 1024 * 4096 + 4096 + 1024
MAPPER = 4 * (_BLOCK + _FF + 4096) + 4 * (2 * _BLOCK + _FF + 6144) + 2 * 2048 + 77 * 1024 + 4097 * 1024 + 1025 * 1024

# The bottlenecks of Lynx behind every second of 32 layers: LayerNorm, 4096 to 2048 to 4096, a factor.
LYNX = 16 * (2 * 4096 + 4097 * 2048 + 2049 * 4096 + 1)
# Its resampler: three layers of attention (512 wide, keys from 1408) and feed-forward (four times 4096), without biases.
LYNX_BRIDGE = (
    3 * (2 * 1408 + 2 * 4096 + 4096 * 512 + 1408 * 1024 + 512 * 4096 + 2 * 4096 + 8 * 4096**2) + 2 * 4096 + 32 * 4096
)

SIZES = [
    Size("llava-13b", IMAGE, 1024 * 5120 + 5120, "LLaVA e9f9baa, `mm_projector`"),
    Size("llava-13b", "backbone", 13_000_000_000, LLAMA),
    Size("llavar-13b", IMAGE, 1024 * 5120 + 5120, "LLaVAR 2a1b647, `mm_projector`"),
    Size(
        "llava-next-qwen2-7b",
        IMAGE,
        1025 * 3584 + 3585 * 3584 + 3584,
        "LLaVA-NeXT df17966, `mlp2x_gelu` and `image_newline`",
    ),
    Size("shikra-7b", IMAGE, 1024 * 4096 + 4096, "shikra ff79a4c, `mm_projector`"),
    Size("shikra-7b", "backbone", 6_700_000_000, LLAMA),
    Size("chatspot-7b", "backbone", 6_700_000_000, LLAMA),
    Size("vila-13b", IMAGE, 1024 * 5120 + 5120, "VILA 1c88211, `linear`"),
    Size("vila-13b", "backbone", 13_000_000_000, LLAMA2),
    Size("minigpt-4-13b", "inputs.image.encoder", EVA_39, LAVIS),
    Size("minigpt-4-13b", LINEAR, 768 * 5120 + 5120, "MiniGPT-4 d94738a, `llama_proj`"),
    Size("minigpt-4-13b", IMAGE, QFORMER + 768 * 5120 + 5120, "LAVIS 506965b, shapes of Qformer.py, and `llama_proj`"),
    Size("instructblip-vicuna-7b", "inputs.image.encoder", EVA_39, LAVIS),
    Size(
        "instructblip-vicuna-7b",
        IMAGE,
        188_000_000,
        "arXiv 2301.12597: Q-Former, 188 M",
        "counts words' embeddings and text's feed-forward layers, by which the Q-Former reads; here it does not",
    ),
    Size("minigpt-v2-7b", IMAGE, 4 * 1408 * 4096 + 4096 + 2 * 1408, "MiniGPT-4 d94738a, `llama_proj` and `ln_vision`"),
    Size("minigpt-v2-7b", LORA, 32 * 2 * 2 * 4096 * 64, "MiniGPT-4 d94738a, rank 64 on q and v"),
    Size("skyeyegpt-7b", IMAGE, 4 * 1408 * 4096 + 4096 + 2 * 1408, "MiniGPT-4 d94738a, in which its checkpoint runs"),
    Size("dress-13b", "backbone", 13_000_000_000, LLAMA2),
    Size("bubogpt-7b", LINEAR, 768 * 4096 + 4096, "bubogpt 17c72b5, `LinearProjector`"),
    Size("bubogpt-7b", f"{AUDIO}.modules.language_projection", 768 * 4096 + 4096, "bubogpt 17c72b5, `LinearProjector`"),
    Size(
        "bubogpt-7b", "inputs.audio.encoder", 86_000_000, "arXiv 2305.05665: ViT-B for sounds, 86 M (arXiv 2010.11929)"
    ),
    Size("minigpt-5-7b", OUT, MAPPER, "MiniGPT-5 915ab17, shapes of model.py"),
    Size("minigpt-5-7b", LORA, 32 * 2 * 2 * 4096 * 8, "MiniGPT-5 915ab17, rank 8 on q and v"),
    Size("pandagpt-13b", IMAGE, 1024 * 5120 + 5120, "PandaGPT 9b77e04, `llama_proj`"),
    Size("pandagpt-13b", LORA, 40 * 4 * 2 * 5120 * 32, "PandaGPT 9b77e04, rank 32 on q, k, v, o"),
    Size("pandagpt-13b", "inputs.image.encoder", 632_000_000, "arXiv 2305.05665: ViT-H, 632 M (arXiv 2010.11929)"),
    Size("modaverse-7b", IMAGE, 1024 * 4096 + 4096, "ModaVerse 9838da4, `linear_proj`"),
    Size("modaverse-7b", LORA, 32 * 4 * 2 * 4096 * 32, "ModaVerse 9838da4, rank 32 on q, k, v, o"),
    Size("codi-2-7b", IMAGE, 1025 * 4096 + 2 * 4096 + 4097 * 4096, "i-Code 9b16730, `codi_llama_proj`"),
    Size("codi-2-7b", OUT, 4097 * 1024 + 2 * 1024 + 1025 * 1024, "i-Code 9b16730, `codi_llama_decode`"),
    Size("mplug-owl-7b", LORA, 32 * 2 * 2 * 4096 * 8, "mPLUG-Owl 0f3068f, rank 8 on q and v"),
    Size("mplug-docowl-7b", LORA, 32 * 2 * 2 * 4096 * 8, "mPLUG-DocOwl f91a768 (UReader), rank 8 on q and v"),
    Size("lynx-7b", LORA, LYNX, "lynx-llm 24680d1, shapes of adapter_modeling.py"),
    Size(
        "lynx-7b",
        IMAGE,
        LYNX_BRIDGE,
        "lynx-llm 24680d1, shapes of resampler.py",
        "here it is as wide as the tower, there as the language model",
    ),
    Size("emu-13b", LORA, 40 * 4 * 2 * 5120 * 16, "Emu 13c395e, rank 16 on q, k, v, o"),
    Size("qwen-vl-7b", "backbone", 7_700_000_000, "arXiv 2308.12966, table 1"),
    Size(
        "qwen-vl-7b",
        "inputs.image.encoder",
        1_900_000_000,
        "arXiv 2308.12966, table 1",
        "the paper's tower has a matrix of 4096 x 4096 and positions of 448 px; OpenCLIP's own has 1.84 B",
    ),
    Size(
        "qwen-vl-7b",
        IMAGE,
        80_000_000,
        "arXiv 2308.12966, table 1",
        "the feed-forward layer and the last one, which it has not",
    ),
    Size(
        "silkie-7b",
        LORA,
        32 * 64 * (4096 + 12288 + 2 * 4096 + 2 * (4096 + 11008)),
        "Qwen-VL aa00ed0, finetune.py",
        "q, k and v are one matrix there, with one LoRA",
    ),
    Size("dreamllm-7b", IMAGE, 1024 * 4096 + 4096, "DreamLLM 9dc7677, `clip_vision_embedding`"),
    Size("dreamllm-7b", OUT, 4096 * 1024 + 1024, "DreamLLM 9dc7677, `stable_diffusion_head`"),
    Size("rlhf-v-13b", "backbone", 13_000_000_000, LLAMA),
    Size(
        "mm-interleaved-13b",
        OUT,
        77 * 1024
        + 2 * 1024
        + 2 * 1024**2
        + 2 * 1024
        + 2 * (5120 * 1024 + 1024)
        + 4 * (1024**2 + 1024)
        + 2 * 2 * 1024
        + 2 * 1024 * 3072
        + 3072
        + 1024
        + 2 * 1024,
        "MM-Interleaved ac539d0, shapes of `image_decoder.perceiver_resampler`",
        "a last linear layer to the condition, which it has not",
    ),
    Size("imagebind-llm-7b", LORA, 32 * 16 * (4 * 2 * 4096 + 3 * (4096 + 11008)), "LLaMA-Adapter 521a09d, rank 16"),
    Size(
        "imagebind-llm-7b",
        IMAGE,
        1025 * 4096 + 3 * (4096 + 3 * 4096 * 16384),
        "LLaMA-Adapter 521a09d, `image_bind_*`",
        "three gated blocks with residuals there, an MLP here",
    ),
    Size("any-to-any-five", "backbone", 7_610_000_000, "card of Qwen2.5-7B-Instruct"),
    Size("image-to-audio", "backbone", 1_540_000_000, "card of Qwen2.5-1.5B-Instruct"),
    Size("audio-to-image", "backbone", 1_540_000_000, "card of Qwen2.5-1.5B-Instruct"),
]
