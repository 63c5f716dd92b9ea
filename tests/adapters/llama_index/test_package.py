"""The package is one among LlamaIndex's: it adds to their namespace and takes nothing from it."""

from __future__ import annotations

from pathlib import Path

import llama_index
import llama_index.callbacks
import llama_index.core
from llama_index.callbacks import guardmw


def test_has_no_init_in_the_shared_namespaces() -> None:
    """An __init__.py there would hide every other package of LlamaIndex."""
    here = Path(guardmw.__file__).parent
    assert not (here.parent / "__init__.py").exists()
    assert not (here.parent.parent / "__init__.py").exists()
    assert llama_index.__file__ is None
    assert llama_index.callbacks.__file__ is None


def test_core_is_still_llama_indexs_own() -> None:
    """Both portions of the namespace import side by side."""
    ours = Path(guardmw.__file__).parents[2]
    assert not Path(llama_index.core.__file__ or "").is_relative_to(ours)


def test_is_typed_and_exports_what_it_says() -> None:
    """py.typed is there, and so is every public name."""
    assert (Path(guardmw.__file__).parent / "py.typed").exists()
    assert all(hasattr(guardmw, name) for name in guardmw.__all__)
