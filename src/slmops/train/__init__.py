"""Training: one file per method, one shared loop."""
