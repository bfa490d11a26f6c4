"""Where a page's files lie while it runs."""

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

VARIABLE = "GRADIO_TEMP_DIR"


@contextmanager
def scratch_folder() -> Iterator[Path]:
    """A folder for uploads and downloads of a page, Gradio's own among them, that is removed at the end."""
    before = os.environ.get(VARIABLE)
    with tempfile.TemporaryDirectory(prefix="atlas-app-", ignore_cleanup_errors=True) as folder:
        os.environ[VARIABLE] = folder
        try:
            yield Path(folder)
        finally:
            if before is None:
                del os.environ[VARIABLE]
            else:
                os.environ[VARIABLE] = before


def new_folder() -> Path:
    """An empty folder inside the page's own."""
    return Path(tempfile.mkdtemp(dir=os.environ.get(VARIABLE)))
