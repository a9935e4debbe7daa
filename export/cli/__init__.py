"""The commands `llamajax export`, `verify` and `run`."""
