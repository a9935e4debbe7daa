"""Applies a recipe to a model: chooses a rule for each weight, calibrates, quantizes, and resumes interrupted work."""
