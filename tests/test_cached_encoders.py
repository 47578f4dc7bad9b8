"""Every encoder behind the cache: a batch of known and unknown media has the features and the mask that it has without."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from test_contract import EXAMPLES

from mmllm.cache.identity import identity
from mmllm.cache.media import CachedBatch, Facts, MediaCache, Told
from mmllm.cache.store import Room
from mmllm.config.base import BuildContext, component_class
from mmllm.config.families import Gridded, Membered
from mmllm.testing import _examples

# The first variant of every kind, and those of towers whose items differ in length or whose features are joined.
CASES = [(kind, variant) for kind, variants in EXAMPLES["encoder"].items() for variant in variants[:1]]
CASES += [
    (kind, variant) for kind in ("clip", "frames", "fused", "tiled") for variant in EXAMPLES["encoder"][kind][1:4]
]


@pytest.mark.parametrize(("kind", "variant"), CASES, ids=lambda value: value if isinstance(value, str) else "")
def test_a_mixed_batch_is_as_without_a_cache(kind: str, variant: dict[str, Any], tmp_path: Path) -> None:
    config: Any = component_class("encoder", kind).model_validate({"kind": kind, **variant}).tiny()
    torch.manual_seed(0)
    context = BuildContext(dtype=torch.float32, weights=False)
    encoder, preprocessor = config.build(context).eval(), config.preprocessor(context)
    who = identity(encoder, preprocessor)
    cache = MediaCache(tmp_path, who, room=Room(tmp_path, 10**9))
    items = [preprocessor(example) for example in _examples(config, preprocessor)]

    def features(chosen: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
        known = [
            cache.find(bytes([i]), lambda i=i: items[i], lambda item: Facts.of(preprocessor, item)) for i in chosen
        ]
        for i, one in zip(chosen, known, strict=True):
            told = Told(one.facts)
            assert told.num_tokens({}) == preprocessor.num_tokens(items[i])
            if isinstance(preprocessor, Gridded):
                assert told.grid({}) == preprocessor.grid(items[i])
            if isinstance(preprocessor, Membered):
                assert told.members({}) == preprocessor.members(items[i])
        batch = cache.complete(CachedBatch.of(known))
        missing = batch.take()
        return cache.features(batch, lambda: encoder(preprocessor.collate(missing)))

    with torch.no_grad():
        first, _ = features([2, 0])
        expected, mask = encoder(preprocessor.collate(items))
        found, found_mask = features(list(range(len(items))))
    assert torch.equal(found_mask, mask)
    scale = float(expected.abs().max())
    torch.testing.assert_close(found * mask[..., None], expected * mask[..., None], rtol=0, atol=2e-5 * max(1.0, scale))
    length = int(mask[2].sum())
    assert torch.equal(found[2, :length], first[0, :length]), "known ones are used to the bit"
    assert cache.tally.made == len(items)
    assert identity(encoder, preprocessor) == who, "use does not change who it is"
