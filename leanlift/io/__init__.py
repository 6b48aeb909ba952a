"""Files whole or absent, read within bounds; tensors in them; names on the hub; directories.

Its modules are imported one by one: most of them need no torch, and commands that only read do
not pay for it.
"""
