"""The embedded miniature: what builds, trains and measures it."""
