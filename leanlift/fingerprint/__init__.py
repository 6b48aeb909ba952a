"""Which base model an adapter belongs to.

Offsets added to the wrong weights give a model that runs and talks nonsense, so every adapter
carries a fingerprint of the base it was trained over, and loading and merging compare it first:

* the names and shapes of the trained matrices,
* the storage format of every quantized Linear (an adapter over NF4 is not one over INT8),
* samples of all trained matrices, all norm weights and the embedding (`samples`), which are
  compared with a base in any form, to within what that form leaves open (`cells`),
* a digest of the latter two, rounded to the dtype of loading: where it is equal, nothing else
  needs to be asked about them.

Adapters of format 1 have no samples: over them, bases that differ in trained matrices alone are
not told apart, and that is said.
"""

from leanlift.fingerprint.compare import (
    check_common_samples,
    check_same_base,
    other_end,
    other_matrix,
    say_what_is_not_known,
)
from leanlift.fingerprint.layout import Home, Layout, Segment, overlaps
from leanlift.fingerprint.record import BaseFingerprint
from leanlift.fingerprint.take import (
    Read,
    digest_of,
    fingerprint,
    sampled_names,
    sampled_rows,
    with_samples,
)

__all__ = [
    "BaseFingerprint",
    "Home",
    "Layout",
    "Read",
    "Segment",
    "check_common_samples",
    "check_same_base",
    "digest_of",
    "fingerprint",
    "other_end",
    "other_matrix",
    "overlaps",
    "sampled_names",
    "sampled_rows",
    "say_what_is_not_known",
    "with_samples",
]
