"""Chat sessions, feedback and the models to choose from; no user interface."""

from mmllm.chat.feedback import Feedback, FeedbackLog
from mmllm.chat.session import Assistant, ChatSession, Sampling
from mmllm.chat.shelf import ModelShelf, find_models

__all__ = ["Assistant", "ChatSession", "Feedback", "FeedbackLog", "ModelShelf", "Sampling", "find_models"]
