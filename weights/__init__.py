"""Getting weight files and keeping them, and the embedded miniature checkpoint."""
