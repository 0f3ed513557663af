"""MODEL on a command line: the bundled reasoner, a directory or hub id, or a factory in Python."""

from __future__ import annotations

import importlib
from typing import Any

from lethe_compile.errors import InputError, WholeOnlyError

REASONER = "reasoner"
HELP = "'reasoner' (bundled), a local directory, a hub id, or package.module:factory"


def load_model(name: str) -> Any:
    """The model that `name` stands for, in evaluation mode.

    Raises:
        InputError: nothing can be loaded under that name; says what was tried.
    """
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()  # one of ours is enough
    if name == REASONER:
        from lethe_compile.models import reasoner

        return reasoner.load_model()
    if ":" in name:
        return _from_factory(name)
    from transformers import AutoModelForCausalLM

    try:
        return AutoModelForCausalLM.from_pretrained(name, dtype="auto").eval()
    except Exception as error:  # damaged weights raise whatever their reader does
        raise InputError(f"no model can be loaded from {name!r}: {_first_line(error)} (MODEL is {HELP})") from error


def files_of(name: str) -> tuple[str, str]:
    """The directory or hub id of MODEL's weights, and the dtype that `load_model` gives them.

    Raises:
        WholeOnlyError: they lie in no files, a factory makes them.
    """
    if name == REASONER:
        from lethe_compile.models import reasoner

        return str(reasoner.path()), "float32"
    if ":" in name:
        raise WholeOnlyError(f"{name} is a factory, which makes it as a whole")
    return name, "auto"


def _first_line(error: Exception) -> str:
    """What went wrong, in one line; of errors other than of files and values, with their kind."""
    first = str(error).strip().split("\n")[0]
    return first if isinstance(error, (OSError, ValueError)) else f"{type(error).__name__}: {first}"


def load_tokenizer(name: str) -> Any:
    """The tokenizer of the model that `name` stands for; None for a factory, which has none.

    Raises:
        InputError: none can be loaded under that name.
    """
    if name == REASONER:
        from lethe_compile.models import reasoner

        return reasoner.load_tokenizer()
    if ":" in name:
        return None
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError) as error:
        first = str(error).strip().split("\n")[0]
        raise InputError(f"no tokenizer can be loaded from {name!r}: {first}") from error


def count_layers(name: str) -> int | None:
    """Attention layers by the model's configuration, which is read without its weights; None where it does not say."""
    from transformers import AutoConfig

    if ":" in name:
        return None
    try:
        layers = AutoConfig.from_pretrained(files_of(name)[0]).get_text_config().num_hidden_layers
    except (OSError, ValueError, AttributeError):
        return None  # loading the model says what is wrong, or works regardless
    return int(layers)


def _from_factory(name: str) -> Any:
    module, _, attribute = name.partition(":")
    try:
        factory = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise InputError(f"no factory {name!r}: {error} (MODEL is {HELP})") from error
    try:
        return factory().eval()
    except Exception as error:
        raise InputError(f"the factory {name!r} makes no model: {_first_line(error)}") from error
