"""The script that runs DeepSpeed's tests: its list, its verdicts, and a checkout of a few tests made here."""

from __future__ import annotations

import ast
import json
from pathlib import Path

import deepspeed
import pytest

import benchmarks.deepspeed_suite.__main__ as script
from benchmarks.deepspeed_suite.checkout import CheckoutError, check_version, installed_version
from benchmarks.deepspeed_suite.journal import Journal, JournalError
from benchmarks.deepspeed_suite.outcome import Expected, Kind, Record, Suite, classify, merge, read_suite
from benchmarks.deepspeed_suite.summary import failed, judge, to_text

ROOT = Path(__file__).resolve().parents[2]
TEST = "unit/zero/test_it.py::TestIt::test_step[2-True]"
REFUSAL, DIFFERENCE = Expected(TEST, says="NVMe"), Expected(TEST, why="counts Adam's launches")
TRAINED = {"asked": True, "built": True, "stepped": True}

COMMON = '''
"""Ranks as DeepSpeed's own unit.common starts them: in processes that get the test object pickled."""
import os
import torch.multiprocessing as mp
import deepspeed


class DistributedExec:
    def __call__(self, request):
        self._current_test = getattr(self, request.function.__name__)
        self.start(request)

    def start(self, request):
        mp.set_start_method("forkserver", force=True)
        with mp.Pool(1) as pool:
            pool.starmap(self._dist_run, [(str(request.getfixturevalue("tmpdir") / "store"),)])

    def _dist_run(self, store):
        os.environ.update(LOCAL_RANK="0", RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT="0")
        deepspeed.init_distributed("gloo", init_method=f"file://{store}", rank=0, world_size=1)
        self.run()

    def run(self):
        self._current_test()


class DistributedTest(DistributedExec):
    is_dist_test = True


class DistributedFixture(DistributedExec):
    is_dist_fixture = True

    def __call__(self, request):
        self._current_test = self.run_beforehand
        self.start(request)
'''

CONFTEST = """
import sys
from pathlib import Path
import pytest

sys.path.insert(1, str(Path(__file__).parents[1]))


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_call(item):
    if getattr(item.cls, "is_dist_test", False):
        item.cls()(item._request)
        item.runtest = lambda: True


@pytest.hookimpl(tryfirst=True)
def pytest_fixture_setup(fixturedef, request):
    if getattr(fixturedef.func, "is_dist_fixture", False):
        fixturedef.func()(request)
"""

TESTS = """
import os
import deepspeed
import torch
from unit.common import DistributedFixture, DistributedTest


def engine_with(optimizer=None, **config):
    model = torch.nn.Linear(12, 6)
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "optimizer": {"type": "AdamW", "params": {"lr": 0.01, "torch_adam": True}},
        **config,
    }
    if optimizer is not None:
        del config["optimizer"]
        optimizer = optimizer(model.parameters(), lr=0.02)
    parameters = None if optimizer else model.parameters()
    return deepspeed.initialize(model=model, model_parameters=parameters, config=config, optimizer=optimizer)[0]


def train(engine):
    for _ in range(3):
        engine.backward(engine(torch.ones(1, 12)).sum())
        engine.step()


class trained_beforehand(DistributedFixture):
    def run_beforehand(self):
        train(engine_with())


def test_after_training(trained_beforehand):
    assert trained_beforehand is not None


class TestFake(DistributedTest):
    def test_trains(self):
        engine = engine_with(zero_optimization={"stage": 2})
        train(engine)
        assert engine.get_lr() == [0.01]
        assert "fake" not in deepspeed.__file__

    def test_trains_with_an_object(self):
        engine = engine_with(torch.optim.Adam)
        train(engine)
        assert engine.get_lr() == [0.02]

    def test_is_refused(self):
        engine_with(zero_optimization={"stage": 1, "elastic_checkpoint": True})

    def test_asks_for_adam(self):
        assert type(engine_with().basic_optimizer) is torch.optim.AdamW

    def test_fails_by_itself(self):
        train(engine_with())
        raise RuntimeError("as it would anyway")

    def test_builds_nothing(self):
        raise RuntimeError("this machine lacks something")


def test_dies():
    os._exit(3)


def test_skips():
    import pytest

    pytest.skip("not here")
"""


def record(end: str, **facts: object) -> Record:
    return Record(TEST, end, **facts)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("seen", "expected", "kind"),
    [
        (record("passed", **TRAINED), None, Kind.PASSED),
        (record("passed", asked=True), None, Kind.UNCONCERNED),  # no engine ever had Shampoo
        (record("passed"), None, Kind.UNCONCERNED),
        (record("failed", text="no such device"), None, Kind.UNCONCERNED),
        (record("skipped", **TRAINED), REFUSAL, Kind.SKIPPED),
        (record("failed", **TRAINED), None, Kind.FAILED),
        (record("failed", asked=True), None, Kind.FAILED),
        (record("timed out", **TRAINED), None, Kind.FAILED),
        (record("died", **TRAINED, with_adam="passed"), None, Kind.FAILED),
        (record("failed", **TRAINED, with_adam="failed"), None, Kind.ADAM_TOO),
        (record("failed", **TRAINED, with_adam="skipped"), None, Kind.FAILED),
        (record("failed", asked=True, refusals=("no NVMe here",)), REFUSAL, Kind.REFUSED),
        (record("timed out", asked=True, refusals=("no NVMe here",)), REFUSAL, Kind.REFUSED),
        (record("failed", **TRAINED, text="SettingsError: NVMe"), REFUSAL, Kind.REFUSED),
        (record("failed", asked=True, refusals=("something else",)), REFUSAL, Kind.FAILED),
        (record("passed", **TRAINED), REFUSAL, Kind.NOT_REFUSED),
        (record("failed", **TRAINED, with_adam="passed"), DIFFERENCE, Kind.DIFFERENT),
        (record("passed", **TRAINED), DIFFERENCE, Kind.PASSED),
    ],
)
def test_what_an_end_means(seen: Record, expected: Expected | None, kind: Kind) -> None:
    assert classify(seen, expected) is kind


def test_only_failures_and_refusals_that_did_not_come_count() -> None:
    suite = Suite((), (Expected("a", says="NVMe"), Expected("b", why="Adam's")))
    ends = {"a": "passed", "b": "failed", "c": "failed", "d": "skipped", "e": "passed"}
    verdicts = judge([Record(test, end, **TRAINED) for test, end in ends.items()], suite)
    assert [failed([verdict]) for verdict in verdicts] == [True, False, True, False, False]
    shown = to_text(verdicts, 7, {"f": "E   ImportError: no transformers"}, "here")
    assert "5 of 7 run" in shown
    assert "f: ImportError: no transformers" in shown


@pytest.mark.parametrize(
    ("pattern", "test", "means"),
    [
        ("unit/a.py::test", "unit/a.py::test", True),
        ("unit/a.py::test", "unit/a.py::test[1-x]", True),
        ("unit/a.py::test", "unit/a.py::test_other", False),
        ("unit/a.py::test[1-*]", "unit/a.py::test[1-x]", True),
        ("unit/a.py::test[1-*]", "unit/a.py::test[2-x]", False),
        ("unit/a.py::Test[?]", "unit/a.py::Test1", False),
    ],
)
def test_what_an_entry_means(pattern: str, test: str, means: bool) -> None:
    assert Expected(pattern, why="a reason").means(test) is means


def test_an_entry_is_a_refusal_or_a_difference() -> None:
    for wrong in ({}, {"says": "a", "why": "b"}):
        with pytest.raises(ValueError, match="either 'says'"):
            Expected("unit/a.py::test", **wrong)


def test_the_list_agrees_with_itself_and_with_our_messages() -> None:
    suite = read_suite()
    assert len(set(suite.files)) == len(suite.files)
    patterns = [entry.test for entry in suite.expected]
    assert len(set(patterns)) == len(patterns)
    for entry in suite.expected:
        assert entry.test.partition("::")[0] in suite.files, entry
        assert suite.expectation(entry.test) is entry, f"{entry}: an earlier entry means the same tests"
    ours = [text for file in (ROOT / "ds_shampoo").rglob("*.py") for text in strings_of(file)]
    for says in {entry.says for entry in suite.expected if entry.says}:
        assert any(says in text for text in ours), f"no message of ours says {says!r}"


def strings_of(file: Path) -> list[str]:
    nodes = ast.walk(ast.parse(file.read_text()))
    return [node.value for node in nodes if isinstance(node, ast.Constant) and isinstance(node.value, str)]


def test_notes_of_several_processes_make_one_record() -> None:
    notes = [
        {"test": "a", "event": "begun"},
        {"test": "a", "event": "asked"},
        {"test": "a", "event": "refused", "message": "no"},
        {"test": "b", "event": "begun"},
        {"test": "a", "event": "raised", "rank": "0", "text": "SettingsError: no"},
        {"test": "a", "event": "refused", "message": "no"},
        {"test": "a", "event": "ended", "outcome": "timed out", "text": "after 9 s", "seconds": 9.0},
    ]
    (found,) = merge(notes)  # b is under way
    assert (found.end, found.asked, found.built, found.refusals) == ("timed out", True, False, ("no",))
    assert "SettingsError: no" in found.text


def test_a_checkout_of_another_release_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckoutError, match=r"has no version\.txt"):
        check_version(tmp_path)
    fake_checkout(tmp_path, "0.1.2")
    with pytest.raises(CheckoutError, match=rf"of DeepSpeed 0\.1\.2, but {installed_version()} is installed"):
        check_version(tmp_path)
    with pytest.raises(CheckoutError):
        check_version(tmp_path, accepted="0.1.3")
    assert check_version(tmp_path, accepted="0.1.2") == "0.1.2"
    fake_checkout(tmp_path, str(deepspeed.__version__))
    assert check_version(tmp_path) == installed_version()


def test_records_are_kept_for_the_run_they_belong_to(tmp_path: Path) -> None:
    journal = Journal(tmp_path, {"checkout": "1.0"})
    journal.add(Record("a", "failed", refusals=("no",)))
    journal.add(Record("a", "passed", **TRAINED))
    again = Journal(tmp_path, {"checkout": "1.0"})
    assert again.records == {"a": Record("a", "passed", **TRAINED)}
    assert again.lacking(["b", "a"]) == ["b"]
    with pytest.raises(JournalError, match=r"checkout = '1\.0', not '1\.1'"):
        Journal(tmp_path, {"checkout": "1.1"})


def test_a_run_of_a_checkout_made_here(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    checkout = tmp_path / "fake"
    fake_checkout(checkout, installed_version())
    names = ["trains", "trains_with_an_object", "is_refused", "asks_for_adam", "fails_by_itself", "builds_nothing"]
    ids = {name: f"unit/test_fake.py::TestFake::test_{name}" for name in names}
    expected = [
        {"test": ids["is_refused"], "says": "elastic_checkpoint = true"},
        {"test": ids["trains_with_an_object"], "why": "nothing: it passes"},
    ]
    listed = tmp_path / "list.json"
    files = ["unit/test_fake.py", "unit/test_lacking.py", "unit/test_skipped_as_a_whole.py"]
    listed.write_text(json.dumps({"files": files, "expected": expected}))
    arguments = ["--checkout", str(checkout), "--list", str(listed), "--ranks", "1"]
    arguments += ["--results", str(tmp_path / "results"), "--json", str(tmp_path / "found.json")]
    assert script.main(arguments) == 1
    found = json.loads((tmp_path / "found.json").read_text())
    outcomes = {test["test"].rpartition("test_")[2]: test["outcome"] for test in found["tests"]}
    assert outcomes == {
        "trains": "passed",
        "trains_with_an_object": "passed",
        "is_refused": "expected refusal",
        "asks_for_adam": "FAILED",
        "fails_by_itself": "fails with Adam too",
        "builds_nothing": "not concerned",
        "after_training": "passed",
        "dies": "not concerned",
        "skips": "skipped by DeepSpeed",
    }
    assert {test["test"].rpartition("test_")[2] for test in found["tests"] if test["stepped"]} == {
        "trains",
        "trains_with_an_object",
        "fails_by_itself",
        "after_training",
    }
    shown = capfd.readouterr().out
    assert "passed, though listed as a difference" in shown
    assert "test_lacking.py: ModuleNotFoundError: No module named 'a_module_that_is_not_here'" in shown

    listed.write_text(
        json.dumps(
            {"files": ["unit/test_fake.py"], "expected": [*expected, {"test": ids["asks_for_adam"], "why": "!"}]}
        )
    )
    assert script.main(arguments) == 0
    assert "9 tests selected, 0 to run" in capfd.readouterr().out


def fake_checkout(folder: Path, version: str) -> None:
    unit = folder / "tests" / "unit"
    unit.mkdir(parents=True, exist_ok=True)
    (folder / "deepspeed").mkdir(exist_ok=True)
    (folder / "deepspeed" / "__init__.py").write_text(
        "raise ImportError('the checkout instead of the installed one')\n"
    )
    (folder / "version.txt").write_text(f"{version}\n")
    (folder / "tests" / "conftest.py").write_text(CONFTEST)
    (folder / "tests" / "pytest.ini").write_text("[pytest]\n")
    (unit / "__init__.py").write_text("")
    (unit / "common.py").write_text(COMMON)
    (unit / "test_fake.py").write_text(TESTS)
    (unit / "test_lacking.py").write_text("import a_module_that_is_not_here\n")
    skipped = 'import pytest\npytest.skip("the whole module", allow_module_level=True)\n'
    (unit / "test_skipped_as_a_whole.py").write_text(skipped)
