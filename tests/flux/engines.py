"""What an engine is made of, as setup loads it."""

from diffusers import FluxPipeline

from flux.deployment import Deployment, sources_of
from flux.load import load_pipelines, working_transformers
from flux.transformers.pool import Transformers
from weights.serving.inventory import Inventory
from weights.serving.settings import Settings


def parts(settings: Settings) -> tuple[dict[str, FluxPipeline], Transformers]:
    """The pipelines and the working transformers of a deployment."""
    deployment = Deployment.choose(settings)
    sources = sources_of(deployment.checkpoint, settings)
    pipelines = load_pipelines(sources, deployment, Inventory())
    return pipelines, working_transformers(pipelines, sources, deployment, settings)
