"""The checks that the configurations of all families share.

Each function yields one sentence per error. Names are names of fields of ``config``.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator

from fairseq2.utils.validation import ValidationResult

from vembed_fs2.embedding.activations import create_activation
from vembed_fs2.embedding.head import HeadConfig, validate_head
from vembed_fs2.errors import ConfigError, ModelLoadError
from vembed_fs2.formats.checkpoint import config_errors


def to_result(*errors: Iterable[str]) -> ValidationResult:
    """Gather errors into what ``validate`` of a configuration returns."""
    result = ValidationResult()

    for group in errors:
        for error in group:
            result.add_error(error)

    return result


def require_valid(config: object, name: str) -> None:
    """Check a configuration before a model is made of it.

    :param name: the name of the model, for the message.
    :raises ConfigError: ``config``, or a configuration inside it, is not valid.
    """
    if errors := config_errors(config):
        raise ConfigError(errors, where=f"The {name} configuration")


def check_positive(config: object, *names: str) -> Iterator[str]:
    """Check numbers that must be positive; ``None`` is not checked."""
    for name in names:
        value = getattr(config, name)
        if value is not None and not value > 0:
            yield f"`{name}` must be positive, but is {value} instead."


def check_not_negative(config: object, *names: str) -> Iterator[str]:
    """Check numbers that must not be negative; ``None`` is not checked."""
    for name in names:
        value = getattr(config, name)
        if value is not None and value < 0:
            yield f"`{name}` must not be negative, but is {value} instead."


def check_probabilities(config: object, *names: str, closed: bool = False) -> Iterator[str]:
    """Check the probabilities of dropout and the like.

    :param closed: if ``True``, 1 is allowed.
    """
    for name in names:
        value = getattr(config, name)
        if not 0.0 <= value <= 1.0 or (value == 1.0 and not closed):
            range_ = "between 0 and 1" if closed else "in [0, 1)"
            yield f"`{name}` must be {range_}, but is {value} instead."


def check_choice(config: object, name: str, known: Collection[str]) -> Iterator[str]:
    """Check a field that takes only some values."""
    value = getattr(config, name)
    if value not in known:
        yield f"`{name}` must be one of {', '.join(known)}, but is '{value}' instead."


def check_heads(config: object, *, multiple: int = 1) -> Iterator[str]:
    """Check that ``model_dim`` can be shared out to ``num_attn_heads`` heads.

    :param multiple: what the size of a head must be a multiple of.
    """
    model_dim, num_heads = getattr(config, "model_dim"), getattr(config, "num_attn_heads")  # noqa: B009
    if num_heads >= 1 and model_dim % (multiple * num_heads) != 0:
        times = f"{multiple} times " if multiple > 1 else ""
        yield f"`model_dim` must be a multiple of {times}`num_attn_heads` ({num_heads}), but is {model_dim} instead."


def check_padding(config: object) -> Iterator[str]:
    """Check that ``pad_idx``, if it is set, is an index of the vocabulary."""
    pad_idx, vocab_size = getattr(config, "pad_idx"), getattr(config, "vocab_size")  # noqa: B009
    if pad_idx is not None and not -vocab_size <= pad_idx < vocab_size:
        yield f"`pad_idx` must be less than `vocab_size` ({vocab_size}), but is {pad_idx} instead."


def check_activation(config: object, name: str = "activation") -> Iterator[str]:
    """Check the name of an activation function."""
    try:
        create_activation(getattr(config, name), field=name)
    except ModelLoadError as ex:
        yield str(ex)


def check_head(
    head: HeadConfig | None, embedding_dim: int, *, has_class_token: bool = True, is_causal: bool = False
) -> list[str]:
    """Check the head of a model of texts and images, if it has one.

    :param embedding_dim: the size of the projected states.
    :param has_class_token: whether images have a class token.
    :param is_causal: whether a token of a text sees only the tokens before it.
    """
    if head is None:
        return []

    errors = validate_head(head, embedding_dim, multi_vector=True, has_class_token=has_class_token)
    if is_causal and (set(head.poolings) == {"cls"} or head.top_k is not None):
        errors.append(
            "`head` looks at the first token of a text, but in this text encoder that sees no other token: all texts"
            " would be alike. Pool by 'last', 'mean', 'max' or 'pooler'."
        )
    return errors
