"""A backend is found by its name, in this package or in another, and what is missing is named."""

from __future__ import annotations

import importlib.metadata
from importlib.metadata import EntryPoint, EntryPoints
from typing import TYPE_CHECKING

import pytest

import guardmw.backends
from guardmw import Backend, BackendUnavailable, Guard, load
from guardmw.backends.onnx import OnnxBackend
from guardmw.testing import KeywordBackend

if TYPE_CHECKING:
    from tests.conftest import MakeArtefact


def keyword(rest: str) -> KeywordBackend:
    """What another package's entry point would name."""
    return KeywordBackend({rest: 0.99})


@pytest.fixture
def _installed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Another package that brings backends."""
    points = EntryPoints(
        EntryPoint(name, value, guardmw.backends.GROUP)
        for name, value in {
            "keyword": f"{__name__}:keyword",
            "lacking": "guardmw_no_such_module:make",
            "lacking_inside": f"{__name__}:lacking_inside",
        }.items()
    )
    monkeypatch.setattr(importlib.metadata, "entry_points", lambda *, group: points.select(group=group))


def lacking_inside(_rest: str) -> Backend:
    """What needs a library that is not there, and learns so when it is made."""
    import guardmw_no_such_module

    made: Backend = guardmw_no_such_module.make()
    return made


def test_an_unknown_name_gets_the_nearest_one() -> None:
    """A typo is corrected."""
    with pytest.raises(
        BackendUnavailable, match=r"unknown backend 'embeded': did you mean 'embedded'\? There are: .*\bonnx\b"
    ):
        load("embeded")


def test_an_unheard_of_name_gets_them_all() -> None:
    """Who guesses sees the choice."""
    with pytest.raises(BackendUnavailable, match=r"expected one of: .*embedded.*onnx"):
        Guard("magic")


@pytest.mark.usefixtures("_installed")
def test_another_package_can_add_a_name() -> None:
    """Its callable gets what stands after the colon."""
    assert Guard("keyword:EVIL").screen("EVIL").blocked
    assert not Guard("keyword:RUDE").screen("EVIL").blocked


@pytest.mark.usefixtures("_installed")
@pytest.mark.parametrize("name", ["lacking", "lacking_inside"])
def test_a_library_that_is_not_installed_is_named(name: str) -> None:
    """Whether it is missed on the way or only then."""
    with pytest.raises(BackendUnavailable, match=f"backend '{name}' cannot be loaded: .*guardmw_no_such_module"):
        load(name)


def test_a_folder_is_loaded_by_its_path(artefact: MakeArtefact) -> None:
    """What follows the colon may hold colons and spaces of its own."""
    backend = load(f"onnx:{artefact('my model: first')}")
    assert isinstance(backend, OnnxBackend)
    assert backend.name == "tiny"


def test_the_embedded_model_is_loaded_by_its_name() -> None:
    """And is what a Guard takes where it is given nothing."""
    assert load("embedded").name == "embedded"
    assert Guard().backend.name == "embedded"
    assert isinstance(load("embedded"), Backend)
