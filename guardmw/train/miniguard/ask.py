"""A model in memory, asked in its dialect: scores by the logprobs of its verdicts, as serving reads them."""

from __future__ import annotations

import asyncio
import copy
from dataclasses import replace
from functools import cache
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from transformers import DynamicCache

from guardmw import dialects
from guardmw.conversation import Conversation
from guardmw.dialects import Reply, Token
from guardmw.errors import BackendError
from guardmw.train.miniguard.chat import shared
from guardmw.train.miniguard.form import DIALECT, asked
from guardmw.train.miniguard.network import device
from guardmw.verdict import Scores

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from torch import Tensor

    from guardmw.dialects import Judging, Request
    from guardmw.evaluate.metrics import Floats
    from guardmw.train.miniguard.chat import Chat

# A text that is cut in two so often is of no use in the pieces.
_CUTS = 6


class Asked:
    """A backend of a model that is being made.

    It tells no kinds of harm: they are another question, and nothing is chosen by them. An answer that cannot be read
    is as good as unsafe, as a guard makes of it.

    Args:
        name: of the model.
        model: of transformers, or peft's around one.
        chat: how to speak with it.
        batch_tokens: tokens that are computed at once, padding included.

    Attributes:
        unread: conversations with an answer that could not be read, so far.
    """

    def __init__(self, name: str, model: Any, chat: Chat, batch_tokens: int) -> None:  # noqa: ANN401 - see network.fitted
        self.name = name
        self.unread = 0
        self._model = model
        self._chat = chat
        self._batch_tokens = batch_tokens
        self._context: int = getattr(model.config, "max_position_embeddings", 0) or 2**20
        self._prefix: list[int] = []
        self._cache: Any = None
        # The alternatives of all steps are some hundred thousand tokens, few of which differ.
        self._spelled = cache(lambda id_: str(chat.tokenizer.decode([id_])))

    def scores(self, conversations: Sequence[Conversation]) -> Floats:
        """P(unsafe) of each, (n,)."""
        return np.array([given.unsafe for given in self.classify(conversations)])

    def classify(self, conversations: Sequence[Conversation]) -> list[Scores]:
        """Score each; a text that is longer than the model's context in pieces, of which the worst counts."""
        asking = [_Asking(at, piece) for at, given in enumerate(conversations) for piece in self._pieces(given)]
        found = [0.0] * len(conversations)
        waiting = asking
        while waiting:
            replies = iter(self._replies([request for one in waiting for request in one.requests]))
            for one in waiting:
                one.tell([next(replies) for _ in one.requests])
            waiting = [one for one in waiting if one.requests]
        self.unread += len({one.at for one in asking if one.unsafe is None})
        for one in asking:
            found[one.at] = max(found[one.at], 1.0 if one.unsafe is None else one.unsafe)
        return [Scores(unsafe, backend=self.name) for unsafe in found]

    async def aclassify(self, conversations: Sequence[Conversation]) -> list[Scores]:
        """The same, on a thread."""
        return await asyncio.to_thread(self.classify, conversations)

    def _pieces(self, given: Conversation, cuts: int = _CUTS) -> list[Conversation]:
        request = asked(given)
        if not cuts or len(self._chat.ids(self._chat.prompt(request))) + request.max_tokens <= self._context:
            return [given]
        text, middle = given.last.text, len(given.last.text) // 2
        halves = (text[:middle], text[middle:]) if middle else ()
        return [
            piece
            for half in halves
            for piece in self._pieces(Conversation((*given.context, replace(given.last, text=half))), cuts - 1)
        ] or [given]

    def _replies(self, requests: Sequence[Request]) -> list[Reply]:
        """An answer to each; nothing to those that ask for no logprobs, which are about kinds of harm."""
        prompts = [self._chat.ids(self._chat.prompt(r)) if r.top_logprobs else [] for r in requests]
        replies = [Reply("", cut=True)] * len(requests)
        heard = [i for i, prompt in enumerate(prompts) if prompt and len(prompt) < self._context]
        if not heard:
            return replies
        self._model.to(device()).eval()
        with torch.inference_mode(), torch.autocast(device().type, dtype=torch.bfloat16):
            self._remember([prompts[i] for i in heard])
            for batch in self._batches(heard, prompts, requests):
                for i, reply in zip(
                    batch, self._answers([prompts[i] for i in batch], [requests[i] for i in batch]), strict=True
                ):
                    replies[i] = reply
        self._cache = None
        return replies

    def _batches(
        self, which: Sequence[int], prompts: Sequence[Sequence[int]], requests: Sequence[Request]
    ) -> Iterator[list[int]]:
        """Of like length, so that little is padding and nobody waits for a longer answer."""
        batch: list[int] = []
        for i in sorted(which, key=lambda i: (requests[i].max_tokens, len(prompts[i]))):
            new = len(prompts[i]) - len(self._prefix)
            other = batch and requests[i].max_tokens != requests[batch[0]].max_tokens
            if batch and (other or (len(batch) + 1) * new > self._batch_tokens):
                yield batch
                batch = []
            batch.append(i)
        if batch:
            yield batch

    def _remember(self, prompts: Sequence[list[int]]) -> None:
        """Compute what all prompts begin with, once."""
        self._prefix, self._cache = prompts[0][: shared(prompts)], None
        if not self._prefix:
            return
        ids = torch.tensor([self._prefix], device=device())
        self._cache = self._model(
            input_ids=ids, past_key_values=DynamicCache(), use_cache=True, logits_to_keep=1
        ).past_key_values

    def _answers(self, prompts: list[list[int]], requests: Sequence[Request]) -> list[Reply]:
        """Greedily, as many tokens as the longest of them wants."""
        rows = [prompt[len(self._prefix) :] for prompt in prompts]
        longest = max(map(len, rows))
        pad = self._chat.ends
        ids = torch.tensor([[pad] * (longest - len(row)) + row for row in rows], device=device())
        mask = torch.tensor(
            [[1] * len(self._prefix) + [0] * (longest - len(row)) + [1] * len(row) for row in rows], device=device()
        )
        cache = copy.deepcopy(self._cache) or DynamicCache()
        if self._prefix:
            cache.batch_repeat_interleave(len(rows))
        said: list[list[Token]] = [[] for _ in rows]
        ended = [False] * len(rows)
        most = max(request.max_tokens for request in requests)
        for step in range(most):
            # Padding counts for nothing, neither in what is seen nor in where a token stands.
            positions = (mask.cumsum(1) - 1).clamp(min=0)[:, -ids.shape[1] :]
            logits = self._model(
                input_ids=ids,
                attention_mask=mask,
                position_ids=positions,
                past_key_values=cache,
                use_cache=step < most - 1 or bool(self._prefix),
                logits_to_keep=1,
            ).logits[:, -1]
            chosen = self._hear(logits, requests, said, ended)
            if all(ended):
                break
            ids = chosen[:, None]
            mask = torch.cat([mask, torch.ones_like(ids)], dim=1)
        return [
            Reply("".join(token.text for token in tokens), tuple(tokens), cut=not over)
            for tokens, over in zip(said, ended, strict=True)
        ]

    def _hear(self, logits: Tensor, requests: Sequence[Request], said: list[list[Token]], ended: list[bool]) -> Tensor:
        """Note down a step; the tokens that were chosen."""
        logprobs = torch.log_softmax(logits.float(), dim=-1)
        top = torch.topk(logprobs, min(max(request.top_logprobs for request in requests), logprobs.shape[-1]), dim=-1)
        for row, (ids, values) in enumerate(zip(top.indices.tolist(), top.values.tolist(), strict=True)):
            ended[row] = ended[row] or ids[0] == self._chat.ends
            if ended[row] or len(said[row]) == requests[row].max_tokens:
                continue
            others: dict[str, float] = {}
            for id_, value in zip(ids, values, strict=True):
                # Several tokens may be spelled alike: pieces of a character are. The likeliest comes first.
                others.setdefault(self._spelled(id_), value)
            said[row].append(Token(self._spelled(ids[0]), values[0], others))
        return top.indices[:, 0]


class _Asking:
    """A conversation, or a piece of one, and what is to be asked about it next.

    Attributes:
        at: which conversation.
        requests: empty when there is a verdict, or none will come.
        unsafe: None where there is none.
    """

    def __init__(self, at: int, given: Conversation) -> None:
        self.at = at
        self.unsafe: float | None = None
        self._judging: Judging = dialects.named(DIALECT).judge(given)
        self.requests: Sequence[Request] = next(self._judging)

    def tell(self, replies: Sequence[Reply]) -> None:
        """Go on with the replies."""
        try:
            self.requests = self._judging.send(replies)
        except StopIteration as stop:
            self.requests, self.unsafe = (), stop.value.unsafe
        except BackendError:
            self.requests = ()
