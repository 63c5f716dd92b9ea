"""guardmw for LlamaIndex: nothing unsafe goes into a model unseen, and what comes out is judged."""

from llama_index.callbacks.guardmw.handler import CoverageWarning, GuardCallbackHandler, guardmw_callback_handler

__all__ = ["CoverageWarning", "GuardCallbackHandler", "guardmw_callback_handler"]
