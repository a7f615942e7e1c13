"""The image as cog builds it, run as its users do: script/container-check."""
