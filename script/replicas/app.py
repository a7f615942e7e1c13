"""The Serve application: one front, and replicas behind it."""

from pydantic import BaseModel, PositiveInt
from ray import serve
from ray.serve.config import RequestRouterConfig
from ray.serve.handle import DeploymentHandle

from replicas.front import Front
from replicas.replica import Replica
from replicas.router import AdapterRouter

ANY_NUMBER = 1_000_000  # of requests at once: what bounds them is the queue
LIFE = {"health_check_period_s": 1, "graceful_shutdown_wait_loop_s": 0.1}


class Settings(BaseModel, extra="forbid"):
    """What is under `args` in a Serve config file.

    Attributes:
        replicas: their number.
        gpus: for each of them.
        queue: the number of requests that may wait.
    """

    replicas: PositiveInt = 1
    gpus: int = 0
    queue: PositiveInt = 100


def build(settings: Settings) -> serve.Application:
    """The application; Serve calls this for a config file that names it."""
    replicas: DeploymentHandle = serve.deployment(
        Replica,
        num_replicas=settings.replicas,
        max_ongoing_requests=1,
        max_queued_requests=settings.queue,
        # No core is reserved: Serve would allow one replica for each.
        ray_actor_options={"num_cpus": 0, "num_gpus": settings.gpus},
        request_router_config=RequestRouterConfig(
            request_router_class=AdapterRouter, initial_backoff_s=0.01, max_backoff_s=0.1
        ),
        **LIFE,
    ).bind(settings.gpus)
    options = {"max_ongoing_requests": ANY_NUMBER, "ray_actor_options": {"num_cpus": 0}}
    return serve.deployment(Front, **options, **LIFE).bind(replicas)
