"""mmllm assembles multimodal LLMs from a YAML file: encoders, input projectors, a backbone with adapters; and trains them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mmllm.assistant import Assistant as Assistant
    from mmllm.assistant import load as load

__version__ = "0.1.0"
__all__ = ["Assistant", "__version__", "load"]


def __getattr__(name: str) -> Any:
    # `import mmllm` and the command line's --help stay free of torch (1.5 s) until a model is wanted.
    if name in ("Assistant", "load"):
        from mmllm import assistant

        return getattr(assistant, name)
    raise AttributeError(f"module 'mmllm' has no attribute {name!r}")
