"""Safety checkers: images in, verdicts out."""
