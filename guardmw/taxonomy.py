"""The kinds of harm guardmw speaks of, in the order every dual-head model gives them."""

from __future__ import annotations

from typing import Literal, get_args

# The order of the category head of jdleo/tinysafe-1 and -2, and of ours.
Category = Literal["violence", "hate", "sexual", "self_harm", "dangerous_info", "harassment", "illegal_activity"]

CATEGORIES: tuple[Category, ...] = get_args(Category)
