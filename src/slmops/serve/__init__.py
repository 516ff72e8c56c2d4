"""Serving: answers to many clients at once on a small machine.

`engines` compute, `sampling` picks tokens, `scheduler` says which prompt and which answer goes on when. Nothing here knows HTTP.
"""
