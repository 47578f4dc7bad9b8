"""The conversations that are open in browsers, so that a page that is loaded again finds its own."""

from __future__ import annotations

import threading
from collections import OrderedDict
from pathlib import Path

from mmllm.chat.session import ChatSession

MIN_KEY_LENGTH = 32


class SessionStore:
    """Conversations by the key of their browser tab; the least recently used go when there are more than ``capacity``.

    A key is a secret that the tab drew at random. Shorter ones than ``MIN_KEY_LENGTH`` could be guessed, so what they
    open is never kept. A page (one loading of a tab) has one conversation, whichever of its requests comes first:
    a question, or the key. ``folder`` is where they put their files. Safe to share by threads.
    """

    def __init__(self, capacity: int = 200, folder: Path | None = None) -> None:
        self.capacity = capacity
        self.folder = folder
        self._lock = threading.Lock()
        self._by_key: OrderedDict[str, ChatSession] = OrderedDict()
        self._by_page: OrderedDict[str, ChatSession] = OrderedDict()
        self._asked: set[str] = set()

    def of_page(self, page: str) -> ChatSession:
        """The conversation of the page with the id ``page``, which asks something; a new one at its first request."""
        with self._lock:
            session = self._by_page.setdefault(page, ChatSession(self.folder))
            self._newest(self._by_page, page)
            self._asked = (self._asked | {page}) & self._by_page.keys()
            return session

    def asked(self, page: str) -> bool:
        """Whether the page has asked anything before it knew its conversation."""
        return page in self._asked

    def open(self, key: str, page: str) -> ChatSession:
        """The conversation of the tab with ``key``, from now on also that of ``page``. If the page has begun one of its
        own before, that one takes the place of the tab's."""
        with self._lock:
            kept = len(key) >= MIN_KEY_LENGTH
            if page not in self._by_page:
                self._by_page[page] = (self._by_key.get(key) if kept else None) or ChatSession(self.folder)
            session = self._by_page[page]
            self._newest(self._by_page, page)
            if kept:
                self._by_key[key] = session
                for forgotten in self._newest(self._by_key, key):
                    forgotten.stop()
            return session

    def _newest(self, sessions: OrderedDict[str, ChatSession], name: str) -> list[ChatSession]:
        """Mark ``name`` as the one used last; returns those that had to go."""
        sessions.move_to_end(name)
        return [sessions.popitem(last=False)[1] for _ in range(len(sessions) - self.capacity)]
