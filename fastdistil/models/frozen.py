"""Word embeddings that stay as they are through training, saving, loading, and training again."""

from __future__ import annotations

from typing import Any

MARK = "frozen_word_embeddings"


def freeze_word_embeddings(model: Any) -> None:
    """Take the word embeddings of a transformers model out of training, in place, and say so in its configuration.

    No gradient, no optimizer state: 12 bytes an entry. A head that is tied to the table is frozen with it. transformers
    saves no requires_grad: after loading, `restore_frozen` reads what the configuration says.
    """
    model.get_input_embeddings().weight.requires_grad_(False)
    model.config.frozen_word_embeddings = True


def restore_frozen(model: Any) -> bool:
    """Freeze the word embeddings of a loaded model where `freeze_word_embeddings` had done so before it was saved;
    returns whether it had. Every command of fastdistil that trains a loaded model calls it."""
    if not getattr(model.config, MARK, False):
        return False
    freeze_word_embeddings(model)
    return True
