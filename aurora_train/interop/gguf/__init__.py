"""GGUF, the file format of llama.cpp and Ollama: one file with the weights, the tokenizer and the chat template.

`file` reads the container, `names` lists the architectures, `model` translates a file to what a Hugging Face folder
says and back, `tokenizer` does that for the vocabulary, and `write` makes a file of a model.
"""

from aurora_train.interop.gguf.model import open_gguf

__all__ = ["open_gguf"]
