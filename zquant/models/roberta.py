"""RoBERTa (Liu et al., 2019) and XLM-RoBERTa (Conneau et al., 2020).

BERT's blocks and names. What differs: positions count the tokens that are not padding and start at ``pad_token_id + 1``
(fairseq's convention), and the classification head has its own dense layer in place of the pooler.
"""
from __future__ import annotations

from dataclasses import replace

from .bert import BERT
from .family import Head, counted_positions, register

ROBERTA = register(
    replace(
        BERT,
        name="RoBERTa",
        model_types=("roberta", "xlm-roberta"),
        prefix="roberta.",
        default_pad=1,
        head=Head(dense="classifier.dense", activation="tanh", out="classifier.out_proj"),
        positions=counted_positions,
    )
)
