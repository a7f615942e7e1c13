"""The error of adapter files."""


class AdapterError(ValueError):
    """An adapter file that cannot be applied; the message is fit to show to a user."""
