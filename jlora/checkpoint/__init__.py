"""Save and restore adapters with Orbax: the arrays of one task, without the base weights.

A checkpoint is self-describing: an index stores the path, kind and layout of each leaf, so that the
adapter can be restored onto plain base weights. It is written to a temporary sibling directory,
then renamed into place. Orbax stores arrays without checksums; the index has one for each array and
one for itself.
"""

from jlora.checkpoint._restore import restore as restore
from jlora.checkpoint._save import save as save

__all__ = ["restore", "save"]
