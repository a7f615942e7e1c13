"""Downloads: checked addresses, retries, verified files, and the cache on disk."""
