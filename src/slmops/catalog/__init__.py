"""Which models exist and how they come onto the disk."""
