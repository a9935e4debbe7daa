"""From a model to tokens and text."""
