"""Checkpoints that no rank loads as a whole: the model without weights, and of each weight a rank's part alone.

mesh = distributed.init()
model, fetch = load_parts("meta-llama/Llama-3.1-70B", mesh)
fast = lethe.optimize(model, tp=mesh, fetch=fetch)
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lethe_compile.capture.quantized import is_finite
from lethe_compile.checkpoint.names import sources_of, tie
from lethe_compile.checkpoint.stored import Source, Stored, fingerprint, open_files, whole
from lethe_compile.checkpoint.weightless import initialize_buffers, is_unset, weightless, without_weights
from lethe_compile.distributed import Ranks
from lethe_compile.errors import InputError, WholeOnlyError
from lethe_compile.passes.absent import absent, is_absent, lies_nowhere, set_reader
from lethe_compile.passes.parts import Fetch, fetch_part
from lethe_compile.passes.placement import Placement

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

__all__ = ["load_parts", "weightless"]


def load_parts(
    name: str | Path, mesh: DeviceMesh, *, dtype: str | torch.dtype = "auto", device: torch.device | str | None = None
) -> tuple[Any, Fetch]:
    """A model of transformers for `optimize(model, tp=mesh, fetch=fetch)`, whose weights stay in their files.

    Of a weight that is split a rank reads its own part, straight from the safetensors files; weights that every rank
    holds are read as they are asked for. Proofs of the rewrite read what they need as a whole, for their own time: of
    mixtures of experts the experts, of latent attention what expands the latent. Whole and in memory are only buffers
    of the checkpoint and single numbers. Every rank calls this alike, and the files that they see are compared: their
    sizes, and samples of their bytes.

    Args:
        name: a directory or hub id, as `AutoModelForCausalLM.from_pretrained` takes it.
        mesh: of `distributed.init`, two ranks or more.
        dtype: of the weights; "auto" is the configuration's, else that of the checkpoint's first weight.
        device: where the parts go; by default the one that this rank talks over.

    Returns:
        The model without weights, good for `optimize` alone, and the `fetch` that goes with it.

    Raises:
        WholeOnlyError: this checkpoint cannot be read part by part, and why: no safetensors, quantised, an adapter, a
            conversion that needs whole weights. It may be loaded as a whole.
        InputError: nothing is found under that name, a weight is missing or of another shape, or there is one rank.
        ConfigError: ranks see different checkpoints.
        LetheError: another rank failed.
    """
    if mesh.size() == 1:
        raise InputError("a single rank holds all weights: load the model as a whole, and optimize it without tp")
    ranks = Ranks(mesh)
    with ranks.together("read the checkpoint"):
        config, files = _described(str(name))
        model, fetch = read_parts(config, files, dtype, torch.device(device or ranks.device))
        _set_generation(model, str(name))
    ranks.same({f"the checkpoint {name}": fingerprint(files)})
    return model, fetch


def read_parts(
    config: Any, files: list[str], dtype: str | torch.dtype, device: torch.device
) -> tuple[Any, PartsOfFiles]:
    """The model and the `fetch` of `load_parts`, by its configuration and its safetensors files."""
    stored = open_files(files)
    model = weightless(config, _dtype_of(dtype, config, stored), torch.device("cpu"))
    _keep_in_float32(model)
    sources = sources_of(model, stored)
    initialize_buffers(model, sources)
    _load_buffers(model, sources)
    tie(model, sources)
    without_weights(model, device)  # tied ones may have been padded
    return model, PartsOfFiles(model, sources)


class PartsOfFiles:
    """`passes.parts.Fetch` from files: asked for a model's weight, it reads what the rank holds of it."""

    def __init__(self, model: Any, sources: Mapping[str, Source]) -> None:
        self._sources: dict[int, tuple[str, nn.Parameter, Source]] = {}
        names: dict[int, list[str]] = {}
        parameters = dict(model.named_parameters(remove_duplicate=False))
        for name, parameter in parameters.items():
            names.setdefault(id(parameter), []).append(name)
        for tied in names.values():
            parameter = parameters[tied[0]]
            name = next((name for name in tied if name in sources), None)
            if name is None:
                raise _missing(model, tied[0])
            source = sources[name]
            _check_shape(name, source, parameter)
            self._sources[id(parameter)] = (name, parameter, source)
            if parameter.numel() > 1:
                set_reader(parameter, partial(self._read, parameter, None))
            else:
                parameter.data = self._read(parameter, None)

    def __call__(self, name: str, weight: Tensor, placement: Placement, rank: int) -> Tensor:
        if not is_absent(weight):
            return fetch_part(name, weight, placement, rank)
        if id(weight) not in self._sources:
            raise InputError(
                f"{name} is no weight of the model that was given with this fetch, as load_parts returns it"
            )
        return self._read(weight, (placement.dim, placement.index[rank]))

    def _read(self, parameter: Tensor, part: tuple[int, tuple[int, ...]] | None) -> Tensor:
        name, _, source = self._sources[id(parameter)]
        read = whole(source) if part is None else source.read(*part)
        own = torch.empty(read.shape, dtype=parameter.dtype, device=parameter.device).copy_(read)
        if own.is_floating_point() and not is_finite(own):
            raise InputError(f"the weights are broken: {name} holds NaN or infinity")
        return own


# ----------------------------------------------------------------------------------------------------------- the files


def _described(name: str) -> tuple[Any, list[str]]:
    """The configuration of a checkpoint, and its safetensors files.

    Raises:
        WholeOnlyError, InputError: see `load_parts`.
    """
    from transformers import AutoConfig
    from transformers.utils.hub import cached_file, get_checkpoint_shard_files
    from transformers.utils.peft_utils import find_adapter_config_file

    try:
        if find_adapter_config_file(name) is not None:
            raise WholeOnlyError(f"{name} holds an adapter, which changes weights of another model")
        config = AutoConfig.from_pretrained(name)
        _refuse_config(name, config)
        options: dict[str, Any] = {"_commit_hash": getattr(config, "_commit_hash", None)}
        quiet = {"_raise_exceptions_for_missing_entries": False, **options}
        single = cached_file(name, "model.safetensors", **quiet)
        if single is not None:
            return config, [single]
        index = cached_file(name, "model.safetensors.index.json", **quiet)
        if index is None:
            raise WholeOnlyError(f"{name} has no safetensors weights, whose parts can be read without the rest")
        return config, get_checkpoint_shard_files(name, index, **options)[0]
    except (OSError, ValueError) as error:
        if isinstance(error, InputError):
            raise
        first = str(error).strip().split("\n")[0]
        raise InputError(f"no model can be loaded from {name!r}: {first}") from error


def _refuse_config(name: str, config: Any) -> None:
    text = config.get_text_config()
    if getattr(config, "quantization_config", None) or getattr(text, "quantization_config", None):
        raise WholeOnlyError(f"{name} is quantised, and its weights are packed as a whole")
    if getattr(config, "transformers_weights", None):
        raise WholeOnlyError(f"{name} names a file of weights of its own: {config.transformers_weights}")


def _dtype_of(dtype: str | torch.dtype, config: Any, stored: Mapping[str, Stored]) -> torch.dtype:
    if dtype == "auto":
        dtype = getattr(config, "dtype", None) or _first_dtype(stored)
    if isinstance(dtype, str):
        dtype = getattr(torch, dtype, dtype)
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise InputError(f'dtype={dtype!r} is not allowed: must be "auto", or a floating-point dtype or its name')
    return dtype


def _first_dtype(stored: Mapping[str, Stored]) -> torch.dtype:
    for one in stored.values():
        if (dtype := one.read(0, range(1)).dtype).is_floating_point:
            return dtype
    return torch.get_default_dtype()


# ----------------------------------------------------------------------------------------------------------- the model


def _keep_in_float32(model: Any) -> None:
    """Weights and buffers that transformers keeps in float32 whatever the dtype, as it has them by name."""
    from transformers.core_model_loading import build_glob_alternation

    plan = model._get_dtype_plan(model.dtype)
    if not plan:
        return
    pattern, patterns, _ = build_glob_alternation(list(plan))
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if (found := pattern.search(name)) is not None:
            kept = plan[patterns[str(found.lastgroup)]]
            tensor.data = absent(tensor.shape, kept, tensor.device) if lies_nowhere(tensor) else tensor.to(kept)


def _load_buffers(model: Any, sources: Mapping[str, Source]) -> None:
    """Buffers that the checkpoint has; the others are as the constructor computed them."""
    for name, buffer in list(model.named_buffers()):
        if name in sources:
            source = sources[name]
            _check_shape(name, source, buffer)
            path, _, attribute = name.rpartition(".")
            setattr(model.get_submodule(path), attribute, torch.empty_like(buffer).copy_(whole(source)))
        elif is_unset(buffer):
            raise _missing(model, name)


def _check_shape(name: str, source: Source, tensor: Tensor) -> None:
    if source.shape != tuple(tensor.shape):
        raise InputError(f"{name} is {list(source.shape)} in the checkpoint, {list(tensor.shape)} by its configuration")


def _missing(model: Any, name: str) -> InputError:
    """The error for a weight without a source: some are made otherwise by `from_pretrained`."""
    for pattern in getattr(model, "_keys_to_ignore_on_load_missing", None) or ():
        if re.search(pattern, name):
            return WholeOnlyError(f"{name} is in no checkpoint: transformers computes it")
    if name not in model.state_dict():
        return WholeOnlyError(f"the buffer {name} is not computed as transformers' models do")
    return InputError(f"the checkpoint has no weight {name}: transformers would fill it with random numbers")


def _set_generation(model: Any, name: str) -> None:
    """The checkpoint's own settings of `generate`, where it has any."""
    from transformers import GenerationConfig

    try:
        model.generation_config = GenerationConfig.from_pretrained(name)
    except OSError:
        return  # none: those that transformers makes of the configuration stay
