"""slmops: from a task and a teacher to a small language model on every device."""

__version__ = "0.1.0"
