"""DeepSpeed's own tests with Shampoo in Adam's place: `python -m benchmarks.deepspeed_suite --checkout DIR`.

Each test's outcome is kept in the results folder, so that a call that was stopped goes on. A test that fails is run
again with Adam itself. The exit code is 1 where a test failed by our fault, or a refusal that the list expects did not
come.
"""

from __future__ import annotations

import argparse
import json
import signal
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from benchmarks.deepspeed_suite.checkout import CheckoutError, check_version, copy_tests, installed_version
from benchmarks.deepspeed_suite.journal import Journal, JournalError
from benchmarks.deepspeed_suite.outcome import LIST, Kind, Record, Suite, classify, read_suite
from benchmarks.deepspeed_suite.runner import RunError, Runner
from benchmarks.deepspeed_suite.stand_in import SETTINGS
from benchmarks.deepspeed_suite.summary import failed, judge, to_json, to_text


def main(arguments: Sequence[str] | None = None) -> int:
    args = parse_arguments(arguments)
    try:
        version = check_version(args.checkout, args.accept_version)
        suite = read_suite(args.list)
        run = {"installed": installed_version(), "checkout": version, "ranks": args.ranks, "settings": SETTINGS}
        journal = Journal(args.results, run)
        runner = Runner(copy_tests(args.checkout, args.results), args.results, args.ranks, args.timeout)
        files = args.files or _present(suite.files, runner.tests)
        selected, uncollected = runner.collect(files, args.select)
        left = _left(selected, journal, suite, args.again)
        print(f"{len(selected)} tests selected, {len(left)} to run", flush=True)
        if not args.report:
            carry_out(runner, journal, suite, left[: args.limit], args.jobs)
    except (CheckoutError, JournalError, RunError, ValueError) as error:
        sys.exit(f"deepspeed_suite: error: {error}")
    verdicts = judge([journal.records[test] for test in selected if test in journal.records], suite)
    versions = f"tests of {version} on DeepSpeed {installed_version()}"
    print(to_text(verdicts, len(selected), uncollected, versions))
    if args.json is not None:
        content = to_json(verdicts, len(selected), uncollected, versions)
        args.json.write_text(json.dumps(content, indent=1) + "\n")
    return int(failed(verdicts))


def carry_out(runner: Runner, journal: Journal, suite: Suite, tests: Sequence[str], jobs: int) -> None:
    """Runs tests with Shampoo, then those that failed unexpectedly with Adam, and keeps what they came to."""

    def keep(record: Record) -> None:
        journal.add(record)
        kind = classify(record, suite.expectation(record.test))
        print(f"{kind.value:>20} {record.seconds:6.1f} s  {record.test}", flush=True)

    runner.run(tests, jobs, keep)
    unexplained = [
        record.test
        for record in journal.records.values()
        if record.with_adam is None and classify(record, suite.expectation(record.test)) is Kind.FAILED
    ]

    def compare(record: Record) -> None:
        keep(replace(journal.records[record.test], with_adam=record.end))

    runner.run(unexplained, jobs, compare, optimizer="adam")


def _present(files: Sequence[str], tests: Path) -> list[str]:
    """The list's files that a checkout has.

    Raises:
        CheckoutError: naming those that it lacks, so that a renamed file is not left out in silence.
    """
    lacking = [file for file in files if not (tests / file).exists()]
    if lacking:
        raise CheckoutError(f"--checkout: has no tests/{', tests/'.join(lacking)}; mend the list of files")
    return list(files)


def _left(selected: Sequence[str], journal: Journal, suite: Suite, again: Sequence[str]) -> list[str]:
    """The tests without a record, and those whose record is to be taken again."""
    wanted = {kind for kind in Kind if kind.name.lower().replace("_", "-") in again}
    kept = {test for test, record in journal.records.items() if classify(record, suite.expectation(test)) not in wanted}
    return [test for test in selected if test not in kept]


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    kinds = [kind.name.lower().replace("_", "-") for kind in Kind]
    parser = argparse.ArgumentParser(prog="python -m benchmarks.deepspeed_suite", description=__doc__.splitlines()[0])
    parser.add_argument("--checkout", type=Path, required=True, help="a checkout of DeepSpeed's repository")
    parser.add_argument("--accept-version", metavar="VERSION", help="a checkout's version beside the installed one")
    parser.add_argument("--files", nargs="+", metavar="FILE", help="below the checkout's tests/; default: the list's")
    parser.add_argument("-k", "--select", metavar="EXPRESSION", help="as pytest's -k")
    parser.add_argument("--list", type=Path, default=LIST, help="files and expected outcomes; default: beside this")
    parser.add_argument("--jobs", type=int, default=1, help="tests that run side by side; default: %(default)s")
    parser.add_argument("--ranks", type=int, default=2, help="of a test at most; default: %(default)s")
    parser.add_argument("--timeout", type=float, default=180.0, help="of a test, in seconds; default: %(default)s")
    parser.add_argument("--limit", type=int, metavar="N", help="run N of the tests that are left")
    parser.add_argument("--again", nargs="+", choices=kinds, default=[], help="run those with these outcomes again")
    parser.add_argument("--report", action="store_true", help="run nothing: the table of what is there")
    parser.add_argument("--results", type=Path, default=Path("runs/deepspeed_suite"), help="default: %(default)s")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the outcomes there too")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # what is running is ended, and what is done is kept
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit("deepspeed_suite: stopped; the same call goes on")
