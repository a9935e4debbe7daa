"""The model in the box, and the stories that it was made from."""
