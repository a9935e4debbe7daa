"""GGUF: the files of llama.cpp, read where they are, packed as they are.

`container` knows files: metadata, and tensors as blocks of bytes. `names` and `config` know what a model's are called.
"""
