"""`lethe bench`: arithmetic by hand, the CPU section for real, and failures that end up in their rows."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console, RenderableType

from lethe_compile.api import optimize
from lethe_compile.config import LetheConfig
from lethe_compile.errors import InputError
from lethe_compile.tools import (
    _bench_bar,
    _bench_generate,
    _bench_kernels,
    _bench_memory,
    _bench_sessions,
    _bench_steps,
    _bench_tables,
    bench,
)
from lethe_compile.tools._bench_base import (
    Bench,
    Row,
    Run,
    integrate,
    interleave,
    roofline,
    split_rounds,
)
from lethe_compile.tools._bench_shapes import Subject, load

CPU = torch.device("cpu")
TOY = "--shapes toy --batches 2 --lengths 96 --repeats 1 --steps 4 --max-tokens 64 --new-tokens 96 --page-sizes 8"


def toy_bench(more: str = "--contestants dynamic,unpruned,lethe") -> Bench:
    options = bench._options(bench._parser().parse_args([*TOY.split(), *more.split()]))
    return Bench(options, CPU, {"copy": 2e10, "read": 1e10})


def printed(table: RenderableType, width: int) -> list[str]:
    console = Console(file=io.StringIO(), width=width, force_terminal=False)
    console.print(table)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue().splitlines()


# --------------------------------------------------------------------------------------------------------- arithmetic


def test_roofline() -> None:
    assert roofline(16_000_000_000, 17_179_869_184, 4.41e12) == pytest.approx(7.5237e-3, rel=1e-4)


def test_what_a_step_reads_of_a_known_model() -> None:
    toy = load("toy", CPU)  # hidden 64, 4 heads of 16, 2 KV heads, MLP 96, vocabulary 97, fp32
    layer = 64 * 64 * 2 + 64 * 32 * 2 + 3 * 64 * 96 + 2 * 64
    assert toy.weight_bytes == 4 * (2 * layer + 64 + 97 * 64), "the input embedding is not read whole"
    assert toy.kv_bytes_per_token == 2 * 2 * 2 * 16 * 4


def test_tied_embeddings_are_read_once() -> None:
    model: Any = load("toy", CPU).model
    model.set_input_embeddings(torch.nn.Embedding(97, 64))
    model.lm_head.weight = model.get_input_embeddings().weight
    assert Subject.of("tied", model).weight_bytes == sum(p.nbytes for p in model.parameters())


def test_layers_can_be_overridden() -> None:
    assert load("toy", CPU, layers=1).layers == 1
    with pytest.raises(InputError, match="no shape is called 'big'"):
        load("big", CPU)


@pytest.mark.parametrize(
    ("points", "start", "end", "seconds"),
    [
        ([(100, 2.0)], 0, 50, 100.0),  # one point stands for all
        ([(0, 1.0), (10, 3.0)], 0, 10, 20.0),
        ([(10, 3.0), (0, 1.0)], 0, 10, 20.0),  # in any order
        ([(2, 2.0), (4, 4.0)], 0, 6, 18.0),  # extended on both sides: the line y = x
        ([(0, 1.0), (10, 1.0), (20, 3.0)], 5, 20, 5.0 + 20.0),
    ],
)
def test_integration(points: list[tuple[int, float]], start: int, end: int, seconds: float) -> None:
    assert integrate(points, start, end) == pytest.approx(seconds)


def test_nothing_to_integrate() -> None:
    with pytest.raises(ValueError, match="nothing to integrate"):
        integrate([], 0, 1)


def test_rounds_are_told_from_steps() -> None:
    times = split_rounds([2.0, 2.0, 8.0, 2.0] * 5, 4)
    assert (times.step, times.round, times.amortised) == (2.0, 6.0, 3.5)
    assert times.share == pytest.approx(1.5 / 3.5)
    assert split_rounds([1.0, 3.0, 2.0], 0).amortised == 2.0
    with pytest.raises(ValueError, match="do not show what rounds"):
        split_rounds([1.0] * 7, 4)


def test_contestants_take_turns() -> None:
    order: list[str] = []
    runs = {name: Run(lambda name=name: order.append(name), calls=2) for name in "ab"}  # type: ignore[misc]
    seconds = interleave(runs, repeats=2, device=CPU, warmup=1)
    assert order == list("ababab")
    assert all(0 < value < 0.1 for value in seconds.values())


# ----------------------------------------------------------------------------------------------------- filling a cache


def test_a_filled_cache_is_where_a_generation_would_be() -> None:
    fast = optimize(load("toy", CPU).model, LetheConfig(max_tokens=64))
    with _bench_sessions.ours(fast, 2, 100, 70, pruned=True) as session, torch.no_grad():
        mass, position, length = fast.cache.scores()
        assert length.tolist() == [[56, 56]] * 2 and position.shape == (2, 2, 56)
        assert position[1, 0].tolist() == [0, 1, 2, 3, *range(48, 100)]
        assert bool((mass > 0).all())
        tokens = torch.zeros(2, dtype=torch.int64)
        for _ in range(66):
            tokens = session.step(tokens)
        assert fast.session.next_position.tolist() == [166, 166]
        assert session.retained() <= 64 and session.kv_bytes() > 0
    fast.generate(torch.ones(1, 4, dtype=torch.int64), max_new_tokens=2)  # it is free for the next


# ----------------------------------------------------------------------------------------------------------- sections


@pytest.mark.slow
def test_steps_of_a_toy() -> None:
    rows = _bench_steps.run(toy_bench())
    assert [row["contestant"] for row in rows] == ["dynamic", "unpruned", "lethe"]
    for row in rows:
        assert "error" not in row, row
        assert row["tokens_per_s"] == pytest.approx(2e3 / row["ms"])
        assert row["of_roofline"] == pytest.approx(row["step_ms"] / row["roofline_ms"])
    dynamic, full, lethe = rows
    assert full["retained"] > 96 and lethe["retained"] <= 64
    assert lethe["kv_bytes"] < full["kv_bytes"] and lethe["roofline_ms"] < full["roofline_ms"]
    assert dynamic["kv_bytes"] == 2 * (96 + 4 + 4) * load("toy", CPU).kv_bytes_per_token


@pytest.mark.slow
def test_a_failing_contestant_becomes_a_row_with_its_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    @contextmanager
    def broken(*_: Any, **__: Any) -> Iterator[None]:
        raise RuntimeError("out of memory\nand a long trace")
        yield

    monkeypatch.setattr(_bench_sessions, "dynamic", broken)
    rows = _bench_steps.run(toy_bench())
    assert rows[0]["error"] == "RuntimeError: out of memory" and "ms" not in rows[0]
    assert all("ms" in row for row in rows[1:])
    text = "\n".join(printed(_bench_tables.section("steps", rows), 80))
    assert "[1]" in text and "RuntimeError: out of memory" in text


def test_a_shape_that_cannot_be_optimized_keeps_its_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise InputError("no")

    monkeypatch.setattr(_bench_steps, "optimize", refuse)
    rows = _bench_steps.run(toy_bench())
    assert [row["error"] for row in rows] == ["InputError: no"] * 3


@pytest.mark.slow
def test_after_the_time_limit_rows_say_so() -> None:
    late = toy_bench("--time-limit 1")
    late.deadline = 0.0
    assert {row["error"] for row in _bench_steps.run(late)} == {"not run: the time limit of 1 s was reached"}


@pytest.mark.slow
def test_kernels_side_by_side(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_bench_kernels, "_flex", lambda *_: (_ for _ in ()).throw(RuntimeError("no compiler")))
    shape = _bench_kernels.Decode(2, 64, 4, 2, 16)
    rows = {row["contestant"]: row for row in _bench_kernels.run(toy_bench(), (shape,))}
    assert shape.kv_bytes() == 2 * 2 * 64 * 2 * 16 * 2 and shape.group == 2
    for name in (_bench_kernels.OURS, _bench_kernels.OURS_BARE, _bench_kernels.SDPA):
        row = rows[name]
        assert row["of_copy"] == pytest.approx(row["kv_bytes"] / (row["us"] * 1e-6) / 2e10)
    assert rows[_bench_kernels.FLEX]["error"] == "RuntimeError: no compiler"
    assert rows[_bench_kernels.SDPA]["variant"] in ("enable_gqa", "query group folded")


@pytest.mark.slow
def test_generate_integrates_others_and_runs_lethe() -> None:
    rows = _bench_generate.run(toy_bench())
    assert [row["how"] for row in rows] == ["integrated from 2 lengths", "integrated from 2 lengths", "measured"]
    assert rows[1]["kv_bytes"] > rows[2]["kv_bytes"]
    assert rows[2]["tokens_per_s"] == pytest.approx(2 * 96 / rows[2]["seconds"])


def test_memory_counts_whole_pages_and_stays_within_them() -> None:
    page = 8 * load("toy", CPU).kv_bytes_per_token + 2 * 8 * 8  # of both layers: keys, values, position and mass
    full, lethe = _bench_memory.run(toy_bench(), budget=130 * page, new_tokens=200)
    assert full["sequences"] == 130 // 33, "264 tokens"
    assert lethe["sequences"] == 130 // 8, "64 tokens"
    assert lethe["within_budget"] and 32 <= lethe["retained"] <= 64


# ------------------------------------------------------------------------------------------------------------ the bar


def sample_sections() -> dict[str, list[Row]]:
    kernel = {"rows": 16, "tokens": 8192, "heads": 32, "kv_heads": 8, "group": 4, "page": 16, "kv_bytes": 1 << 29}
    other = {**kernel, "rows": 64, "tokens": 4096}
    step = {"shape": "llama-8b", "batch": 16, "length": 8192}
    return {
        "kernels": [
            {**kernel, "contestant": _bench_kernels.OURS, "us": 105.0, "of_copy": 0.95},
            {**kernel, "contestant": _bench_kernels.SDPA, "page": None, "us": 100.0, "of_copy": 0.99},
            {**other, "contestant": _bench_kernels.OURS, "us": 220.0, "of_copy": 0.91},
            {**other, "contestant": _bench_kernels.SDPA, "page": None, "us": 200.0, "of_copy": 0.99},
        ],
        "steps": [
            {**step, "contestant": "unpruned", "of_roofline": 1.2, "retained": 8272.0},
            {**step, "contestant": "lethe", "error": "RuntimeError: no"},
        ],
        "generate": [
            {"contestant": "dynamic", "tokens_per_s": 100.0, "kv_bytes": 50},
            {"contestant": "unpruned", "tokens_per_s": 1000.0, "kv_bytes": 50},
            {"contestant": "lethe", "tokens_per_s": 2500.0, "kv_bytes": 2, "rounds_share": 0.01, "round_ms": 3.0},
        ],
    }


def test_the_bar_takes_the_worst_and_leaves_out_what_was_not_measured() -> None:
    figures = {row["figure"]: row for row in _bench_bar.bar(sample_sections(), page=16)}
    bandwidth = figures["attention with mass, of copy bandwidth"]
    assert (bandwidth["measured"], bandwidth["met"]) == (0.91, True) and "64×4096" in bandwidth["note"]
    sdpa = figures["its time : torch flash SDPA, G=4"]
    assert sdpa["measured"] == pytest.approx(1.1) and sdpa["met"] is False
    assert figures["its time : torch flash SDPA, G=8"]["met"] is None
    assert figures["8B step, all of ~8k tokens : roofline"]["met"] is True
    assert figures["8B step, ~1k retained : roofline"]["met"] is None, "its row failed"
    assert figures["tok/s : ours unpruned"]["met"] is False and figures["tok/s : HF DynamicCache"]["met"] is True
    assert figures["KV memory, ours unpruned : Lethe"]["measured"] == 25
    assert figures["rounds, of decode time"]["met"] is True


@pytest.mark.parametrize("width", [80, 120])
def test_tables_fit(width: int) -> None:
    step = {"shape": "llama-8b", "batch": 16, "length": 32768, "ms": 123.456, "tokens_per_s": 12345.6}
    step |= {"roofline_ms": 12.34, "of_roofline": 11.23, "round_ms": 12.3, "kv_bytes": 60 << 30, "peak_bytes": 70 << 30}
    steps = [{**step, "contestant": name} for name in _bench_sessions.LABELS]
    steps[1] = {"shape": "llama-8b", "batch": 16, "length": 32768, "contestant": "static", "error": "E: why"}
    lines = printed(_bench_tables.section("steps", steps), width)
    assert max(map(len, lines)) <= width and not any("…" in line for line in lines)
    (row,) = [line for line in lines if "ours, Lethe" in line]
    assert " ".join(row.split()) == "16×32768 ours, Lethe 123.46 12,346 12.34 11.23 60 70.0 12.3"
    assert "[1] E: why" in lines
    for table in (
        _bench_tables.section("kernels", sample_sections()["kernels"]),
        _bench_tables.bar(_bench_bar.bar(sample_sections(), page=16)),
    ):
        assert max(map(len, printed(table, width))) <= width


# ------------------------------------------------------------------------------------------------------ command line


def run_main(arguments: Sequence[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(_bench_kernels, "bandwidth", lambda device: {"copy": 2e10, "read": 1e10, "bytes": 1})
    assert bench.main(arguments) == 0
    return capsys.readouterr().out


@pytest.mark.slow
def test_requests_at_a_time(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The section serving runs on a CPU, with the reasoner, and keeps its rows as they come."""
    file = tmp_path / "bench.json"
    arguments = ["--only", "serving", "--concurrency", "1,3", "--cell-seconds", "3", "--json", str(file)]
    out = run_main(arguments, capsys, monkeypatch)
    assert "concurrent requests in the same KV memory" in out and "TTFT" in out
    rows = json.loads(file.read_text())["sections"]["serving"]["rows"]
    cells = [(row["contestant"], row["concurrent"]) for row in rows]
    assert cells == [("lethe", 1), ("lethe", 3), ("unpruned", 1), ("unpruned", 3)]
    for row in rows:
        assert row["tokens_per_s"] > 0 and 0 < row["batch"] <= row["concurrent"] <= row["requests"]
        assert 0 < row["ttft_p50"] <= row["ttft_p95"] and 0 < row["tpot_p50"] <= row["tpot_p95"]
        assert 0 < row["kv_peak"] <= row["kv_budget"]


@pytest.mark.slow
def test_the_cpu_section_and_its_json(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "bench.json"
    small = ["--batches", "1", "--lengths", "128", "--repeats", "1", "--steps", "2", "--json", str(file)]
    arguments = ["--only", "steps,cpu", "--contestants", "dynamic,unpruned,lethe", *small]
    out = run_main(arguments, capsys, monkeypatch)
    assert "steps: needs a CUDA GPU" in out and "ours, Lethe" in out
    result = json.loads(file.read_text())
    assert result["format"] == bench.FORMAT and result["machine"]["torch"] == torch.__version__
    assert result["command"] == " ".join(["lethe bench", *arguments]) and result["date"].endswith("Z")
    assert result["sections"]["steps"]["error"] == "no CUDA GPU"
    rows = result["sections"]["cpu"]["rows"]
    assert [row["contestant"] for row in rows] == ["dynamic", "unpruned", "lethe"]
    assert all(row["ms"] > 0 and row["peak_bytes"] is None for row in rows)

    monkeypatch.setitem(bench.SECTIONS, "cpu", lambda bench: pytest.fail("the section was not asked for"))
    run_main(["--only", "kernels", "--update", "--json", str(file)], capsys, monkeypatch)
    assert json.loads(file.read_text())["sections"]["cpu"]["rows"] == rows, "--update keeps what it does not measure"


def test_update_keeps_shapes_of_steps_that_it_does_not_measure() -> None:
    old, again = {"shape": "a", "ms": 1}, {"shape": "b", "ms": 2}
    outcome = {"rows": [{"shape": "b", "ms": 3}]}
    bench._keep_other_shapes(outcome, {"rows": [old, again]})
    assert outcome["rows"] == [old, {"shape": "b", "ms": 3}]


def test_a_section_that_breaks_leaves_the_others(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(_: Bench) -> list[Row]:
        raise RuntimeError("device lost")

    monkeypatch.setitem(bench.SECTIONS, "cpu", broken)
    file = tmp_path / "bench.json"
    assert "cpu: RuntimeError: device lost" in run_main(["--only", "cpu", "--json", str(file)], capsys, monkeypatch)
    assert json.loads(file.read_text())["sections"]["cpu"]["error"] == "RuntimeError: device lost"


def test_rows_are_written_as_they_come(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever ends the run within a section, what was measured is in the file, and what another run left as well."""
    file, other = tmp_path / "bench.json", {"shape": "other", "ms": 1.0}

    def interrupted(bench: Bench) -> list[Row]:
        bench.keep([{"shape": "a", "ms": 2.0}])
        raise KeyboardInterrupt

    monkeypatch.setitem(bench.SECTIONS, "steps", interrupted)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(bench, "machine", lambda: {"gpu": "none", "cpu": "none", "threads": 1})
    monkeypatch.setattr(bench, "_headline", lambda facts: "")
    monkeypatch.setattr(bench, "_bandwidth", lambda *_: {})
    file.write_text(json.dumps({"format": bench.FORMAT, "sections": {"steps": {"rows": [other]}}}))
    with pytest.raises(KeyboardInterrupt):
        bench.main(["--only", "steps", "--update", "--json", str(file)])
    steps = json.loads(file.read_text())["sections"]["steps"]
    assert steps["rows"] == [other, {"shape": "a", "ms": 2.0}] and "cut short" in steps["error"]


def test_defaults_and_quick() -> None:
    usual, quick = (bench._options(bench._parser().parse_args(line)) for line in ([], ["--quick"]))
    assert (
        {*usual.only, "tensor-parallel"} == {*bench.SECTIONS} and usual.new_tokens == 24576 and usual.batches == (1, 16)
    )
    assert quick.shapes == ("llama-8b",) and quick.repeats < usual.repeats
    assert bench._options(bench._parser().parse_args(["--quick", "--batches", "4,2"])).batches == (2, 4)


@pytest.mark.parametrize(
    "arguments", [["--only", "kernel"], ["--only", ","], ["--batches", "0"], ["--lengths", "1k"], ["--shapes", "x"]]
)
def test_bad_arguments_are_refused(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        bench.main(arguments)
    assert "error: argument" in capsys.readouterr().err


def test_update_needs_a_file(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="--update needs --json"):
        bench.main(["--update"])
    file = tmp_path / "other.json"
    file.write_text('{"format": 0}')
    with pytest.raises(InputError, match="another format"):
        bench.main(["--update", "--only", "cpu", "--json", str(file)])
