"""`export`: an optimized model becomes a directory that runs where Python, transformers or PyTorch are not."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from lethe_compile.artifact.manifest import (
    CacheSpec,
    Device,
    Manifest,
    ProgramSpec,
    StateSpec,
    load_manifest,
    write_manifest,
)
from lethe_compile.artifact.tokens import TOKENIZER, check_vocabulary
from lethe_compile.errors import ArtifactError, ConfigError, UnsupportedGraphError
from lethe_compile.exporters.tensorrt_build import EngineOptions
from lethe_compile.passes.contiguous import refuse_what_has_no_contiguous_form
from lethe_compile.passes.kernel_step import MOST_ROWS
from lethe_compile.policies.full import FullPolicy
from lethe_compile.policies.lethe import LethePolicy
from lethe_compile.runtime import OptimizedModel

FORMATS = ("aoti", "pt2", "onnx", "tensorrt")
_TOKENIZER_FILES = (TOKENIZER, "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja")
_PACKAGES = ("torch", "transformers", "triton", "onnx", "onnxscript", "tensorrt", "numpy")

Writer = Callable[[OptimizedModel, Path, Callable[[str], None]], dict[str, ProgramSpec]]


def export(
    fast: OptimizedModel,
    directory: str | Path,
    format: str,
    *,
    tokenizer: str | Path | Any | None = None,
    overwrite: bool = False,
    progress: Callable[[str], None] | None = None,
    engine: EngineOptions | None = None,
    max_batch: int | None = None,
) -> Manifest:
    """Write `fast`, pruning included, to a directory that `lethe run` or `lethe_compile.artifact` executes.

    ======== ================================================= ===========================================
    format   files beside the manifest                         runs with
    ======== ================================================= ===========================================
    onnx     ``step.onnx``, ``prune.onnx``, ``weights.bin``    onnxruntime and NumPy; any device of theirs
    pt2      ``step.pt2``, ``prune.pt2``                       torch and lethe_compile
    aoti     ``step.pt2``, ``prune.pt2``, on a GPU also        torch, from Python or C++; where it was made
             ``decode.pt2`` and ``weights.safetensors``
    tensorrt the ONNX files, ``step.plan``, ``prune.plan``     tensorrt and torch; where they were built
    ======== ================================================= ===========================================

    Everything is written to a temporary directory beside `directory`, which takes its name at the end: an export that
    is interrupted leaves nothing.

    Args:
        fast: what `optimize` returned.
        directory: must not exist, unless `overwrite` says that an artifact there may go.
        format: one of `FORMATS`.
        tokenizer: a directory with ``tokenizer.json``, or a tokenizer of transformers; its files join the artifact.
        progress: hears what is being done.
        engine: sizes, timing cache and memory of TensorRT's engines.
        max_batch: of aoti on a GPU, most sequences at once, for which the kernels of a decode step are compiled; 64
            unless told otherwise. Elsewhere there is no such limit.

    Returns:
        The manifest.

    Raises:
        UnsupportedGraphError: the model keeps recurrent state, has masks by content, or holds an operator that the
            format lacks; says which, before anything is written.
        ConfigError: an unknown format, an option of another one, or `directory` is in the way.
        ArtifactError: the tokenizer does not belong to the model.
        MissingPackageError: what writes the format is not installed. For tensorrt, the ONNX files have been written,
            and the error names the command that builds the engine from them.
    """
    folder = Path(directory)
    write = _writer(format, engine, _most_rows(fast, format, max_batch))
    _check_target(folder, overwrite)
    _refuse(fast)
    with _replaced(folder) as temporary:
        files = _copy_tokenizer(tokenizer, temporary, fast.vocab_size)
        programs = write(fast, temporary, progress or (lambda _: None))
        manifest = _manifest(fast, format, programs, files, max_batch)
        write_manifest(manifest, temporary)
    if format == "tensorrt" and not any(program.engine for program in programs.values()):
        from lethe_compile.exporters.tensorrt import tell_how_to_build

        tell_how_to_build(fast, folder, engine or EngineOptions())
    return load_manifest(folder, verify=False)


def _most_rows(fast: OptimizedModel, format: str, max_batch: int | None) -> int:
    if max_batch is None:
        return MOST_ROWS
    if format != "aoti" or fast.device.type != "cuda":
        raise ConfigError(
            f"max_batch={max_batch} is not allowed: format={format!r} of a model on {fast.device} takes any number of"
            " sequences; only aoti on a GPU has a limit"
        )
    if not isinstance(max_batch, int) or isinstance(max_batch, bool) or max_batch < 1:
        raise ConfigError(f"max_batch={max_batch!r} is not allowed: must be an integer >= 1")
    return max_batch


def _writer(format: str, engine: EngineOptions | None = None, most_rows: int = MOST_ROWS) -> Writer:
    if format not in FORMATS:
        raise ConfigError(f"format={format!r} is not allowed: must be one of {', '.join(FORMATS)}")
    if engine is not None and format != "tensorrt":
        raise ConfigError(f"format={format!r} has no engines to be built: leave `engine` away, or choose tensorrt")
    if format == "onnx":
        from lethe_compile.exporters.onnx import write_onnx

        return write_onnx
    if format == "pt2":
        from lethe_compile.exporters.pt2 import write_pt2

        return write_pt2
    if format == "tensorrt":
        from lethe_compile.exporters.tensorrt import write_tensorrt

        return partial(write_tensorrt, options=engine or EngineOptions())
    from lethe_compile.exporters.aoti import write_aoti

    return partial(write_aoti, most_rows=most_rows)


def _check_target(folder: Path, overwrite: bool) -> None:
    if not folder.exists():
        return
    if not overwrite:
        raise ConfigError(f"{folder} exists: choose another directory, or pass overwrite=True (--overwrite)")
    if not folder.is_dir() or (any(folder.iterdir()) and not (folder / "manifest.json").is_file()):
        raise ConfigError(f"{folder} is no artifact, and is not overwritten")


def _refuse(fast: OptimizedModel) -> None:
    """Refuse by name what no format can carry."""
    if fast.ranks is not None:
        raise UnsupportedGraphError(
            f"rank {fast.ranks.rank} of {fast.ranks.size} holds its share of the model, and an artifact runs alone",
            hint="Optimize the model on one rank, without tp, and export that",
        )
    refuse_what_has_no_contiguous_form(fast.program)
    if type(fast.policy) not in (LethePolicy, FullPolicy):
        raise UnsupportedGraphError(
            f"the rounds of policy {fast.config.policy!r} cannot be exported",
            hint="Export with policy='lethe', or with policy='full' to evict nothing",
        )
    if fast.restart_at is not None:
        raise UnsupportedGraphError(
            f"rotary frequencies change after {fast.restart_at} tokens, when all keys are computed anew: that cannot be"
            " exported",
            hint="Give the model another rope_type, such as 'linear' or 'yarn'",
        )


@contextmanager
def _replaced(folder: Path) -> Iterator[Path]:
    """A temporary directory beside `folder` that takes its place at the end; on an error it goes."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        temporary.chmod(0o777 & ~_umask())
        yield temporary
        if folder.exists():
            shutil.rmtree(folder)
        temporary.rename(folder)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def _umask() -> int:
    current = os.umask(0)
    os.umask(current)
    return current


def _copy_tokenizer(tokenizer: Any, target: Path, vocab_size: int) -> tuple[str, ...]:
    """Copy a tokenizer's files; their names."""
    if tokenizer is None:
        return ()
    if not isinstance(tokenizer, (str, Path)):
        with tempfile.TemporaryDirectory() as folder:
            tokenizer.save_pretrained(folder)
            return _copy_tokenizer(folder, target, vocab_size)
    source = Path(tokenizer)
    if not (source / TOKENIZER).is_file():
        raise ArtifactError(f"{source} has no {TOKENIZER}: only such tokenizers run without transformers")
    from tokenizers import Tokenizer

    vocabulary = Tokenizer.from_file(str(source / TOKENIZER)).get_vocab()
    check_vocabulary(vocabulary, vocab_size, str(source / TOKENIZER))
    names = tuple(name for name in _TOKENIZER_FILES if (source / name).is_file())
    for name in names:
        shutil.copyfile(source / name, target / name)
    return names


def _manifest(
    fast: OptimizedModel,
    kind: str,
    programs: dict[str, ProgramSpec],
    tokenizer: tuple[str, ...],
    max_batch: int | None = None,
) -> Manifest:
    caches = tuple(
        CacheSpec(*site.geometry[:3], window, tuple(other.layer for other in fast.sites if other.cache == index))
        for index, (site, window) in enumerate(zip(fast.caches, fast.windows, strict=True))
    )
    fast.begin_policy(fast.policy, 1)
    state = tuple(
        StateSpec(
            name, str(value.dtype).removeprefix("torch."), None if bool(value.isnan().all()) else value[0, 0].item()
        )
        for name, value in fast.policy.state().items()
    )
    interval = fast.config.interval
    config = fast.config.to_dict()
    policy = {"name": fast.config.policy, "decay": fast.policy.decay, "interval": interval, "config": config}
    device = Device("any") if kind in ("onnx", "tensorrt") else _device(fast)
    if any(program.engine for program in programs.values()):
        device = _gpu(None)
    return Manifest(
        kind=kind,
        model={**_model_facts(fast), **({"most_rows": max_batch or MOST_ROWS} if "decode" in programs else {})},
        caches=caches,
        policy=policy,
        state=state if "prune" in programs else (),
        programs=programs,
        generation=_generation(fast),
        device=device,
        versions={"lethe_compile": _own_version(), **_versions()},
        tokenizer=tokenizer,
    )


def _device(fast: OptimizedModel) -> Device:
    return _gpu(fast.device) if fast.device.type == "cuda" else Device(fast.device.type)


def _gpu(device: torch.device | None) -> Device:
    """A CUDA device, the current one unless another is given."""
    return Device("cuda", torch.cuda.get_device_capability(device))


def _model_facts(fast: OptimizedModel) -> dict[str, Any]:
    weights = {id(weight): weight for weight in fast.program.module.parameters()}.values()
    return {
        "vocab_size": fast.vocab_size,
        "max_positions": fast.max_positions,
        "dtype": str(fast.dtype).removeprefix("torch."),
        "parameters": sum(weight.numel() for weight in weights),
        "layers": len(fast.sites),
        "page_size": fast.page_size,
        "architecture": getattr(fast.hf_config, "model_type", None),
    }


def _generation(fast: OptimizedModel) -> dict[str, Any]:
    eos = getattr(fast.generation_config, "eos_token_id", None)
    pad = getattr(fast.generation_config, "pad_token_id", None)
    return {"eos_token_id": [] if eos is None else [eos] if isinstance(eos, int) else list(eos), "pad_token_id": pad}


def _own_version() -> str:
    import lethe_compile

    return lethe_compile.__version__


def _versions() -> dict[str, str]:
    found = {}
    for name in _PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found
