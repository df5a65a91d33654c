"""The tiny model on which the scripts that need one are run."""

from support.tiny_models import (  # noqa: F401
    tiny_checkpoint,
    tiny_checkpoint_files,
    tiny_text,
)
