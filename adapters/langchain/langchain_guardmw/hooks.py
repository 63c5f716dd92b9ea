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
    """A method that is given out as a plain function, which knows its signature.

    langchain-core and LangSmith ask for it at every call, and a bound method's is made anew each time.
    """
    return cast("F", Signed(method))


def unhooked(method: F) -> F:
    """An async hook of a middleware, given out as a plain function where LangSmith does not trace.

    create_agent has LangSmith wrap each hook. It hops to a thread before an async one and after it, and makes it a
    task, also where nothing is traced; of a plain function that returns an awaitable it does nothing of the kind. Where
    tracing begins only after the agent was made, spans of the hook are empty, and those of models stand beside it.
    """
    return cast("F", _Unhooked(method))


class Signed:
    """What ``signed`` makes of a method."""

    def __init__(self, method: Callable[..., Any]) -> None:
        self._method = method
        known = signature(method)
        self._signature = known.replace(parameters=list(known.parameters.values())[1:])
        self.__doc__ = method.__doc__

    def __get__(self, instance: object, owner: type) -> Callable[..., Any]:
        """The method itself, or one of an instance."""
        method = self._method
        if instance is None:
            return method

        # Not by functools.wraps: LangSmith would look through it, and find an async method.
        def bound(*args: Any, **kwargs: Any) -> Any:  # noqa: ANN401 - the method's
            return method(instance, *args, **kwargs)

        known: Any = bound
        known.__signature__ = self._signature
        return bound


class _Unhooked(Signed):
    def __get__(self, instance: object, owner: type) -> Callable[..., Any]:
        if instance is not None and tracing_is_enabled():
            return MethodType(self._method, instance)
        return super().__get__(instance, owner)
