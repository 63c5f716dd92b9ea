"""Documents that a guard allows reach the model as they are; the others are dropped, flagged, or stop the query."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Literal, get_args

from llama_index.callbacks.guardmw._verdicts import Judge, enforced, log, tell, withholds
from llama_index.core.base.base_retriever import BaseRetriever
from llama_index.core.bridge.pydantic import PrivateAttr
from llama_index.core.postprocessor.types import BaseNodePostprocessor
from llama_index.core.schema import BaseNode, ImageNode, IndexNode, MetadataMode, NodeWithScore

from guardmw import Conversation, Turn

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from llama_index.core.prompts.mixin import PromptMixinType
    from llama_index.core.schema import QueryBundle

    from guardmw import Backend, Guard, Verdict

OnBlock = Literal["drop", "flag", "raise"]

FLAG = "guardmw"
"""The key of a flagged node's metadata under which the verdict stands; models and embeddings are not shown it."""


class GuardPostprocessor(BaseNodePostprocessor):
    """Judges retrieved nodes as the model will read them, all in one batch. What is allowed stays the same object.

    Put it last: a node that another postprocessor changes after it goes to the model unseen. What the policy flags
    gets the verdict as metadata; what it blocks, or wants reviewed, is dropped with a line in the log "guardmw",
    flagged in the same way, or raises.

    Args:
        g: a Guard, a Backend, a spec for ``guardmw.load``, or None for the embedded model, loaded at the first node.
        on_block: "drop", "flag" or "raise".

    Raises:
        BackendError: the spec names no backend, or it cannot be made.
        TypeError: g is none of these.
        ValueError: on_block is none of the three.
    """

    on_block: OnBlock = "drop"
    _judge: Judge = PrivateAttr()

    def __init__(self, g: Guard | Backend | str | Judge | None = None, *, on_block: OnBlock = "drop") -> None:
        super().__init__(on_block=_known(on_block))  # type: ignore[call-arg] # pydantic makes the signature
        self._judge = Judge.of(g)

    def __reduce__(self) -> tuple[Callable[..., GuardPostprocessor], tuple[Judge]]:
        # LlamaIndex leaves out what cannot be pickled, of the original too, and would make it anew without its guard.
        return partial(type(self), on_block=self.on_block), (self._judge,)

    @classmethod
    def class_name(cls) -> str:
        """As LlamaIndex names it."""
        return "GuardPostprocessor"

    def _postprocess_nodes(
        self,
        nodes: list[NodeWithScore],
        query_bundle: QueryBundle | None = None,  # noqa: ARG002 - the framework's signature
    ) -> list[NodeWithScore]:
        return _screen(self._judge, nodes, self.on_block)

    async def _apostprocess_nodes(
        self,
        nodes: list[NodeWithScore],
        query_bundle: QueryBundle | None = None,  # noqa: ARG002 - the framework's signature
    ) -> list[NodeWithScore]:
        return await _ascreen(self._judge, nodes, self.on_block)


class GuardedRetriever(BaseRetriever):
    """A retriever of which nobody gets what is withheld; made by ``guard_retriever``."""

    def __init__(self, retriever: BaseRetriever, judge: Judge, on_block: OnBlock) -> None:
        super().__init__(callback_manager=getattr(retriever, "callback_manager", None))
        self._inner = retriever
        self._judge = judge
        self._on_block = on_block

    def _get_prompt_modules(self) -> PromptMixinType:
        return {"retriever": self._inner}

    # The name of the parameter is part of the signature: LlamaIndex gives it by name.
    def _retrieve(self, query_bundle: QueryBundle) -> list[NodeWithScore]:
        return _screen(self._judge, self._inner.retrieve(query_bundle), self._on_block)

    async def _aretrieve(self, query_bundle: QueryBundle) -> list[NodeWithScore]:
        return await _ascreen(self._judge, await self._inner.aretrieve(query_bundle), self._on_block)

    # The inner retriever has followed its nodes where they lead; what came of going on would be judged by nobody.
    def _handle_recursive_retrieval(
        self,
        query_bundle: QueryBundle,  # noqa: ARG002 - the framework's signature
        nodes: list[NodeWithScore],
    ) -> list[NodeWithScore]:
        return nodes

    async def _ahandle_recursive_retrieval(
        self,
        query_bundle: QueryBundle,  # noqa: ARG002 - the framework's signature
        nodes: list[NodeWithScore],
    ) -> list[NodeWithScore]:
        return nodes


def guard_retriever(
    retriever: BaseRetriever, g: Guard | Backend | str | None = None, *, on_block: OnBlock = "drop"
) -> GuardedRetriever:
    """A retriever that judges what this one finds, and does with it what GuardPostprocessor does.

    Raises:
        BackendError: the spec names no backend, or it cannot be made.
        TypeError: it is no retriever, or g is none of these.
        ValueError: on_block is none of the three.
    """
    if not isinstance(retriever, BaseRetriever):
        raise TypeError(f"give a retriever, not {type(retriever).__name__}; of an index: index.as_retriever()")
    return GuardedRetriever(retriever, Judge.of(g), _known(on_block))


def turn_of_node(node: NodeWithScore) -> Turn:
    """A retrieved node as a model will read it, with the metadata that it is shown, and with what it leads to."""
    text = node.get_content(MetadataMode.LLM)
    kinds = [kind for kind in ("image", "audio", "video") if getattr(node.node, f"{kind}_resource", None)]
    if isinstance(node.node, ImageNode):
        kinds.append("image")
    behind = node.node.obj if isinstance(node.node, IndexNode) else None
    if isinstance(behind, BaseNode):
        behind = NodeWithScore(node=behind)
    if isinstance(behind, NodeWithScore):
        turn = turn_of_node(behind)
        text, kinds = f"{text}\n{turn.text}", [*kinds, *turn.media]
    elif isinstance(behind, str):
        text = f"{text}\n{behind}"
    elif behind is not None:
        # What an engine or a retriever will say nobody can tell before it is asked.
        kinds.append(type(behind).__name__)
    return Turn("document", text, name=node.node_id, media=tuple(kinds))


def _screen(judge: Judge, nodes: Sequence[NodeWithScore], on_block: OnBlock) -> list[NodeWithScore]:
    return _settled(nodes, judge.ready().screen_many(_read(nodes)), on_block) if nodes else []


async def _ascreen(judge: Judge, nodes: Sequence[NodeWithScore], on_block: OnBlock) -> list[NodeWithScore]:
    if not nodes:
        return []
    guard = await judge.aready()
    return _settled(nodes, await guard.ascreen_many(_read(nodes)), on_block)


def _read(nodes: Sequence[NodeWithScore]) -> list[Conversation]:
    return [Conversation((turn_of_node(node),)) for node in nodes]


def _settled(nodes: Sequence[NodeWithScore], verdicts: Sequence[Verdict], on_block: OnBlock) -> list[NodeWithScore]:
    if on_block == "raise":
        enforced(verdicts)
    else:
        tell(verdicts)
    kept = []
    for node, verdict in zip(nodes, verdicts, strict=True):
        if withholds(verdict) and on_block == "drop":
            log.warning("dropped a node: %s", verdict.summary)
        elif verdict.action == "allow":
            kept.append(node)
        else:
            kept.append(_flagged(node, verdict))
    return kept


def _flagged(node: NodeWithScore, verdict: Verdict) -> NodeWithScore:
    """A copy with the verdict in its metadata: the node itself is the index's own."""
    copied = node.node.model_copy(
        update={
            "metadata": {**node.node.metadata, FLAG: f"{verdict.action}: {verdict.summary}"},
            "excluded_llm_metadata_keys": [*node.node.excluded_llm_metadata_keys, FLAG],
            "excluded_embed_metadata_keys": [*node.node.excluded_embed_metadata_keys, FLAG],
        }
    )
    return node.model_copy(update={"node": copied})


def _known(on_block: OnBlock) -> OnBlock:
    if on_block not in get_args(OnBlock):
        raise ValueError(f"on_block is one of {', '.join(map(repr, get_args(OnBlock)))}")
    return on_block
