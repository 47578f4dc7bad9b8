"""The chat page in the browser. gradio is imported when a page is built, in ``mmllm.ui.page`` and nowhere else."""

from __future__ import annotations

from pathlib import Path

from mmllm.chat.feedback import FeedbackLog, default_path
from mmllm.chat.shelf import EMBEDDED, ModelShelf, find_models


def launch(
    model: str = EMBEDDED,
    port: int | None = None,
    models_dir: str | Path | None = None,
    feedback: str | Path | None = None,
    open_browser: bool = False,
) -> None:
    """Open the chat page on 127.0.0.1 and serve it until interrupted.

    ``model`` is ``"embedded"`` or a model folder; ``models_dir`` holds more model folders to choose from; ``port`` None
    takes the first free one from 7860; ``feedback`` is the file for thumbs up and down (``default_path()`` if None).
    The page is up at once; the model loads in the background. Raises ``CheckpointError`` when ``models_dir`` or a model
    folder does not exist.
    """
    import mmllm.assistant
    from mmllm.ui.page import serve

    found = [str(folder.resolve()) for folder in find_models(Path(models_dir))] if models_dir is not None else []
    first = model if model == EMBEDDED else str(mmllm.assistant.model_folder(model).resolve())
    log = FeedbackLog(Path(feedback) if feedback else default_path())
    serve(
        ModelShelf(mmllm.assistant.load),
        list(dict.fromkeys([first, EMBEDDED, *found])),
        log,
        port,
        open_browser=open_browser,
    )
