"""`evaluate` with an engine that needs no model: what is written, resumed, refused, and reported."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from lethe_compile.errors import InputError
from lethe_compile.evaluation import Evaluation, Progress, evaluate, make_cells
from lethe_compile.evaluation.journal import RESULTS, Journal
from lethe_compile.evaluation.run import plan
from tests.evaluation.stub import PROBLEMS, Make

CELLS = make_cells(["full", "lethe"], budgets=[128, 256], batches=[4])
FACTS = {"model": "stub", "seed": 0}
ROOT = Path(__file__).parents[2]


def run(folder: Path, make: Make | None = None, **options: Any) -> Evaluation:
    return evaluate(make or Make(), CELLS, PROBLEMS, folder, FACTS, **options)


def lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / RESULTS).read_text().splitlines()]


def test_all_problems_of_all_cells(tmp_path: Path) -> None:
    heard: list[Progress] = []
    done = run(tmp_path, progress=heard.append)
    assert done.complete and not done.failures
    assert len(lines(tmp_path)) == len(CELLS) * len(PROBLEMS)
    assert [one.done for one in heard] == list(range(0, 37, 4)) and heard[-1].wanted == 36
    assert [cell.problems for cell in done.figures.cells] == [12, 12, 12]
    assert set(done.timelines) == {cell.id for cell in CELLS}


def test_batches_put_long_problems_first_and_together() -> None:
    jobs = plan(CELLS[:1], PROBLEMS, {})
    assert [[p.expected_tokens for p in job.problems] for job in jobs] == [[12, 11, 10, 9], [8, 7, 6, 5], [4, 3, 2, 1]]


def test_a_run_goes_on_where_it_was_cut(tmp_path: Path) -> None:
    whole = run(tmp_path / "whole").figures
    run(tmp_path / "cut")
    file = tmp_path / "cut" / RESULTS
    kept = file.read_text().splitlines(keepends=True)
    file.write_text("".join(kept[:10]) + kept[10][:25])  # killed within a line, in the middle of the third batch
    heard: list[Progress] = []
    again = run(tmp_path / "cut", progress=heard.append)
    assert again.complete and again.figures == whole
    assert len(heard) == 1 + 7, "two whole batches of four were there"
    assert run(tmp_path / "cut", progress=lambda _: pytest.fail("nothing was left to do")).figures == whole


def test_a_broken_line_elsewhere_is_an_error_with_its_number(tmp_path: Path) -> None:
    run(tmp_path)
    file = tmp_path / RESULTS
    kept = file.read_text().splitlines(keepends=True)
    file.write_text("".join([kept[0], "{}\n", *kept[2:]]))
    with pytest.raises(InputError, match="line 2: not a result"):
        run(tmp_path)


def test_other_settings_are_refused_and_more_cells_are_not(tmp_path: Path) -> None:
    run(tmp_path)
    with pytest.raises(InputError, match=r"another run with another seed|another seed \(0, now 1\)"):
        evaluate(Make(), CELLS, PROBLEMS, tmp_path, {**FACTS, "seed": 1})
    more = make_cells(["lethe:score=sum"], budgets=[128], batches=[4])
    assert len(evaluate(Make(), [*CELLS, *more], PROBLEMS, tmp_path, FACTS).figures.cells) == 4
    (tmp_path / "run.json").unlink()
    with pytest.raises(InputError, match="does not say of what"):
        run(tmp_path)


def test_two_runs_do_not_write_to_one_directory(tmp_path: Path) -> None:
    with Journal(tmp_path, FACTS, {}), pytest.raises(InputError, match="another process writes to"):
        run(tmp_path)


def test_a_failing_batch_is_named_and_tried_again(tmp_path: Path) -> None:
    done = run(tmp_path, Make(broken="stub/5"))
    assert not done.complete and len(done.failures) == 3
    assert str(done.failures[0]) == "full batch=4, stub/7 and 3 more of its batch: ValueError: no such token"
    assert "stub.py" in done.failures[0].details
    assert len(lines(tmp_path)) == 24
    assert run(tmp_path).complete


def test_the_time_limit_ends_a_run_cleanly(tmp_path: Path) -> None:
    done = run(tmp_path, Make(seconds=0.3), time_limit=0.5)
    assert not done.complete and not done.failures
    assert len(lines(tmp_path)) == 4, "the batch under way is given up"
    assert run(tmp_path).complete


@pytest.mark.parametrize(("cells", "problems"), [([], PROBLEMS), (CELLS, []), (CELLS, PROBLEMS + PROBLEMS)])
def test_nothing_and_the_same_twice_are_refused(cells: Any, problems: Any, tmp_path: Path) -> None:
    with pytest.raises(InputError):
        evaluate(Make(), cells, problems, tmp_path, FACTS)


def test_a_cell_of_two_groups_runs_once(tmp_path: Path) -> None:
    cells = make_cells(["lethe", {"policy": "lethe", "group": "again", "label": "same"}], budgets=[128], batches=[12])
    heard: list[Progress] = []
    done = evaluate(Make(), cells, PROBLEMS, tmp_path, FACTS, progress=heard.append)
    assert [(cell.curve, cell.problems) for cell in done.figures.cells] == [("lethe", 12), ("same", 12)]
    assert len(heard) == 1 + 1 and heard[0].wanted == 12 and done.complete


@pytest.mark.slow
def test_worker_processes(tmp_path: Path) -> None:
    """Each of two workers is killed by what it runs, and each batch so lost is named; the rest is kept."""
    done = run(tmp_path, Make(deadly="stub/5"), processes=2)
    assert not done.complete
    assert "stub/7 and 3 more of its batch: its worker process ended (killed by signal 9)" in str(done.failures[0])
    assert len(done.failures) == 2, "the second worker died of another cell's batch, and nobody was left"
    assert 0 < len(lines(tmp_path)) < 36
    assert run(tmp_path).complete
    assert len(lines(tmp_path)) == 36


@pytest.mark.slow
def test_workers_that_cannot_start_say_why(tmp_path: Path) -> None:
    done = run(tmp_path, Make(unmade=True), processes=2)
    assert {str(failed) for failed in done.failures} == {"a worker could not start: RuntimeError: no weights"}
    assert not done.complete


def test_kill_9_loses_no_finished_batch(tmp_path: Path) -> None:
    code = (
        "from pathlib import Path\nfrom tests.evaluation.test_run import run, Make\n"
        f"run(Path({str(tmp_path)!r}), Make(seconds=0.2))"
    )
    process = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT)
    file = tmp_path / RESULTS
    while process.poll() is None and not (file.exists() and len(file.read_text().splitlines()) >= 8):
        time.sleep(0.05)
    os.kill(process.pid, signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL, "it was killed before it was done"
    before = lines(tmp_path)
    assert 8 <= len(before) < 36
    assert run(tmp_path).complete
    assert lines(tmp_path)[: len(before)] == before and len(lines(tmp_path)) == 36
