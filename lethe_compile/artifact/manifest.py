"""The manifest of an artifact: the model, its cache, how that is pruned, and a hash of every file.

An artifact is data. Its manifest is JSON, its programs and weights are what their runtimes read, and no pickle is among
them. Nothing is run before every file was found to be what was written.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path, PurePosixPath
from typing import Any

from lethe_compile.errors import ArtifactError

FORMAT = 1
"""Version of the layout. A reader takes its own and older ones."""
FILE = "manifest.json"
_CHUNK = 1 << 22


@dataclass(frozen=True)
class CacheSpec:
    """One cache: KV heads, numbers a key and a value, the window of its layers, and which attentions use it."""

    kv_heads: int
    k_dim: int
    v_dim: int
    window: int | None
    layers: tuple[int, ...]


@dataclass(frozen=True)
class StateSpec:
    """What a policy carries from round to round: ``[caches, rows]``, `initial` everywhere at first; None is NaN."""

    name: str
    dtype: str
    initial: float | None


@dataclass(frozen=True)
class ProgramSpec:
    """A program: its file, the names of its inputs and outputs in order, and the engine that was built of it."""

    file: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    engine: str | None = None


@dataclass(frozen=True)
class Device:
    """What an artifact was made for; `capability` is that of a CUDA device, None where any of the type will do."""

    type: str
    capability: tuple[int, int] | None = None


@dataclass(frozen=True)
class Manifest:
    """Everything that a runner needs to know of an artifact.

    Attributes:
        kind: "onnx", "pt2", "tensorrt".
        model: `vocab_size`, `max_positions` (None without a limit), `dtype`, `parameters`, and what else is known.
        caches: in the order of the programs' inputs ``k_i, v_i``.
        policy: `name`, `decay` (None: no scores), `interval` between rounds, and its `config`.
        state: of the policy.
        programs: `step`, and `prune` where rounds can drop anything.
        generation: `eos_token_id`, a list, and `pad_token_id`, the defaults of a generation.
        files: name to `sha256` and `bytes`, of all files but the manifest.
        versions: packages that the artifact was made with.
    """

    kind: str
    model: dict[str, Any]
    caches: tuple[CacheSpec, ...]
    policy: dict[str, Any]
    state: tuple[StateSpec, ...]
    programs: dict[str, ProgramSpec]
    generation: dict[str, Any]
    device: Device
    versions: dict[str, str]
    tokenizer: tuple[str, ...] = ()
    files: dict[str, dict[str, Any]] = field(default_factory=dict)
    format: int = FORMAT
    directory: Path = Path()  # where it was read from; not part of the file

    def path(self, name: str) -> Path:
        """The file `name` of the artifact."""
        return self.directory / name

    def to_json(self) -> str:
        values = asdict(self)
        del values["directory"]
        return json.dumps(values, indent=2, allow_nan=False) + "\n"


def write_manifest(manifest: Manifest, directory: Path) -> None:
    """Write the manifest beside the artifact's files, with the hash of each of them."""
    names = sorted(p.relative_to(directory).as_posix() for p in directory.rglob("*") if p.is_file())
    hashed = {name: _fingerprint(directory / name) for name in names if name != FILE}
    values = {one.name: getattr(manifest, one.name) for one in fields(manifest)}
    (directory / FILE).write_text(Manifest(**{**values, "files": hashed}).to_json())


def load_manifest(directory: str | Path, *, verify: bool = True) -> Manifest:
    """Read and check the manifest of an artifact; with `verify`, also the hash of every file.

    Raises:
        ArtifactError: no manifest, a newer or malformed one, a file that is missing, truncated or altered.
    """
    folder = Path(directory)
    file = folder / FILE
    if not file.is_file():
        raise ArtifactError(f"{folder} is no artifact: it has no {FILE}. `lethe export` writes one")
    try:
        values = json.loads(file.read_text())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ArtifactError(f"{file} is damaged: {error}. Export again") from error
    manifest = _parse(values, file)
    _check_names(manifest)
    if verify:
        for name, expected in manifest.files.items():
            _check_file(manifest.path(name), expected)
    return manifest


def _parse(values: Any, file: Path) -> Manifest:
    version = values.get("format") if isinstance(values, dict) else None
    if not isinstance(version, int):
        raise ArtifactError(f"{file} is no manifest: it does not state a format version")
    if version > FORMAT:
        raise ArtifactError(
            f"{file} has format {version}, and this version of Lethe Compile reads formats up to {FORMAT}: update it"
        )
    try:
        capability = values["device"]["capability"]
        return Manifest(
            **{
                **values,
                "caches": tuple(CacheSpec(**{**one, "layers": tuple(one["layers"])}) for one in values["caches"]),
                "state": tuple(StateSpec(**one) for one in values["state"]),
                "programs": {
                    name: ProgramSpec(one["file"], tuple(one["inputs"]), tuple(one["outputs"]), one.get("engine"))
                    for name, one in values["programs"].items()
                },
                "device": Device(values["device"]["type"], None if capability is None else tuple(capability)),
                "tokenizer": tuple(values["tokenizer"]),
                "directory": file.parent,
            }
        )
    except (KeyError, TypeError, AttributeError) as error:
        raise ArtifactError(f"{file} is malformed: {type(error).__name__}: {error}. Export again") from error


def _check_names(manifest: Manifest) -> None:
    """No name may lead out of the directory, and no program or tokenizer may be a file without a hash."""
    for name in manifest.files:
        path = PurePosixPath(name)
        if path.is_absolute() or ".." in path.parts or "\\" in name or not path.parts:
            raise ArtifactError(f"{manifest.path(FILE)} names a file outside of the artifact: {name!r}")
    programs = manifest.programs.values()
    used = [*(program.file for program in programs), *manifest.tokenizer]
    used += [program.engine for program in programs if program.engine is not None]
    if unknown := [name for name in used if name not in manifest.files]:
        raise ArtifactError(f"{manifest.path(FILE)} has no hash of {', '.join(unknown)}: export again")


def _check_file(path: Path, expected: dict[str, Any]) -> None:
    if not path.is_file():
        raise ArtifactError(f"{path} is missing: the artifact is incomplete. Copy it again, or export again")
    size = path.stat().st_size
    if size != expected["bytes"]:
        what = "truncated" if size < expected["bytes"] else "longer than it was"
        raise ArtifactError(f"{path} is {what}: {size} bytes, and {expected['bytes']} were written. Copy it again")
    if _fingerprint(path)["sha256"] != expected["sha256"]:
        raise ArtifactError(f"{path} was altered: its SHA-256 is not that in the manifest. Copy it again")


def _fingerprint(path: Path) -> dict[str, Any]:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    return {"sha256": digest.hexdigest(), "bytes": path.stat().st_size}


def total_bytes(manifest: Manifest, names: Iterable[str] | None = None) -> int:
    """Size of the artifact's files, or of some of them."""
    return sum(manifest.files[name]["bytes"] for name in (manifest.files if names is None else names))
