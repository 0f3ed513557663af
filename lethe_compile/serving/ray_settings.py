"""How many replicas, and the Ray that runs them. Nothing here imports Ray before its environment is set."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

from lethe_compile.errors import ConfigError

DEPLOYMENT = "Replica"
_STORE = 128 << 20  # bytes of Ray's object store: what passes through it is tokens


@dataclass(frozen=True)
class RaySettings:
    """How many replicas, and where.

    Attributes:
        address: of a cluster; None starts one in this machine, which listens on loopback only.
        min_replicas, max_replicas: with more of the latter, Ray scales between them.
        target_requests: running requests of a replica that scaling aims at; None: `max_batch`.
        max_batch: most requests that run on a replica; others wait here.
        max_queue: most requests that wait for a replica.
        cpus, gpus: that Ray reserves for each replica.
        drain_timeout: seconds that a replica which scaling takes away has to finish.
    """

    address: str | None = None
    min_replicas: int = 1
    max_replicas: int = 1
    target_requests: float | None = None
    max_batch: int = 32
    max_queue: int = 256
    cpus: float = 1.0
    gpus: float = 0.0
    drain_timeout: float = 30.0

    def deployment_options(self) -> dict[str, Any]:
        """As `ray.serve.deployment` takes them."""
        options: dict[str, Any] = {
            "name": DEPLOYMENT,
            "max_ongoing_requests": self.max_batch,
            "max_queued_requests": self.max_queue,
            "graceful_shutdown_timeout_s": self.drain_timeout,
            "graceful_shutdown_wait_loop_s": 0.5,
            "health_check_period_s": 2.0,
            "ray_actor_options": {"num_cpus": self.cpus, "num_gpus": self.gpus},
        }
        if self.max_replicas > self.min_replicas:
            options["autoscaling_config"] = {
                "min_replicas": self.min_replicas,
                "max_replicas": self.max_replicas,
                "target_ongoing_requests": self.target_requests or self.max_batch,
            }
        else:
            options["num_replicas"] = self.min_replicas
        return options


def set_environment(settings: RaySettings) -> None:
    """Call before anything imports ray, which reads it then: no telemetry, and where it is started here, loopback only.

    Ray has no setting for loopback but this one, named after the systems where it is the default: an
    `_node_ip_address` of 127.0.0.1 is replaced by an address that others reach.
    """
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    if settings.address is None:
        os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"


def start_ray(settings: RaySettings) -> None:
    """Join a cluster, or start Ray in this machine, without dashboard, and listening on loopback only.

    Raises:
        ConfigError: it would listen on other addresses.
    """
    import ray
    from ray._private import ray_constants

    if settings.address is not None:
        ray.init(address=settings.address, log_to_driver=False)
        return
    if ray_constants.ENABLE_RAY_CLUSTER:
        raise ConfigError(
            "Ray was imported before set_environment was called, and would listen on all addresses: call it first, or"
            " start Ray yourself and pass its address"
        )
    ray.init(
        address="local",
        num_cpus=max(1, round(settings.cpus * settings.max_replicas + 0.5)),
        include_dashboard=False,
        object_store_memory=_STORE,
        log_to_driver=False,
    )
