"""How well a model predicts a text, how near it is to another, and how fast it runs."""
