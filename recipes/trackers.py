"""Weights & Biases: whether it can be used is found out before anything is trained."""

from __future__ import annotations

import io
from contextlib import redirect_stderr, redirect_stdout
from typing import Final

from fairseq2.recipe.config import CommonSection
from fairseq2.recipe.error import WandbInitializationError

from vembed_fs2.errors import ConfigError

_ADVICE: Final = (
    "Run `wandb login`, set WANDB_MODE=offline, or leave `common.metric_recorders.wandb.enabled` out to do without it."
)


def check_wandb(common: CommonSection) -> None:
    """Check that there is a login, if the metrics go to Weights & Biases. Nothing is sent.

    :raises ConfigError: there is none.
    """
    if common.metric_recorders.wandb.enabled and not _is_usable():
        raise ConfigError(f"Weights & Biases has no login on this machine. {_ADVICE}")


def _is_usable() -> bool:
    import wandb

    # It prints where it has found the login.
    with redirect_stderr(io.StringIO()), redirect_stdout(io.StringIO()):
        try:
            if wandb.setup().settings.mode in ("offline", "dryrun", "disabled"):
                return True
            return wandb.login(verify=False, prompt=False)
        except (
            AttributeError,
            TypeError,
        ):  # Older versions cannot be asked without asking the user. The start will tell.
            return True
        except wandb.errors.Error:
            return False


def describe_wandb_error(error: BaseException) -> str | None:
    """Return what to say of an error if Weights & Biases could not be started; ``None`` if it is another one."""
    if isinstance(error, WandbInitializationError):
        error = error.__cause__ or error
    elif type(error).__module__.partition(".")[0] != "wandb":
        return None

    reason = str(error).strip().partition("\n")[0].rstrip(".")
    return f"Weights & Biases cannot be used: {reason}. {_ADVICE}"
