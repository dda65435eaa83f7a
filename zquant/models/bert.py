"""BERT (Devlin et al., 2019): names in the checkpoint and in config.json."""
from __future__ import annotations

from .family import Family, Head, column_positions, register

BERT = register(
    Family(
        name="BERT",
        model_types=("bert",),
        prefix="bert.",
        config=dict(
            hidden="hidden_size",
            layers="num_hidden_layers",
            heads="num_attention_heads",
            intermediate="intermediate_size",
            vocabulary="vocab_size",
            max_positions="max_position_embeddings",
            types="type_vocab_size",
            eps="layer_norm_eps",
            activation="hidden_act",
        ),
        defaults=dict(types=2, eps=1e-12, activation="gelu"),
        embeddings=dict(
            word="embeddings.word_embeddings.weight",
            position="embeddings.position_embeddings.weight",
            type="embeddings.token_type_embeddings.weight",
            norm="embeddings.LayerNorm",
        ),
        layer="encoder.layer.{}.",
        block=dict(
            query="attention.self.query",
            key="attention.self.key",
            value="attention.self.value",
            attention="attention.output.dense",
            attention_norm="attention.output.LayerNorm",
            intermediate="intermediate.dense",
            output="output.dense",
            output_norm="output.LayerNorm",
        ),
        pooler="pooler.dense",
        head=Head(dense="pooler.dense", activation="tanh", out="classifier", dense_in_base=True),
        positions=column_positions,
    )
)
