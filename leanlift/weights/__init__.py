"""Frozen weights, however they are stored, as row tiles; the one door to bitsandbytes (`bnb`)."""
