"""guardmw in LangChain: ``prompt | guard() | model | guard()``, ``guard_model(model)``, ``guarded(chain)``."""

from langchain_guardmw.guarded import GuardedChain, guarded
from langchain_guardmw.model import GuardedModel, guard_model
from langchain_guardmw.outcome import REFUSAL
from langchain_guardmw.runnable import GuardRunnable, guard

__all__ = ["REFUSAL", "GuardRunnable", "GuardedChain", "GuardedModel", "guard", "guard_model", "guarded"]
