"""Weight files, got and kept; the embedded miniature; and in `serving` what all packages share."""
