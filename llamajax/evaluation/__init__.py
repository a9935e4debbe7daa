"""Measures how well a model predicts a text, how near it is to another model, and how fast it runs."""
