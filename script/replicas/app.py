"""The Serve application: one front, and replicas behind it."""

from collections.abc import Mapping
from typing import Any

from ray import serve
from ray.serve.config import RequestRouterConfig
from ray.serve.handle import DeploymentHandle

from replicas.front import Front
from replicas.replica import Replica
from replicas.router import AdapterRouter

ANY_NUMBER = 1_000_000  # of requests at once: what bounds them is the queue
LIFE = {"health_check_period_s": 1, "graceful_shutdown_wait_loop_s": 0.1}


def build(settings: Mapping[str, Any]) -> serve.Application:
    """The application, of settings as they are under `args` in a Serve config file.

    Args:
        settings: replicas, their number (1); gpus, for each of them (0); queue, the number of
            requests that may wait (100).
    """
    known = {"replicas": 1, "gpus": 0, "queue": 100}
    if unknown := settings.keys() - known.keys():
        raise ValueError(f"args: {', '.join(unknown)}: expected only {', '.join(known)}")
    chosen = {**known, **settings}
    replicas: DeploymentHandle = serve.deployment(
        Replica,
        num_replicas=chosen["replicas"],
        max_ongoing_requests=1,
        max_queued_requests=chosen["queue"],
        # No core is reserved: Serve would allow one replica for each.
        ray_actor_options={"num_cpus": 0, "num_gpus": chosen["gpus"]},
        request_router_config=RequestRouterConfig(
            request_router_class=AdapterRouter, initial_backoff_s=0.01, max_backoff_s=0.1
        ),
        **LIFE,
    ).bind()
    options = {"max_ongoing_requests": ANY_NUMBER, "ray_actor_options": {"num_cpus": 0}}
    return serve.deployment(Front, **options, **LIFE).bind(replicas)
