"""Methods that LangChain wraps or asks about at every call, at the least that this costs."""

from __future__ import annotations

from inspect import signature
from types import MethodType
from typing import TYPE_CHECKING, Any, TypeVar, cast

from langsmith.utils import tracing_is_enabled

if TYPE_CHECKING:
    from collections.abc import Callable

F = TypeVar("F", bound="Callable[..., Any]")


def signed(method: F) -> F:
    """The method, which knows its own signature: langchain-core and LangSmith ask for it at every call."""
    known: Any = method
    known.__signature__ = signature(method)
    return method


def unhooked(method: F) -> F:
    """An async hook of a middleware, given out as a plain function where LangSmith does not trace.

    create_agent has LangSmith wrap each hook. It hops to a thread before an async one and after it, and makes it a
    task, also where nothing is traced; of a plain function that returns an awaitable it does nothing of the kind. Where
    tracing begins only after the agent was made, spans of the hook are empty, and those of models stand beside it.
    """
    return cast("F", _Unhooked(signed(method)))


class _Unhooked:
    def __init__(self, method: Callable[..., Any]) -> None:
        self._method = method
        self.__doc__ = method.__doc__

    def __get__(self, instance: object, owner: type) -> Callable[..., Any]:
        if instance is None:
            return self._method
        bound = MethodType(self._method, instance)
        if tracing_is_enabled():
            return bound

        def hook(request: Any, handler: Any) -> Any:  # noqa: ANN401 - the method's
            return bound(request, handler)

        return signed(hook)
