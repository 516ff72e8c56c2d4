"""Turning trained models into the forms that runtimes load: one file per format."""
