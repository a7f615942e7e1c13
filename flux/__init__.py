"""Everything that is FLUX.1: request rules, loading, prompts, denoising, images."""
