"""The page's server: one process, on this computer only, with limits."""

from __future__ import annotations

import gc
import os
import signal
import threading
from typing import TYPE_CHECKING

from mmllm.chat.feedback import FeedbackLog
from mmllm.chat.kept import MAX_CHATS
from mmllm.chat.shelf import ModelShelf
from mmllm.errors import MmllmError
from mmllm.ui.assets import asset, script
from mmllm.ui.guard import LocalOnly
from mmllm.ui.layout import theme
from mmllm.ui.page import build_demo
from mmllm.ui.uploads import Uploads

if TYPE_CHECKING:
    from gradio import Blocks

MAX_FILE_SIZE = "50mb"
MAX_QUEUE = 32


def serve(
    shelf: ModelShelf,
    names: list[str],
    log: FeedbackLog,
    port: int | None = None,
    *,
    open_browser: bool = False,
    block: bool = True,
) -> Blocks:
    """Serve the page for the models called ``names``; the first starts loading. Returns at once if not ``block``."""
    if block:
        _end_on_signals()
    uploads = Uploads()
    os.environ["GRADIO_TEMP_DIR"] = str(uploads.path)
    demo = build_demo(shelf, names, log, uploads.path)
    demo.uploads = uploads
    try:
        demo.queue(max_size=MAX_QUEUE).launch(
            server_name="127.0.0.1",
            server_port=port,
            share=False,
            inbrowser=open_browser,
            quiet=True,
            prevent_thread_lock=True,
            max_file_size=MAX_FILE_SIZE,
            ssr_mode=False,
            enable_monitoring=False,
            theme=theme(),
            css_paths=[str(asset("demo.css"))],
            head=f"<script>const MAX_CHATS = {MAX_CHATS};\n{script('chats')}</script>",
            allowed_paths=[str(asset("examples"))],
            footer_links=["api"],
            app_kwargs={"middleware": [(LocalOnly, (), {})]},
            _frontend=False,  # spares a check that the page answers within 3 s, which a busy computer does not keep
        )
    except OSError as error:
        which = f"port {port} is" if port else "ports 7860 to 7959 are"
        raise MmllmError(f"{which} taken on 127.0.0.1; choose another one") from error
    if block:
        # What is imported by now lives as long as the process. Collections that pass it over are shorter while answers
        # stream, and the end of the process takes a tenth of its time.
        gc.freeze()
    shelf.warm(names[0])  # only now: reading a model would slow the page down
    if block:
        print(f"mmllm chat is open at {demo.local_url} (Ctrl-C ends it)", flush=True)
        try:
            demo.block_thread()
        finally:
            uploads.close()
    return demo


def _end_on_signals() -> None:
    """Let a closed terminal or a service manager end the process as Ctrl-C does: with its files cleaned up."""

    def end(number: int, _: object) -> None:
        raise SystemExit(128 + number)

    if threading.current_thread() is threading.main_thread():  # Python allows handlers there only
        for number in [getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name)]:
            if signal.getsignal(number) == signal.SIG_DFL:  # not where nohup has it ignored
                signal.signal(number, end)
