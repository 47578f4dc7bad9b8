"""The encoder ``colour``: what a picture becomes in a data worker, and the module."""

import numpy as np
import torch
from PIL import Image

from mmllm.encoders.base import Encoder


class ColourPreprocessor:
    media, decode_options = "image", {}  # it takes RGB pictures, decoded without options

    def __init__(self, rows):
        self.rows = rows

    def __call__(self, picture):
        small = picture.resize((self.rows, self.rows), Image.Resampling.BOX)
        return {"colours": torch.from_numpy(np.array(small, dtype=np.float32).reshape(-1, 3) / 127.5 - 1)}

    def num_tokens(self, item):
        return len(item["colours"])

    def collate(self, items):
        return {"colours": torch.stack([item["colours"] for item in items])}


class ColourEncoder(Encoder):
    def __init__(self, width):
        super().__init__()
        self.output_dim = width
        self.embed = torch.nn.Linear(3, width)

    def forward(self, batch):  # colours (N, S, 3), S = rows * rows
        features = self.embed(batch["colours"].to(self.embed.weight.dtype))
        return features, torch.ones(features.shape[:2], dtype=torch.bool, device=features.device)
