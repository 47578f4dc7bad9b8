"""What ``check_component`` asks of a fusion's module in use."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from mmllm.config.families import FusionConfig
from mmllm.contract import equal, require
from mmllm.fusion.base import Fusion, Seen


def check_fusing(
    config: FusionConfig, module: Fusion, low: Fusion, hidden_dim: int, width: int
) -> tuple[Tensor, Tensor, Tensor]:
    """The clauses about who sees what. Gives ``module`` weights with open gates, and returns what it was tried on: hidden
    states, media of ``width`` and their places. ``low`` is another one in bfloat16.
    """
    hidden, media = torch.randn(3, 6, hidden_dim), torch.randn(3, 5, width)
    # Row 0 has media from columns 1 and 4 on, row 1 one from 2 on, row 2 none.
    places = torch.tensor([[0, 1, 5], [0, 4, 2], [1, 2, 3]])
    with torch.no_grad():
        same = [module.fuse(i, hidden, Seen(media, places, (3, 6))) for i in range(len(module.at))]
    untouched = all(torch.equal(found, hidden) for found in same)
    require(untouched, config, "before training hidden states pass bit for bit", "they changed")
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.3)

    def run(fusion: Any, states: Tensor = hidden, shown: Tensor = media, rows: Tensor = places) -> Tensor:
        found: Tensor = fusion.fuse(0, states, Seen(shown, rows, (len(states), 6)))
        return found

    with torch.no_grad():
        found = run(module)
        changed = (found != hidden).any(dim=-1)
        require(
            bool(changed[0, 1:].all() and changed[1, 2:].all()), config, "tokens see the media before them", "not all"
        )
        other = run(module, shown=torch.cat([torch.randn(1, 5, width), media[1:]]))
        differs = (other != found).any(dim=-1)
        require(bool(differs[0, 1:4].all()), config, "a token sees the medium right before it", "another one's change")
        differs[0, 1:4] = False
        require(not bool(differs.any()), config, "a token sees no other medium", "the change of another shows")
        loud = media.clone()
        loud[1, 2:], loud[2, 3:] = 1e3, 1e3
        equal(config, "features behind an item's own are never seen", run(module, shown=loud), found, 1e-5)
        equal(
            config, "rows do not depend on each other", run(module, hidden[:1], media[:2], places[:2]), found[:1], 1e-5
        )
        equal(config, "a row without media is as if there were none", module.fuse(0, hidden[2:], None), found[2:], 1e-5)
        seen = Seen(media, places, (3, 6))
        module.fuse(0, hidden, seen)
        step = module.fuse(0, hidden[:, -1:], seen)
        equal(config, "a later position sees what the last one does", step, found[:, -1:], 1e-5)
        half = low.fuse(0, hidden.bfloat16(), Seen(media, places, (3, 6)))
        require(half.dtype == torch.bfloat16, config, "it runs in bfloat16", str(half.dtype))
    return hidden, media, places
