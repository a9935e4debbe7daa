"""Conversations: how messages become the ids that a model was trained on, and the small chat model of `make chat`."""
