"""An LLM asked many questions: once each, within a budget, and going on where a killed run stopped."""

from __future__ import annotations

from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from guardmw.errors import GuardmwError
from guardmw.train.llm.journal import Journal
from guardmw.train.llm.model import Client, Model, Reply, Request

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping

__all__ = ["Answers", "Client", "Journal", "Model", "Questions", "Reply", "Request", "ask", "check", "client", "usable"]

T = TypeVar("T")

# English has four characters a token; JSON, code and other scripts have fewer.
_CHARACTERS_PER_TOKEN = 3.5
# What a service adds around a question.
_OVERHEAD_TOKENS = 12
# After so many failures and not one answer, the settings are at fault.
_ALL_FAILED = 20
_SAID_EVERY = 500
AGAIN = "\n\nYour answer is read by a program: give the JSON alone, exactly in the form described, and nothing else."


@dataclass(frozen=True, slots=True)
class Answers(Generic[T]):
    """What came of many questions.

    Attributes:
        found: by the question's name.
        unread: names of questions whose answer could not be read, twice, or that were not answered.
        requests: sent in this run.
        input_tokens, output_tokens: as the service counted them, of all runs on this journal.
        estimated_usd: what was left to ask, beforehand; None without prices.
        usd: what all runs cost.
    """

    found: dict[str, T]
    unread: list[str] = field(default_factory=list)
    requests: int = 0
    input_tokens: int = 0
    output_tokens: int = 0
    estimated_usd: float | None = None
    usd: float | None = None

    def cost(self) -> dict[str, Any]:
        """The figures, for a report."""
        names = ("requests", "input_tokens", "output_tokens", "estimated_usd", "usd")
        return {name: getattr(self, name) for name in names}


def client(model: Model, journal: Journal, say: Callable[[str], None]) -> Client:
    """What answers for a model.

    Raises:
        GuardmwError: httpx is not installed, or the API key is not in the environment.
    """
    try:
        from guardmw.train.llm import batches, chat  # noqa: PLC0415 - httpx comes with an extra
    except ModuleNotFoundError as error:
        raise GuardmwError(f"asking an LLM needs {error.name}: pip install 'guardmw[train]'") from None
    return chat.AtOnce(model) if model.service == "compatible" else batches.client(model, journal, say)


def usable(model: Model) -> None:
    """Fail where any question would, though none is asked.

    Raises:
        GuardmwError: httpx is not installed, or the API key is not in the environment.
    """
    with TemporaryDirectory() as folder, Journal(Path(folder) / "journal") as kept:
        client(model, kept, _silent).close()


@dataclass(frozen=True)
class Questions(Generic[T]):
    """Questions to one model, and where its answers are kept.

    Attributes:
        said: by name. Two in the same words are asked once.
        read: what an answer says; None where it is not in the form asked for.
        system: what the model is told before each question.
        model: who is asked.
        journal: file of replies and batches; made if it is not there.
        expected_tokens: of one answer, for the estimate.
    """

    said: Mapping[str, str]
    read: Callable[[str], T | None]
    system: str
    model: Model
    journal: Path
    expected_tokens: int


def _silent(_: str) -> None:
    """Say nothing."""


def check(questions: Questions[T], say: Callable[[str], None] = _silent) -> None:
    """Fail where ``ask`` would before it asked anything.

    Raises:
        GuardmwError: it would cost more than the limit, or the API key or a library is missing.
    """
    with Journal(questions.journal) as kept:
        asking = _Asking(questions, kept, say)
        if first := asking.left(0):
            asking.estimate(first)
            client(questions.model, kept, say).close()


def ask(questions: Questions[T], say: Callable[[str], None] = _silent) -> Answers[T]:
    """Ask everything that the journal does not answer. An answer that cannot be read is asked for once more.

    Args:
        questions: to whom, and what.
        say: hears of progress and costs.

    Raises:
        GuardmwError: it would cost more than the limit, or the model does not answer, or nothing that can be read; what
            came before is kept.
    """
    with Journal(questions.journal) as kept:
        asking = _Asking(questions, kept, say)
        first = asking.left(0)
        estimated = asking.estimate(first)
        asking.run(first)
        asking.refuse_gibberish(first)
        again = asking.left(1)
        asking.run(again)
        asking.refuse_gibberish(again)
        values = {name: asking.value(name) for name in questions.said}
        return Answers(
            found={name: found for name, found in values.items() if found is not None},
            unread=[name for name, found in values.items() if found is None],
            requests=asking.sent,
            input_tokens=kept.input_tokens,
            output_tokens=kept.output_tokens,
            estimated_usd=estimated,
            usd=asking.spent,
        )


class _Asking(Generic[T]):
    """Rounds of questions within one budget.

    Attributes:
        sent: requests, so far.
    """

    def __init__(self, questions: Questions[T], journal: Journal, say: Callable[[str], None]) -> None:
        self.sent = 0
        self._questions = questions
        self._model = model = questions.model
        self._journal = journal
        self._say = say
        self._keys = {
            name: [model.key(questions.system, said + more) for more in ("", AGAIN)]
            for name, said in questions.said.items()
        }

    def value(self, name: str) -> T | None:
        """What the answer to a question says, the first or the second."""
        replies = (self._journal.replies.get(key) for key in self._keys[name])
        values = (self._questions.read(reply.text or "") for reply in replies if reply)
        return next((value for value in values if value is not None), None)

    def left(self, attempt: int) -> dict[str, Request]:
        """What is to be asked, for the first or the second time."""
        return {
            key: Request(key, self._questions.system, said + AGAIN * attempt)
            for name, said in self._questions.said.items()
            if (key := self._keys[name][attempt]) not in self._journal.replies and self.value(name) is None
        }

    @property
    def spent(self) -> float | None:
        """US dollars, of all runs."""
        return self._model.cost(self._journal.input_tokens, self._journal.output_tokens)

    def estimate(self, requests: Mapping[str, Request]) -> float | None:
        """US dollars, for those of the requests that are not under way.

        Raises:
            GuardmwError: with what is spent, that is over the limit.
        """
        under_way = self._under_way()
        new = [request for key, request in requests.items() if key not in under_way]
        characters = sum(len(request.system) + len(request.user) for request in new)
        usd = self._model.cost(
            int(characters / _CHARACTERS_PER_TOKEN) + _OVERHEAD_TOKENS * len(new),
            self._questions.expected_tokens * len(new),
        )
        about = "an unknown sum (no prices given)" if usd is None else f"about ${usd:.2f}"
        self._say(f"{len(new)} requests to {self._model.model}: {about}")
        if usd is not None and self._over(usd):
            raise GuardmwError(
                f"asking {self._model.model} would cost {about} besides ${self.spent or 0:.2f} spent, and limit_usd is "
                f"{self._model.limit_usd:g}: raise it, or ask about fewer rows"
            )
        return usd

    def run(self, requests: Mapping[str, Request]) -> None:
        """Ask, and write every reply down.

        Raises:
            GuardmwError: no answer comes, or the money is spent.
        """
        if not requests:
            return
        came = failed = 0
        with closing(client(self._model, self._journal, self._say)) as asked:
            for reply in asked.complete(self._affordable(requests.values())):
                self._journal.answered(reply)
                came += 1
                failed += reply.text is None
                if not self._journal.replies and failed == min(_ALL_FAILED, len(requests)):
                    raise GuardmwError(
                        f"{self._model.model} answered none of {failed} requests, the last with {reply.error!r}: look "
                        "at model, max_tokens and extra"
                    )
                if not came % _SAID_EVERY:
                    self._say(f"{came} of {len(requests)} answered, {failed} of them with an error")

    def refuse_gibberish(self, sent: Mapping[str, Request]) -> None:
        """Stop before more is spent on a model that does not answer in the form asked for.

        Raises:
            GuardmwError: of many questions not one has an answer that can be read.
        """
        if len(sent) >= _ALL_FAILED and not any(self.value(name) is not None for name in self._keys):
            raise GuardmwError(
                f"of {len(sent)} answers of {self._model.model} none is in the form asked for: look at model, "
                f"max_tokens and extra; what it said is in {self._journal}"
            )

    def _affordable(self, requests: Iterable[Request]) -> Iterator[Request]:
        under_way = self._under_way()
        for request in requests:
            if request.key in under_way:
                yield request
                continue
            if self._over(0.0):
                raise GuardmwError(
                    f"{self._model.model} has cost ${self.spent or 0:.2f}, over limit_usd: what came is kept; raise it "
                    "to go on"
                )
            self.sent += 1
            yield request

    def _under_way(self) -> set[str]:
        """Keys of what is in batches of an earlier run, and paid for."""
        return {key for keys in self._journal.batches.values() for key in keys}

    def _over(self, more: float) -> bool:
        return self._model.limit_usd is not None and (self.spent or 0.0) + more > self._model.limit_usd
