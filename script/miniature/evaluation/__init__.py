"""What the miniature draws, measured through the real server: script/miniature/evaluate."""
