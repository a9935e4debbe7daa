"""Caches of keys and values, each of which owns how it is attended to."""
