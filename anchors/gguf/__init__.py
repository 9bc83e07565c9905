"""GGUF files, llama.cpp's format: read, understood key by key, and converted to what transformers loads."""

from anchors.gguf.cache import cache_directory, converted, intact

__all__ = ["cache_directory", "converted", "intact"]
