"""Text to ids and back with the tokenizer of an artifact; it takes the `tokenizers` package and nothing else."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lethe_compile.artifact.manifest import Manifest
from lethe_compile.errors import ArtifactError, InputError, MissingPackageError

TOKENIZER = "tokenizer.json"


class Tokenizer:
    """The tokenizer of an artifact.

    Raises:
        InputError: the artifact has none.
        MissingPackageError: `tokenizers` is not installed.
        ArtifactError: it has more ids than the model.
    """

    def __init__(self, manifest: Manifest) -> None:
        if TOKENIZER not in manifest.tokenizer:
            raise InputError(f"{manifest.directory} has no {TOKENIZER}: give token ids with --ids instead of text")
        try:
            from tokenizers import Tokenizer as Fast
        except ImportError as error:
            raise MissingPackageError(
                "text needs a tokenizer: pip install tokenizers, or use --ids", "tokenizers"
            ) from error
        self._tokenizer: Any = Fast.from_file(str(manifest.path(TOKENIZER)))
        check_vocabulary(self._tokenizer.get_vocab(), manifest.model["vocab_size"], str(manifest.path(TOKENIZER)))

    def encode(self, text: str) -> list[int]:
        return list(self._tokenizer.encode(text).ids)

    def decode(self, ids: Sequence[int]) -> str:
        return str(self._tokenizer.decode(list(ids), skip_special_tokens=False))


def check_vocabulary(vocabulary: dict[str, int], vocab_size: int, name: str) -> None:
    """Raise `ArtifactError` where a tokenizer's `vocabulary` has ids that a model of `vocab_size` ids does not know."""
    largest = max(vocabulary.values(), default=0)
    if largest >= vocab_size:
        raise ArtifactError(
            f"{name} does not belong to this model: it has ids up to {largest}, and the model knows {vocab_size} ids"
        )
