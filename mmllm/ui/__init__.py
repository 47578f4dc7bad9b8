"""The chat page in the browser. gradio is imported when a page is built, in ``page`` and ``layout`` and nowhere else."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from mmllm.chat.feedback import FeedbackLog, default_path
from mmllm.chat.shelf import EMBEDDED, ModelShelf, find_models
from mmllm.errors import MmllmError

if TYPE_CHECKING:
    from mmllm.chat.session import Assistant


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
    The page is up at once; the model loads in the background. Raises ``MmllmError`` when gradio is not installed, a
    model folder does not exist, the feedback file cannot be written, or the port is taken or none.
    """
    if port is not None and not 1 <= port <= 65535:
        raise MmllmError(f"port {port}: there is no such port; choose one from 1 to 65535")
    try:
        from mmllm.ui.serve import serve
    except ModuleNotFoundError as error:
        if error.name != "gradio":
            raise
        raise MmllmError("the demo needs gradio; install it with `pip install 'mmllm[demo]'`") from error
    found = [str(folder.resolve()) for folder in find_models(Path(models_dir))] if models_dir is not None else []
    first = model if model == EMBEDDED else _folder(model)
    log = FeedbackLog(Path(feedback) if feedback else default_path())
    log.check()
    names = list(dict.fromkeys([first, EMBEDDED, *found]))
    serve(ModelShelf(_load), names, log, port, open_browser=open_browser)


def _load(name: str) -> Assistant:
    import mmllm  # brings torch in: in the background, while the page is up already

    return mmllm.load(name)


def _folder(model: str) -> str:
    from mmllm.assistant import model_folder

    return str(model_folder(model).resolve())
