"""What all settings have in common: they cannot be changed, and a key or score that is not valid is an error."""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

Score = Annotated[float, Field(strict=True, ge=0, le=1, allow_inf_nan=False)]


class Part(BaseModel):
    """Settings, or a part of some."""

    model_config = ConfigDict(frozen=True, extra="forbid")
