"""`lethe serve`: an OpenAI-compatible HTTP service of one model, by one process, by ranks or by replicas on Ray.

    torchrun --nproc-per-node 2 -m lethe_compile serve MODEL

splits the model over the ranks that torchrun starts. Rank 0 serves and prints, the others follow it. Each reads its own
part of the weights from safetensors files; where that cannot be done, rank 0 says why, and each loads the whole first.
"""

from __future__ import annotations

import argparse
import functools
import ipaddress
import os
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import lethe_compile as lethe
from lethe_compile import distributed
from lethe_compile.checkpoint import load_parts
from lethe_compile.config import LetheConfig, parse_bytes
from lethe_compile.errors import InputError, MissingPackageError, WholeOnlyError
from lethe_compile.files import read_text
from lethe_compile.passes.parts import Fetch, fetch_part
from lethe_compile.serving import Engine
from lethe_compile.tools import _models, _policies

KEYS = "LETHE_API_KEY"
_DRAIN, _DRAIN_RANKS = 30.0, 20.0  # seconds; torchrun kills its processes 30 s after SIGTERM, unless told otherwise


def main(argv: Sequence[str] | None = None) -> int:
    """Serve until SIGTERM, then drain."""
    options = _arguments(argv)
    ranks = distributed.started()
    if options.drain_timeout is None:
        options.drain_timeout = _DRAIN_RANKS if ranks else _DRAIN
    if ranks and options.ray:
        raise InputError(
            "--ray starts processes of its own, one engine in each, and torchrun's ranks are one engine together: start"
            " lethe serve with --ray and without torchrun, or with torchrun and without --ray"
        )
    if ranks and os.environ["RANK"] != "0":
        return _follow(options)
    status = _serve(options)
    distributed.leave()
    return status


def _follow(options: argparse.Namespace) -> int:
    """Take part in rank 0's steps, until it has drained: torchrun sends SIGTERM to all, and only rank 0 heeds it."""
    with build_engine(options) as engine:
        for name in (signal.SIGTERM, signal.SIGINT):
            signal.signal(name, signal.SIG_IGN)
        engine.follow()
    distributed.leave()
    return 0


def _serve(options: argparse.Namespace) -> int:
    try:
        from lethe_compile.serving import api, prompts, server
    except ImportError as error:
        name = str(error.name)
        message = f"lethe serve needs the package {name!r}: pip install 'lethe-compile[serve]'"
        raise MissingPackageError(message, name) from error
    template = None if options.chat_template is None else read_text(options.chat_template)
    keys = _keys(options)
    listener = server.listen(options.host, options.port)  # before minutes of loading
    host, port = listener.getsockname()[:2]
    if not keys and not ipaddress.ip_address(host).is_loopback:
        print(f"warning: whoever reaches {host} may use this service: no API key is set", file=sys.stderr)
    tokenizer = _models.load_tokenizer(options.tokenizer or options.model)
    settings = api.ServiceSettings(
        options.served_model_name or options.model, keys, options.max_body, options.stall_timeout
    )
    make_engine = functools.partial(build_engine, options)
    with _source(options, make_engine) as source:
        words = prompts.Prompts(tokenizer, template)
        service = api.Service(source, words, settings)
        print(f"serving {settings.name} on http://{f'[{host}]' if ':' in host else host}:{port}/v1", flush=True)
        server.Server(service.app, options.drain_timeout, source.close).run([listener])
        words.close()
    return 0


def _source(options: argparse.Namespace, make_engine: Any) -> Any:
    if not options.ray:
        from lethe_compile.serving.source import LocalSource

        return LocalSource(make_engine())
    from lethe_compile.serving.ray_settings import RaySettings, set_environment

    settings = RaySettings(
        address=options.ray_address,
        min_replicas=options.min_replicas,
        max_replicas=options.max_replicas or options.min_replicas,
        target_requests=options.target_requests,
        max_batch=options.max_batch,
        max_queue=options.max_queue,
        cpus=options.replica_cpus,
        gpus=options.replica_gpus,
        drain_timeout=options.drain_timeout,
    )
    set_environment(settings)
    try:
        from lethe_compile.serving.ray_app import RaySource
    except ImportError as error:
        message = f"--ray needs the package {str(error.name)!r}: pip install 'lethe-compile[ray]'"
        raise MissingPackageError(message, str(error.name)) from error
    return RaySource(make_engine, settings)


def build_engine(options: argparse.Namespace) -> Engine:
    """The engine that the command line describes; called where it is to run."""
    mesh = distributed.init() if distributed.started() else None

    def say(text: str) -> None:
        if mesh is None or mesh.get_local_rank() == 0:
            print(text, file=sys.stderr, flush=True)

    say(f"loading {options.model}")
    model, fetch = _load(options, mesh, say)
    say("optimizing")
    fast = lethe.optimize(model, _config(options), backend=options.backend, tp=mesh, fetch=fetch)
    del model, fetch  # a rank has its own part of the weights: the whole makes room for the cache
    return Engine(
        fast,
        max_batch=options.max_batch,
        kv_memory=options.kv_memory,
        max_queue=options.max_queue,
        max_length=options.max_length,
        prefill_chunk=options.prefill_chunk,
        under_pressure=options.under_pressure,
    )


def _load(options: argparse.Namespace, mesh: Any, say: Callable[[str], None]) -> tuple[Any, Fetch]:
    """The model and how ranks get their parts of it: from its files where that can be."""
    import torch

    device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if mesh is not None:
        try:
            name, dtype = _models.files_of(options.model)
            loaded = load_parts(name, mesh, dtype=options.dtype or dtype, device=device)
        except WholeOnlyError as reason:
            say(f"every rank loads the whole model before it keeps its part: {reason}")
        else:
            say(
                "not compared with the original model, which lies on no rank as a whole: only that decode steps"
                " continue whole sequences is verified"
            )
            return loaded
    model = _models.load_model(options.model)
    model = model.to(device) if options.dtype is None else model.to(device, getattr(torch, options.dtype))
    return model, fetch_part


def _config(options: argparse.Namespace) -> LetheConfig:
    values = _policies.read_config(options.config)
    for name in ("policy", "max_tokens", "budget"):
        if getattr(options, name) is not None:
            values[name] = getattr(options, name)
    if given := _policies.options_of(options.policy_option):
        values["policy_options"] = given
    return LetheConfig.from_dict(values)


def _keys(options: argparse.Namespace) -> list[str]:
    keys = [*options.api_key, *([os.environ[KEYS]] if os.environ.get(KEYS) else [])]
    if not all(key.isascii() and key.strip() == key != "" for key in keys):
        raise InputError("an API key must be ASCII text without spaces around it, and not empty")
    return keys


def _memory(text: str) -> int | float:
    if (size := parse_bytes(text)) is not None:
        return size
    try:
        return float(text) if "." in text else int(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(
            f"{text!r} is neither bytes, such as 8GiB, nor a share, such as 0.8"
        ) from error


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise ValueError(text)
    return number


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="lethe serve", description=__doc__)
    parser.add_argument("model", metavar="MODEL", help=_models.HELP)
    _add_http(parser.add_argument_group("HTTP"))
    _add_model(parser.add_argument_group("model and engine, see lethe_compile.Engine"))
    _add_ray(parser.add_argument_group("replicas on Ray"))
    options = parser.parse_args(argv)
    if options.max_replicas is not None and options.max_replicas < options.min_replicas:
        parser.error(f"--max-replicas {options.max_replicas} is less than --min-replicas {options.min_replicas}")
    return options


def _add_http(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add("--host", default="127.0.0.1", help="address to listen on (default 127.0.0.1: this machine only)")
    add("--port", type=int, default=8000, help="0 takes a free one (default 8000)")
    add(
        "--api-key",
        action="append",
        default=[],
        metavar="KEY",
        help=f"asked of clients for all but /health; repeatable; better in ${KEYS}, which no list of processes shows",
    )
    add("--served-model-name", metavar="NAME", help="what clients call the model (default MODEL)")
    add("--chat-template", type=Path, metavar="FILE", help="Jinja template in place of the tokenizer's own")
    add("--tokenizer", metavar="MODEL", help="of another model or directory")
    add("--max-body", type=_positive, default=4 << 20, metavar="BYTES", help="of a request (default 4 MiB)")
    add("--stall-timeout", type=float, default=60.0, metavar="S", help="most wait for a reader of a stream (60)")
    add(
        "--drain-timeout",
        type=float,
        metavar="S",
        help=f"for what runs at SIGTERM ({_DRAIN:.0f}; under torchrun, which kills 30 s after SIGTERM unless its"
        f" --shutdown-timeout says more, {_DRAIN_RANKS:.0f})",
    )


def _add_model(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    _policies.add_arguments(group)
    group.set_defaults(policy=None)  # the file's, where there is one
    add("--max-tokens", type=_positive, metavar="N", help="most tokens retained a layer and sequence")
    add("--budget", type=_policies.budget, help="tokens, share or bytes of a sequence, over all layers")
    add("--config", type=Path, metavar="FILE", help="settings of LetheConfig as JSON; options given beside it win")
    add("--device", help="default: cuda where there is one, else cpu")
    add("--dtype", choices=("float32", "bfloat16", "float16"), help="convert the model first")
    add("--backend", default="auto", help="as in lethe.optimize (default auto)")
    add("--max-batch", type=_positive, default=32, metavar="N", help="most sequences decoded together (32)")
    add("--max-queue", type=_positive, default=256, metavar="N", help="most that wait; beyond that 429 (256)")
    add("--kv-memory", type=_memory, metavar="SIZE", help="of the KV cache, such as 8GiB or 0.8 of what is free")
    add("--max-length", type=_positive, metavar="N", help="most prompt and new tokens of a sequence")
    add("--prefill-chunk", type=_positive, metavar="N", help="most prompt tokens between two decode steps")
    add("--under-pressure", choices=("prune", "preempt"), default="prune", help="when pages run out (prune)")


def _add_ray(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add("--ray", action="store_true", help="run the engines as replicas of one Ray Serve deployment")
    add("--ray-address", metavar="HOST:PORT", help="of a cluster; default: a new one in this machine, on loopback")
    add("--min-replicas", type=_positive, default=1, metavar="N", help="default 1")
    add("--max-replicas", type=_positive, metavar="N", help="more than --min-replicas: autoscaling (default: the same)")
    add("--target-requests", type=float, metavar="N", help="a replica, that autoscaling aims at (default: --max-batch)")
    add("--replica-cpus", type=float, default=1.0, metavar="N", help="that Ray reserves for each (1)")
    add("--replica-gpus", type=float, default=0.0, metavar="N", help="that Ray gives to each (0)")


if __name__ == "__main__":
    raise SystemExit(main())
