"""Training checkpoints: what is in them, which is whole, how one is put in place and gone on from.

directory   names, the newest that is whole, putting in place, rotation
whole       whether a checkpoint is whole, file by file
loop_state  what of the training loop is kept: schedule, random states, as JSON
settings    what may not change between a checkpoint and the run that goes on from it
lock        one run at a time in an output directory
"""
