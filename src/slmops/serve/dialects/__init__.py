"""The languages that the server speaks, one file each: what a client sends and gets, and the shape of its errors."""
