"""What the miniature generates, measured through the real server: script/miniature/evaluate."""
