"""guardmw in LangChain: ``prompt | guard() | model | guard()``."""

from langchain_guardmw.outcome import REFUSAL
from langchain_guardmw.runnable import GuardRunnable, guard

__all__ = ["REFUSAL", "GuardRunnable", "guard"]
