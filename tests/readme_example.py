"""Prints the first Python block of a Markdown file: the README's example, for `make wheel-test` to run."""

from __future__ import annotations

import re
import sys
from pathlib import Path


def first_python_block(markdown: str) -> str:
    """The first fenced block marked `python`; LookupError where there is none."""
    block = re.search(r"^```python\n(.*?)^```", markdown, re.DOTALL | re.MULTILINE)
    if not block:
        raise LookupError("no ```python block")
    return block[1]


if __name__ == "__main__":
    print(first_python_block(Path(sys.argv[1]).read_text()), end="")
