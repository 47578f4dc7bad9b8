"""Native-aspect ViT helpers against open_clip's own fixed-square forward."""

from __future__ import annotations

import pytest
import torch
from PIL import Image

from mmllm.encoders.vit import fit_grid, interpolate_positions, patchify, resize_to_grid, vit_features


@pytest.fixture(scope="module")
def visual() -> torch.nn.Module:
    from open_clip.transformer import VisionTransformer

    torch.manual_seed(0)
    return VisionTransformer(image_size=40, patch_size=8, width=32, layers=3, heads=4, mlp_ratio=2.0).eval()


@pytest.mark.parametrize(
    ("size", "grid"),
    [
        ((400, 100), (5, 20)),
        ((100, 400), (20, 5)),
        ((200, 200), (10, 10)),
        ((64, 64), (3, 3)),  # smaller than the budget: not enlarged
        ((8000, 6000), (9, 11)),
        ((4000, 10), (1, 100)),
        ((10, 4000), (100, 1)),
        ((1, 1), (1, 1)),
    ],
)
def test_grid_keeps_the_aspect_within_the_budget(size: tuple[int, int], grid: tuple[int, int]) -> None:
    assert fit_grid(*size, patch=20, max_patches=100) == grid


def test_every_grid_is_within_its_budget() -> None:
    for budget in (1, 2, 7, 100):
        for width in (1, 19, 30, 77, 210, 333, 1999):
            for height in (1, 25, 190, 640):
                rows, cols = fit_grid(width, height, 20, budget)
                assert rows >= 1
                assert cols >= 1
                assert rows * cols <= budget
    with pytest.raises(ValueError, match="width=0"):
        fit_grid(0, 10, 20, 100)


def test_resize_leaves_a_fitting_picture_alone() -> None:
    image = Image.new("RGB", (80, 40), "red")
    assert resize_to_grid(image, 2, 4, 20) is image
    assert resize_to_grid(image, 1, 3, 20).size == (60, 20)


def test_patches_are_in_reading_order() -> None:
    pixels = torch.arange(3 * 4 * 6, dtype=torch.float32).reshape(3, 4, 6)
    patches = patchify(pixels, 2)
    assert patches.shape == (6, 12)
    assert torch.equal(patches[4].reshape(3, 2, 2), pixels[:, 2:4, 2:4])
    with pytest.raises(ValueError, match="multiples of patch 4"):
        patchify(pixels, 4)


def test_positions_interpolate_linearly_and_keep_the_class_token() -> None:
    ramp = torch.arange(4.0).repeat(4, 1)  # the value is the column
    table = torch.cat([torch.tensor([[9.0]]), ramp.reshape(16, 1)])
    assert torch.equal(interpolate_positions(table, 4, 4), table)
    wide = interpolate_positions(table, 2, 8)
    assert wide.shape == (17, 1)
    assert wide[0, 0] == 9.0
    expected = ((torch.arange(8.0) + 0.5) / 2 - 0.5).clamp(0, 3)  # pixel centres, ends repeated
    torch.testing.assert_close(wide[1:].reshape(2, 8), expected.repeat(2, 1))
    with pytest.raises(ValueError, match="7 position embeddings"):
        interpolate_positions(torch.zeros(7, 2), 2, 2)


@pytest.mark.parametrize("layers", [1, 2, 3])
def test_square_pictures_equal_open_clip(visual: torch.nn.Module, layers: int) -> None:
    pictures = torch.randn(2, 3, 40, 40, generator=torch.Generator().manual_seed(1))
    patches = torch.stack([patchify(picture, 8) for picture in pictures])
    with torch.no_grad():
        ours = vit_features(visual, patches, torch.tensor([[5, 5]] * 2), layers)
        theirs = visual.forward_intermediates(  # type: ignore[operator]
            pictures, indices=[layers - 1], output_fmt="NLC", output_extra_tokens=True
        )
    # Measured 6e-7: one matrix product instead of the strided convolution.
    torch.testing.assert_close(ours.tokens, theirs["image_intermediates"][0], rtol=0, atol=1e-5)
    torch.testing.assert_close(ours.class_token, theirs["image_intermediates_prefix"][0][:, 0], rtol=0, atol=1e-5)
    assert bool(ours.mask.all())


def test_padding_never_leaks(visual: torch.nn.Module) -> None:
    generator = torch.Generator().manual_seed(2)
    small, large = torch.randn(6, 192, generator=generator), torch.randn(20, 192, generator=generator)
    padded = torch.cat([small, torch.full((14, 192), float("nan"))])
    with torch.no_grad():
        together = vit_features(visual, torch.stack([large, padded]), torch.tensor([[2, 10], [3, 2]]), 3)
        alone = vit_features(visual, small[None], torch.tensor([[3, 2]]), 3)
    torch.testing.assert_close(together.tokens[1, :6], alone.tokens[0], rtol=0, atol=1e-5)
    torch.testing.assert_close(together.class_token[1], alone.class_token[0], rtol=0, atol=1e-5)
    assert together.mask.sum(1).tolist() == [20, 6]
    assert bool((together.tokens[1, 6:] == 0).all())


def test_later_blocks_are_never_computed(visual: torch.nn.Module) -> None:
    calls: list[int] = []
    hooks = [
        block.register_forward_hook(lambda *_, k=k: calls.append(k))
        for k, block in enumerate(visual.transformer.resblocks)  # type: ignore[union-attr, arg-type]
    ]
    vit_features(visual, torch.zeros(1, 4, 192), torch.tensor([[2, 2]]), 2)
    for hook in hooks:
        hook.remove()
    assert calls == [0, 1]
    with pytest.raises(ValueError, match="expected 1 to 3"):
        vit_features(visual, torch.zeros(1, 4, 192), torch.tensor([[2, 2]]), 4)
    with pytest.raises(ValueError, match="holds only 4"):
        vit_features(visual, torch.zeros(1, 4, 192), torch.tensor([[3, 2]]), 1)


def test_small_pictures_are_scaled_up_to_the_fewest_patches() -> None:
    assert fit_grid(64, 64, 20, 100) == (3, 3)
    assert fit_grid(64, 64, 20, 100, min_patches=81) == (9, 9)
    assert fit_grid(400, 100, 20, 100, min_patches=81) == (5, 20)  # has enough: as it is
    for width, height in ((5, 5), (10, 90), (90, 10), (1, 300)):
        rows, cols = fit_grid(width, height, 20, 100, min_patches=81)
        assert 1 <= rows * cols <= 100
    with pytest.raises(ValueError, match="no less than min_patches"):
        fit_grid(64, 64, 20, 10, min_patches=20)
