"""Reads, cleans and splits data, and synthesises more of it with a teacher."""
