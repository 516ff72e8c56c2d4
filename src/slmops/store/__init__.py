"""Content-addressed storage in a local folder."""

from slmops.store.local import Store

__all__ = ["Store"]
