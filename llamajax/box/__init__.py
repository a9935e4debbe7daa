"""The small model that ships with the package, and the generator of the stories on which it was trained."""
