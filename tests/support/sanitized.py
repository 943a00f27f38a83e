"""With FASTDISTIL_SANITIZED, fastdistil is the copy in that folder, whose extension was built with a sanitizer.

A plugin of pytest (`-p sanitized`) and an import of scripts, before anything imports fastdistil.
"""

from __future__ import annotations

import os
import sys

if folder := os.environ.get("FASTDISTIL_SANITIZED"):
    if "fastdistil" in sys.modules:
        raise RuntimeError("sanitized: fastdistil is imported already")
    # An editable install has a finder that comes before the path.
    sys.meta_path[:] = [x for x in sys.meta_path if "ScikitBuild" not in type(x).__name__]
    sys.path.insert(0, folder)
    import fastdistil._C

    if not str(fastdistil._C.__file__).startswith(folder):
        raise RuntimeError(f"sanitized: {fastdistil._C.__file__} was imported, expected the one in {folder}")
