"""The conversations that are open in browsers, so that a page that is loaded again finds its own."""

from __future__ import annotations

from collections import OrderedDict

from mmllm.chat.session import ChatSession

MIN_KEY_LENGTH = 32


class SessionStore:
    """Conversations by the key of their browser tab; the least recently used go when there are more than ``capacity``.

    A key is a secret that the tab drew at random. Shorter ones than ``MIN_KEY_LENGTH`` could be guessed, so what they
    open is never kept.
    """

    def __init__(self, capacity: int = 200) -> None:
        self.capacity = capacity
        self._sessions: OrderedDict[str, ChatSession] = OrderedDict()

    def open(self, key: str) -> ChatSession:
        """The conversation of ``key``; a new one for a new key."""
        if len(key) < MIN_KEY_LENGTH:
            return ChatSession()
        session = self._sessions.setdefault(key, ChatSession())
        self._sessions.move_to_end(key)
        while len(self._sessions) > self.capacity:
            self._sessions.popitem(last=False)[1].stop()
        return session
