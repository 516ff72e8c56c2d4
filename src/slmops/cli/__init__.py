"""The command line: one file per verb; `main` holds the one error boundary."""
