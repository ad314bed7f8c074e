"""The models of transformers that are built like BERT, and what each calls its parts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from vembed_fs2.models.common.interop import TEXT_FIELDS


@dataclass(frozen=True, kw_only=True)
class BertVariant:
    """A model of transformers that is built like BERT."""

    name: str
    """What the names of its classes start with."""

    prefix: str
    """What the backbone is called inside a model with a head on top."""

    fields: Mapping[str, tuple[str, type]]
    """The fields of config.json, what they are called here, and their types."""

    names: Mapping[str, str]
    """The names of tensors, and what they are called here."""

    heads: str
    """A regular expression for the names of what is on top: for pretraining, for classification."""

    counts_positions: bool = False
    """Whether only tokens that are not padding count in the positions, from the one after the padding's."""

    has_segments: bool = True
    """Whether it has token types."""

    has_pooler: bool = True
    """Whether it has a pooler, if it is asked for one."""

    drops_attention: bool = True
    """Whether there is dropout on the outputs of attention."""


_FIELDS: Final[dict[str, tuple[str, type]]] = {
    **TEXT_FIELDS,
    "hidden_act": ("activation", str),
    "hidden_dropout_prob": ("dropout_p", float),
    "attention_probs_dropout_prob": ("attn_dropout_p", float),
    "layer_norm_eps": ("layer_norm_eps", float),
    "initializer_range": ("init_std", float),
}

_BERT_FIELDS: Final = {**_FIELDS, "type_vocab_size": ("type_vocab_size", int)}

_MPNET_FIELDS: Final = {**_FIELDS, "relative_attention_num_buckets": ("num_relative_buckets", int)}

_DISTILBERT_FIELDS: Final[dict[str, tuple[str, type]]] = {
    "dim": ("model_dim", int),
    "max_position_embeddings": ("max_seq_len", int),
    "vocab_size": ("vocab_size", int),
    "pad_token_id": ("pad_idx", int),
    "n_layers": ("num_layers", int),
    "n_heads": ("num_attn_heads", int),
    "hidden_dim": ("ffn_inner_dim", int),
    "activation": ("activation", str),
    "dropout": ("dropout_p", float),
    "attention_dropout": ("attn_dropout_p", float),
    "initializer_range": ("init_std", float),
    "sinusoidal_pos_embds": ("sinusoidal_positions", bool),
}

_FRONTEND_KEYS: Final = {
    "embeddings.word_embeddings.": "frontend.embed.",
    "embeddings.position_embeddings.": "frontend.pos_embed.",
    "embeddings.LayerNorm.": "frontend.layer_norm.",
}

_POOLER_KEYS: Final = {"pooler.dense.": "pooler."}


def _layer_keys(stack: str, names: Mapping[str, str]) -> dict[str, str]:
    """Complete the names of the tensors of a layer."""
    return {f"{stack}.*.{theirs}.": f"encoder.layers.*.{ours}." for theirs, ours in names.items()}


_FFN_KEYS: Final = {
    "intermediate.dense": "ffn.inner_proj",
    "output.dense": "ffn.output_proj",
    "output.LayerNorm": "ffn_layer_norm",
}

_BERT_KEYS: Final = {
    **_FRONTEND_KEYS,
    "embeddings.token_type_embeddings.": "frontend.type_embed.",
    **_layer_keys(
        "encoder.layer",
        {
            "attention.self.query": "self_attn.q_proj",
            "attention.self.key": "self_attn.k_proj",
            "attention.self.value": "self_attn.v_proj",
            "attention.output.dense": "self_attn.output_proj",
            "attention.output.LayerNorm": "self_attn_layer_norm",
            **_FFN_KEYS,
        },
    ),
    **_POOLER_KEYS,
}

_MPNET_KEYS: Final = {
    **_FRONTEND_KEYS,
    "encoder.relative_attention_bias.": "relative_positions.embed.",
    **_layer_keys(
        "encoder.layer",
        {
            "attention.attn.q": "self_attn.q_proj",
            "attention.attn.k": "self_attn.k_proj",
            "attention.attn.v": "self_attn.v_proj",
            "attention.attn.o": "self_attn.output_proj",
            "attention.LayerNorm": "self_attn_layer_norm",
            **_FFN_KEYS,
        },
    ),
    **_POOLER_KEYS,
}

_DISTILBERT_KEYS: Final = {
    **_FRONTEND_KEYS,
    **_layer_keys(
        "transformer.layer",
        {
            "attention.q_lin": "self_attn.q_proj",
            "attention.k_lin": "self_attn.k_proj",
            "attention.v_lin": "self_attn.v_proj",
            "attention.out_lin": "self_attn.output_proj",
            "sa_layer_norm": "self_attn_layer_norm",
            "ffn.lin1": "ffn.inner_proj",
            "ffn.lin2": "ffn.output_proj",
            "output_layer_norm": "ffn_layer_norm",
        },
    ),
}

_LM_HEADS: Final = r"lm_head\.|classifier\.|qa_outputs\."


def _roberta(name: str) -> BertVariant:
    return BertVariant(
        name=name,
        prefix="roberta",
        fields=_BERT_FIELDS,
        names=_BERT_KEYS,
        heads=_LM_HEADS,
        counts_positions=True,
    )


VARIANTS: Final[dict[str, BertVariant]] = {
    "bert": BertVariant(
        name="Bert",
        prefix="bert",
        fields=_BERT_FIELDS,
        names=_BERT_KEYS,
        heads=r"cls\.(predictions|seq_relationship)\.|classifier\.|qa_outputs\.",
    ),
    "roberta": _roberta("Roberta"),
    "xlm-roberta": _roberta("XLMRoberta"),
    "camembert": _roberta("Camembert"),
    "distilbert": BertVariant(
        name="DistilBert",
        prefix="distilbert",
        fields=_DISTILBERT_FIELDS,
        names=_DISTILBERT_KEYS,
        heads=r"vocab_(transform|layer_norm|projector)\.|pre_classifier\.|classifier\.|qa_outputs\.",
        has_segments=False,
        has_pooler=False,
        drops_attention=False,
    ),
    "mpnet": BertVariant(
        name="MPNet",
        prefix="mpnet",
        fields=_MPNET_FIELDS,
        names=_MPNET_KEYS,
        heads=_LM_HEADS,
        counts_positions=True,
        has_segments=False,
    ),
}
"""By the ``model_type`` of config.json."""
