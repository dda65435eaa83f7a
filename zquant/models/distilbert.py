"""DistilBERT (Sanh et al., 2019): BERT's blocks under other names, without token types and without a pooler."""
from __future__ import annotations

from .family import Family, Head, column_positions, register

DISTILBERT = register(
    Family(
        name="DistilBERT",
        model_types=("distilbert",),
        prefix="distilbert.",
        config=dict(
            hidden="dim",
            layers="n_layers",
            heads="n_heads",
            intermediate="hidden_dim",
            vocabulary="vocab_size",
            max_positions="max_position_embeddings",
            activation="activation",
        ),
        defaults=dict(types=0, eps=1e-12, activation="gelu"),
        embeddings=dict(
            word="embeddings.word_embeddings.weight",
            position="embeddings.position_embeddings.weight",
            norm="embeddings.LayerNorm",
        ),
        layer="transformer.layer.{}.",
        block=dict(
            query="attention.q_lin",
            key="attention.k_lin",
            value="attention.v_lin",
            attention="attention.out_lin",
            attention_norm="sa_layer_norm",
            intermediate="ffn.lin1",
            output="ffn.lin2",
            output_norm="output_layer_norm",
        ),
        pooler=None,
        head=Head(dense="pre_classifier", activation="relu", out="classifier"),
        positions=column_positions,
    )
)
