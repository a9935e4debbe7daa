"""Conversations: turns messages into ids in the format that a model was trained on, and answers into messages."""
