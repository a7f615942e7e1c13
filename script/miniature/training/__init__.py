"""Training the miniature: a small world of coloured shapes, and three models that learn it."""
