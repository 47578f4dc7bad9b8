"""The encoder ``colour``: its configuration. Without torch, so that commands which build nothing stay quick."""

from typing import ClassVar, Literal

from pydantic import PositiveInt

from mmllm.config.families import EncoderConfig


class ColourConfig(EncoderConfig):
    """Mean colours of a picture on a grid of ``rows`` x ``rows``, each embedded in ``width`` numbers."""

    suggested: ClassVar = {"image": {"rows": 4}}  # what `mmllm new --input image=colour` writes
    kind: Literal["colour"] = "colour"
    rows: PositiveInt = 4
    width: PositiveInt = 64

    def tiny(self):
        return self.model_copy(update={"rows": 2, "width": 8})

    def preprocessor(self, context):
        from colour_encoder.module import ColourPreprocessor

        return ColourPreprocessor(self.rows)

    def build(self, context):
        from colour_encoder.module import ColourEncoder

        return ColourEncoder(self.width).to(context.dtype)
