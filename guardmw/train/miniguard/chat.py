"""A model's tokenizer and chat template: training shows it the bytes that serving does, or fails at once."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, NamedTuple

from transformers import AutoTokenizer

from guardmw import dialects
from guardmw.conversation import Conversation, Turn
from guardmw.dialects import Reply, Request, Token
from guardmw.dialects.nemotron import answer
from guardmw.errors import BackendError, GuardmwError
from guardmw.train.miniguard.form import DIALECT, asked

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from guardmw.conversation import Role
    from guardmw.train.miniguard.form import Lesson

# Qwen3's template asks for thoughts unless told not to, and whoever serves a guard tells it nothing.
_QUIET, _LOUD = (f"{{%- set enable_thinking = {on} %}}" for on in ("false", "true"))
# Sets the task with a trace apart where the template has no word for it. How MiniGuard's training does: UNVERIFIED.
_THINK = "\n/think"
_HELLO = Conversation.of("Hello?")
# So many tokens that all prompts begin with are worth computing once.
_WORTH = 32
# The tokenizer takes all cores for many texts at once.
_AT_ONCE = 1000


class Encoded(NamedTuple):
    """A lesson in tokens.

    Attributes:
        taught: for each token, whether it is to be learnt.
        answer: how many tokens the answer has, at the end.
    """

    ids: list[int]
    taught: list[bool]
    answer: int


def shared(prompts: Sequence[list[int]]) -> int:
    """How many tokens all of them begin with, and go on from: the form's own words are most of a short question."""
    least, most = min(prompts), max(prompts)
    shortest = min(map(len, prompts))
    same = next((at for at, (a, b) in enumerate(zip(least, most, strict=False)) if a != b), shortest)
    same = min(same, shortest - 1)
    return same if same >= _WORTH else 0


class Chat:
    """How to speak with a model.

    Args:
        model: a folder, or a name on the hub.
        revision: of a name on the hub.

    Attributes:
        tokenizer: of transformers, its chat template without thoughts.
        ends: the token that ends an answer.

    Raises:
        GuardmwError: it has no tokenizer or chat template, the template does not show the question, or no verdict could
            be read from its tokens.
    """

    def __init__(self, model: str, revision: str | None = None) -> None:
        try:
            self.tokenizer = AutoTokenizer.from_pretrained(model, revision=revision or "main")
        except (OSError, ValueError, ImportError, KeyError) as error:
            raise GuardmwError(f"the tokenizer of {model} cannot be loaded: {error}") from None
        self._model = model
        template = self._template()
        switched = "enable_thinking" in template
        # Some are quiet unless told otherwise, with a thought that is closed already.
        self._loud = _LOUD + template if switched else template
        self.tokenizer.chat_template = _QUIET + template if switched else template
        if not self.tokenizer.is_fast:
            raise GuardmwError(f"the tokenizer of {model} does not tell where its tokens stand: it needs a fast one")
        if self.tokenizer.eos_token_id is None:
            raise GuardmwError(f"the tokenizer of {model} has no eos_token, with which an answer would end")
        self.ends: int = self.tokenizer.eos_token_id
        self._shows()
        self._check()

    @property
    def least(self) -> int:
        """How many tokens the shortest question takes with its answer."""
        return len(self.ids(self._rendered(asked(_HELLO), "", self.tokenizer.chat_template) + answer({"user": False})))

    def prompt(self, request: Request) -> str:
        """What serving shows the model, the start of the answer included."""
        return self._rendered(request, "", self.tokenizer.chat_template) + request.prefill

    def ids(self, text: str) -> list[int]:
        """A text's tokens; the template has put special ones where they belong."""
        ids: list[int] = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        return ids

    def encode(self, lessons: Sequence[Lesson]) -> Iterator[Encoded]:
        """Lessons in tokens. Those of the task without thoughts begin with the very tokens that serving shows."""
        for start in range(0, len(lessons), _AT_ONCE):
            spoken = [(lesson, *self._before(lesson)) for lesson in lessons[start : start + _AT_ONCE]]
            texts = [before + thought + lesson.answer for lesson, before, thought in spoken]
            given = self.tokenizer(texts, add_special_tokens=False, return_offsets_mapping=True)
            for one, ids, spans in zip(spoken, given["input_ids"], given["offset_mapping"], strict=True):
                yield self._encoded(*one, ids, spans)

    def _encoded(
        self, lesson: Lesson, before: str, thought: str, ids: list[int], spans: Sequence[tuple[int, int]]
    ) -> Encoded:
        start = len(before)
        silent = [[start + len(thought) + at for at in span] for span in lesson.silent]
        taught = [
            end > start and not any(begin < stop and end > first for first, stop in silent) for begin, end in spans
        ]
        taught.append(True)
        return Encoded([*ids, self.ends], taught, len(taught) - taught.index(True))

    def _before(self, lesson: Lesson) -> tuple[str, str]:
        """The question, and the thought that comes before the answer."""
        if not lesson.trace:
            return self._rendered(lesson.request, "", self.tokenizer.chat_template), ""
        before = self._rendered(lesson.request, _THINK, self._loud)
        # Some templates begin the thought themselves.
        if before.rstrip().endswith("<think>"):
            before = before.rstrip().removesuffix("<think>")
        return before, f"<think>\n{lesson.trace}\n</think>\n\n"

    def _rendered(self, request: Request, more: str, template: str) -> str:
        messages = [{"role": message.role, "content": message.content + more} for message in request.messages]
        try:
            text: str = self.tokenizer.apply_chat_template(
                messages, chat_template=template, tokenize=False, add_generation_prompt=True, **dict(request.template)
            )
        except Exception as error:  # noqa: BLE001 - templates raise what they like, and may quote the messages
            failure = type(error).__name__
        else:
            return text
        raise GuardmwError(f"the chat template of {self._model} does not take the messages ({failure})")

    def _template(self) -> str:
        template = self.tokenizer.chat_template
        template = template.get("default") if isinstance(template, dict) else template
        if not template:
            raise GuardmwError(
                f"{self._model} has no chat template: give the model that was tuned to chat, or put a "
                "chat_template.jinja into its folder"
            )
        if "strftime_now" in template:
            raise GuardmwError(
                f"the chat template of {self._model} tells the date: what was trained would not be what is served; "
                "take the date out of it, in a folder of your own"
            )
        return str(template)

    def _shows(self) -> None:
        """A template may be for messages of another form, and leave these out without a word."""
        request = asked(_HELLO)
        # Some take spaces off the ends.
        if request.messages[0].content.strip() not in self.prompt(request):
            raise GuardmwError(f"the chat template of {self._model} does not show what the user says as it was said")

    def _check(self) -> None:
        """Speak every verdict, and have it read."""
        for unsafe in (False, True):
            for role in ("user", "assistant"):
                try:
                    heard = self._heard(role, unsafe=unsafe)
                except BackendError:
                    heard = None
                if heard is None or (heard > 0.5) != unsafe:  # noqa: PLR2004 - even odds
                    raise GuardmwError(
                        f"the tokenizer of {self._model} splits verdicts so that they cannot be read in one token: "
                        "'safe' and 'unsafe' must begin with tokens of their own; take another base model"
                    )

    def _heard(self, role: Role, *, unsafe: bool) -> float | None:
        """P(unsafe) as serving reads it where the model is sure to 90 %; None where serving would show other tokens."""
        conversation = Conversation((_HELLO.last, *([Turn("assistant", "Hello.")] * (role == "assistant"))))
        said = [self._verdict(role, unsafe=label) for label in (unsafe, not unsafe)]
        judging = dialects.named(DIALECT).judge(conversation)
        (request,) = next(judging)
        shown = self.ids(self.prompt(request))
        whole, other = (self.ids(self.prompt(request).removesuffix(request.prefill) + text) for text in said)
        if whole[: len(shown)] != shown:
            return None
        tokens = list(self._tokens(whole[len(shown) :], other[len(shown) :]))[: request.max_tokens]
        try:
            judging.send([Reply("".join(token.text for token in tokens), tuple(tokens))])
            judging.send([Reply("")])
        except StopIteration as stop:
            return float(stop.value.unsafe)
        return None

    def _tokens(self, ids: list[int], others: list[int]) -> Iterator[Token]:
        """As a server tells them: where two answers part, the one was likely, and the other not."""
        parted = False
        for at, id_ in enumerate(ids):
            text = self.tokenizer.decode([id_])
            told = {text: 0.0}
            if not parted and at < len(others) and others[at] != id_:
                told, parted = {text: math.log(0.9), self.tokenizer.decode([others[at]]): math.log(0.1)}, True
            yield Token(text, told[text], told)

    def _verdict(self, role: Role, *, unsafe: bool) -> str:
        if role == "user":
            return answer({"user": unsafe})
        return answer({"user": False, "assistant": unsafe})
