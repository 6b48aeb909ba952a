"""Raw tensor operations behind one name each. The torch reference is the specification."""

from leanlift.ops.reference import gather_entries, patch_rows_

__all__ = ["gather_entries", "patch_rows_"]
