import torch
from colour_encoder import ColourConfig
from PIL import Image

from mmllm.config.base import BuildContext
from mmllm.testing import check_component


def test_contract():
    check_component(ColourConfig())
    check_component(ColourConfig(rows=7, width=5))


def test_colours_lie_where_they_are_in_the_picture():
    picture = Image.new("RGB", (20, 10), (255, 0, 0))
    picture.paste((0, 0, 255), (0, 5, 20, 10))
    colours = ColourConfig(rows=2).preprocessor(BuildContext())(picture)["colours"]
    red, blue = [1.0, -1.0, -1.0], [-1.0, -1.0, 1.0]
    assert torch.equal(colours, torch.tensor([red, red, blue, blue]))
