"""Serving: answers to many clients at once on a small machine.

`engines` compute, `sampling` picks tokens, `scheduler` says which prompt and which answer goes on when. `model` is one
model's process, `pool` all models by name with the memory that they share, `versions` what takes over from what. Only `app`, `admin` and
`dialects` know HTTP.
"""
