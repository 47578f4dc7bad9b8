"""``mmllm data show``: what the model is given to learn from, token spans and supervision made visible."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from mmllm.config.base import BuildContext, suggest
from mmllm.config.contradictions import with_lengths
from mmllm.config.run import RunConfig, StageConfig
from mmllm.data.mixture import StageData
from mmllm.data.tokens import token_lengths
from mmllm.errors import ConfigError, DataError, MediaError
from mmllm.processing.messages import Part, Sample

if TYPE_CHECKING:
    from rich.console import Console
    from rich.text import Text

    from mmllm.processing.batch import Encoded, Span
    from mmllm.processing.processor import Processor

SUPERVISED, GIVEN, MEDIA, FAULT = "bold green", "default", "cyan", "red"

# What is said of a decoded medium, by the name of its decoder.
DESCRIBE: dict[str, Callable[[Any, dict[str, Any]], str]] = {
    "image": lambda image, options: f"{image.width}x{image.height}",
    "audio": lambda sound, options: f"{len(sound) / options['sample_rate']:.2f} s",
    "video": lambda frames, options: f"{len(frames)} frames of {frames[0].width}x{frames[0].height}",
    "point_cloud": lambda points, options: f"{len(points)} points",
}


def run_show(
    config: RunConfig,
    context: BuildContext,
    *,
    stage: str | None = None,
    n: int = 4,
    console: Console | None = None,
) -> int:
    """Print the first ``n`` samples of a stage's first epoch, as batched for training; supervised text is coloured.

    On an output without colours supervised text stands between « and ». Samples that cannot be used are printed with
    their fault. Returns 0, or 1 when no sample could be shown. Builds the processor, no model weights.
    """
    from rich.console import Console

    from mmllm.processing.processor import Processor

    console = console or Console(highlight=False, soft_wrap=True)
    chosen = _stage(with_lengths(config, context), stage)
    processor = Processor.from_config(config.model, context)
    data = StageData(chosen.data, config.seed, context, token_lengths(chosen, processor))
    sources = f"{len(data)} samples in {len(data.tables)} source{'s' if len(data.tables) != 1 else ''}"
    console.print(f"stage {chosen.name}: {sources}, {data.epoch_size(0)} samples an epoch")
    for number, amount in enumerate(data.amounts() if data.means is not None else []):
        console.print(f"source {number}: {amount}")
    console.print(_styled(console, [("supervised text", SUPERVISED), (", given text, ", GIVEN), ("[media]", MEDIA)]))
    shown: list[Encoded] = []
    for index in data.order(0):
        if len(shown) == n:
            break
        try:
            sample = data[index]
            encoded = processor.encode_sample(sample, chosen.max_length)
        except (DataError, MediaError) as error:
            console.print(f"\n{data.where(index)}: {error}", style=FAULT, markup=False, highlight=False)
            continue
        shown.append(encoded)
        tags = " ".join(f"{key}={value!r:.60}" for key, value in sample.tags.items())
        title = f"{_printable(sample.id)} ({data.where(index)}) {tags}"
        console.print(f"\n{title}", style="bold", markup=False, highlight=False)
        console.print(_styled(console, _segments(processor, sample, encoded)))
        console.print(_counts(len(encoded.ids), encoded.num_supervised), style="dim", highlight=False)
    if not shown:
        return 1
    batch = processor.collate(shown)
    rows, width = batch.ids.shape
    padding = rows * width - int(batch.attention_mask.sum())
    media = "".join(f", {name}: {len(items.positions)} tokens" for name, items in batch.media.items())
    console.print(f"\nbatch of {rows} x {width}: {_counts(rows * width, batch.tokens)}, {padding} padding{media}")
    return 0


def _segments(processor: Processor, sample: Sample, encoded: Encoded) -> Iterator[tuple[str, str]]:
    """(text, style) of the sequence, in order."""
    asked = [message for message in processor.as_read(sample.messages) if message.role != "assistant"]
    parts = [part for message in asked for part in message.parts if part.type != "text"]
    own = {
        id: f"<{name}_{end}>"
        for name, modality in processor.modalities.items()
        if modality.markers
        for id, end in zip(modality.markers, ("start", "end"), strict=True)
    }
    for name, signals in processor.signals.items():
        own |= {id: f"<{name}:{id - signals.first}>" for id in signals.ids}
    position = 0
    for span, part in zip(encoded.spans, parts, strict=True):
        yield from _text_segments(processor, encoded, position, span.start, own)
        yield _media_text(processor, sample, span, part), MEDIA
        position = span.start + span.count
    yield from _text_segments(processor, encoded, position, len(encoded.ids), own)


def _text_segments(
    processor: Processor, encoded: Encoded, start: int, stop: int, own: dict[int, str]
) -> Iterator[tuple[str, str]]:
    run: list[int] = []
    for position in range(start, stop + 1):
        ends = position == stop or encoded.ids[position] in own
        if run and (ends or encoded.supervised[position] != encoded.supervised[position - 1]):
            style = SUPERVISED if encoded.supervised[position - 1] else GIVEN
            yield _printable(str(processor.tokenizer.decode(run))), style
            run = []
        if position < stop and ends:
            yield own[encoded.ids[position]], MEDIA
        elif not ends:
            run.append(encoded.ids[position])


def _media_text(processor: Processor, sample: Sample, span: Span, part: Part) -> str:
    assert part.value is not None  # it has been encoded
    from mmllm.processing.reading import DECODERS
    from mmllm.processing.sources import read_media

    preprocessor = processor.modalities[span.modality].preprocessor
    source = read_media(part.value, root=sample.root, limits=processor.limits)
    decode = DECODERS[preprocessor.media]
    decoded = decode(source, limits=processor.limits, **preprocessor.decode_options)
    size = DESCRIBE[preprocessor.media](decoded, preprocessor.decode_options)
    name = part.value if isinstance(part.value, str) and len(part.value) <= 200 else f"{len(part.value):,} bytes"
    return f"[{span.modality}: {span.count} tokens, {size}, {_printable(str(name))}]"


def _styled(console: Console, segments: Any) -> Text:
    from rich.text import Text

    text = Text()
    for content, style in segments:
        marked = f"«{content}»" if style == SUPERVISED and console.color_system is None else content
        text.append(marked, style=style)
    return text


def _printable(text: str) -> str:
    """Without control characters: data must not be able to steer the terminal."""
    return "".join(char if char.isprintable() or char == "\n" else repr(char)[1:-1] for char in text)


def _counts(tokens: int, supervised: int) -> str:
    return f"{tokens} tokens, {supervised} supervised ({supervised / tokens:.0%})"


def _stage(config: RunConfig, name: str | None) -> StageConfig:
    names = [stage.name for stage in config.stages]
    if not names:
        raise ConfigError([("stages", "none; expected at least one stage with data")])
    if name is not None and name not in names:
        raise ConfigError([("stages", f"no stage {name!r}{suggest(name, names)}; the stages are {', '.join(names)}")])
    return config.stages[0 if name is None else names.index(name)]
