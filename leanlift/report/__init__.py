"""What a run has left, as a person reads it: as text, as a page, beside other runs.

`data` reads a run's files within bounds (`adapter` and `tensors` its adapter, by numpy), `text`
and `compare` make screens of it, `page` makes one self-contained page with `svg` and `maps`.
Nothing here needs torch, so that a report starts at once.
"""
