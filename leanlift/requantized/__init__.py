"""A merged model in the forms that people run, and what of the learned change is left in them.

`gguf` writes a file for llama.cpp and Ollama with llama.cpp's own converter and quantizer, `bnb` a
checkpoint that transformers quantizes by bitsandbytes. Rounding to 4 bits can undo a small change
of a weight, so `check` compares what was written with base and adapter, and `change` counts how
many of the changed weights kept their change.
"""
