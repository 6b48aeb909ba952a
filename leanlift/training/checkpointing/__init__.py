"""Training checkpoints: what is in them, which is whole, how one is put in place and gone on from.

names       the files of a checkpoint
directory   assembling and putting in place, rotation, the newest that is whole
parts       the state of optimizer, schedule, random numbers and loss scale, saved and loaded
loop_state  those states as plain JSON, and what may not be in them
whole       whether a checkpoint is whole, file by file
settings    what may not change between a checkpoint and the run that goes on from it
lock        one run at a time in an output directory
"""
