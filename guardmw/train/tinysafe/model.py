"""The network: an encoder, the mean of its states, three linear heads."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from guardmw.taxonomy import CATEGORIES

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class Classifier(nn.Module):
    """Any Hugging Face encoder with TinySafe's two heads, and a third for injections."""

    def __init__(self, encoder: PreTrainedModel, dropout: float = 0.1) -> None:
        super().__init__()
        self.encoder = encoder
        width = encoder.config.hidden_size
        self.dropout = nn.Dropout(dropout)
        self.unsafe = nn.Linear(width, 1)
        self.categories = nn.Linear(width, len(CATEGORIES))
        self.injection = nn.Linear(width, 1)

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, token_type_ids: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Logits (B, 1), (B, 7) and (B, 1) of token ids, mask and segments, all (B, L)."""
        states = self.encoder(
            input_ids=input_ids, attention_mask=attention_mask, token_type_ids=token_type_ids
        ).last_hidden_state
        # The context lends its meaning through attention; what is pooled is the text on trial alone.
        mask = (attention_mask * (1 - token_type_ids)).unsqueeze(-1).to(states.dtype)
        pooled = self.dropout((states * mask).sum(1) / mask.sum(1).clamp(min=1))
        return self.unsafe(pooled), self.categories(pooled), self.injection(pooled)


def focal(logits: Tensor, labels: Tensor, gamma: float) -> Tensor:
    """Focal loss per row, without class weights (Lin et al. 2017)."""
    loss = nn.functional.binary_cross_entropy_with_logits(logits, labels, reduction="none")
    return loss * (1 - torch.exp(-loss)) ** gamma
