"""Does it learn as well as it should over a 4-bit base? Run `python -m benchmarks.quality`.

Every method starts from the same base, which the benchmark pretrains itself, and goes through one
loop: same rows in the same order, same number of steps, same schedule, same seeds. The learning
rate is swept per method, the best is taken by a validation split, and what is reported comes from
a test split over several seeds.
"""
