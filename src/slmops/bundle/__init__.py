"""The deployable unit: a folder that says what it is and can be checked before it is used."""
