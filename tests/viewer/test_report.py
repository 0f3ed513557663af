"""The HTML report in a browser: it loads nothing, fits the screen, can be used by keyboard, and shows what happened."""

from __future__ import annotations

import copy
import json
import re
import sys
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import lethe_compile as lethe
from lethe_compile.errors import InputError, MissingPackageError
from lethe_compile.models.tiny import tiny
from lethe_compile.viewer import write_report
from lethe_compile.viewer.figures import course
from lethe_compile.viewer.sweeps import read_sweep
from tests.test_recording import CONFIG, record
from tests.viewer.chromium import browse, needs_chromium, screenshot
from tests.viewer.parts import HOSTILE, comparison, sweep

RESULTS = Path(__file__).parents[2] / "tools/results/reasoner-policies-2026-11-26.json"


@pytest.fixture(scope="module")
def made() -> dict[str, Any]:
    """A recording whose words and names want to be HTML, and the inspection of its model."""
    fast = lethe.optimize(tiny("llama"), CONFIG, verified=False)
    recording, _ = record(fast)
    recording = copy.deepcopy(recording)
    recording["model"] = HOSTILE
    recording["sequences"][0]["tokens"][3] = HOSTILE
    recording["layers"][1]["name"] = HOSTILE
    return {"recording": recording, "graph": fast.inspection(HOSTILE).to_dict()}


@pytest.fixture(scope="module")
def page(made: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("report")
    parts = {"comparison": comparison(), "sweep": sweep(folder / "summary.json"), **made}
    return write_report(folder / "report.html", **parts)


class _Parser(HTMLParser):
    """Ids, and whatever makes a browser fetch something."""

    def __init__(self) -> None:
        super().__init__()
        self.ids: list[str] = []
        self.fetched: list[str] = []
        self.policy = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        if given.get("id"):
            self.ids.append(str(given["id"]))
        if given.get("http-equiv") == "Content-Security-Policy":
            self.policy = str(given["content"])
        local = tag == "a" and str(given.get("href")).startswith("#")
        if not local:
            self.fetched += [f"{tag} {name}" for name in given if name in ("src", "srcset", "href", "data", "action")]


def test_the_file_stands_alone(page: Path) -> None:
    parser = _Parser()
    parser.feed(page.read_text())
    assert parser.fetched == [] and parser.policy.startswith("default-src 'none'; ")
    assert "http" not in parser.policy
    assert len(parser.ids) == len(set(parser.ids)), "ids are unique"
    charts = {"by-step", "frontier-chart", "retained", "sparsity", "bytes", "budgets", "timeline"}
    assert charts | {"comparison", "frontier", "cache", "rounds", "text", "graph", "summary"} <= set(parser.ids)
    style = page.read_text().split("<style>", 1)[1].split("</style>", 1)[0]
    assert "url(" not in style and "@import" not in style


LOOK = """
  const [blocked, loaded] = [[...window.seen.violations], performance.getEntriesByType("resource").length];
  const shown = (id) => document.getElementById(id).querySelector(".main-svg") !== null;
  const charts = [...document.querySelectorAll(".chart")].map((chart) => [chart.id, shown(chart.id)]);
  const bold = document.querySelectorAll("b, img").length;
  document.body.append(Object.assign(new Image(), { src: "https://example.invalid/x.png" }));
  await new Promise((done) => setTimeout(done, 200));
  return {
    blocked, loaded, bold,
    charts: Object.fromEntries(charts), cells: document.querySelectorAll("#retained .hm image").length,
    title: document.title, h1: document.querySelector("h1").textContent,
    curves: [...document.querySelectorAll("#frontier-chart .legendtext")].map((text) => text.textContent),
    cards: [...document.querySelectorAll(".card")].map((card) => card.textContent),
    token: document.querySelectorAll("#text-body span")[3].textContent,
    option: document.querySelectorAll("#text-layer option")[2].textContent,
    wide: [...document.querySelectorAll("section")].filter((s) => s.scrollWidth > s.clientWidth).map((s) => s.id),
  };
"""


@needs_chromium
def test_it_opens_without_network_and_fits_the_screen(page: Path) -> None:
    told = browse(page, LOOK)
    found = told["result"]
    assert told["errors"] == [] and found["blocked"] == [] and found["loaded"] == 0
    assert told["violations"] == ["https://example.invalid/x.png"], "what the test itself fetches is noticed"
    assert told["scrollWidth"] <= told["innerWidth"] == 1280
    assert all(found["charts"].values()) and len(found["charts"]) == 7 and found["cells"] == 1
    assert found["wide"] == []
    assert found["bold"] == 0, "no name became an element"
    assert found["title"] == found["h1"] == f"Lethe report: {HOSTILE}"
    assert found["token"] == HOSTILE and found["option"] == f"layer 1: {HOSTILE}"
    assert found["curves"] == ["lethe", HOSTILE, "full cache"]
    assert found["cards"][0] == "verdictfail1 of 2 limits hold"


USE = """
  const key = (element, name) => element.dispatchEvent(new KeyboardEvent("keydown", { key: name, bubbles: true }));
  const byName = (id) => document.getElementById(id);
  const [slider, layer, sequence] = ["text-step", "text-layer", "text-sequence"].map(byName);
  const spans = () => [...document.querySelectorAll("#text-body span")];
  const states = [];
  for (const row of [0, 1]) {
    sequence.value = row;
    sequence.dispatchEvent(new Event("change"));
    for (const choice of ["0", "1", "all"]) {
      layer.value = choice;
      layer.dispatchEvent(new Event("change"));
      for (let round = 0; round <= Number(slider.max); round += 1) {
        slider.value = round;
        slider.dispatchEvent(new Event("input"));
        const classes = spans().map((span) => span.className);
        const having = (kind) => classes.flatMap((name, token) => (name.split(" ").includes(kind) ? [token] : []));
        const status = document.getElementById("text-status").textContent;
        states.push({ row, choice, round, gone: having("g"), later: having("l"), prompt: having("p").length, status });
      }
    }
  }
  const body = document.getElementById("text-body");
  body.focus();
  key(body, "ArrowRight"), key(body, "ArrowRight");
  const info = document.getElementById("text-info").textContent;
  const focus = getComputedStyle(document.activeElement).outlineStyle;
  const tabs = [...document.querySelectorAll("#graph-tabs [role=tab]")];
  tabs[0].focus();
  key(tabs[0], "ArrowRight");
  const second = document.activeElement.textContent;
  const panels = [...document.querySelectorAll("#graph [role=tabpanel]")].map((panel) => !panel.hidden);
  key(document.activeElement, "End");
  const last = document.activeElement.textContent;
  const reachable = [...document.querySelectorAll("select, input, button, .graph, #text-body")]
    .filter((one) => one.tabIndex >= 0 && !one.closest(".modebar"))
    .map((one) => one.id || one.className || one.textContent);
  document.getElementById("text-play").click();
  await new Promise((done) => setTimeout(done, 500));
  return { states, info, focus, second, panels, last, reachable, played: Number(slider.value) };
"""


@needs_chromium
def test_slider_and_keyboard_show_what_was_kept(page: Path, made: dict[str, Any]) -> None:
    told = browse(page, USE)
    assert told["errors"] == []
    found, recording = told["result"], made["recording"]
    evicted = np.array([[(of + [-1] * 99)[:50] for of in layer] for layer in recording["segments"][0]["evicted"]])
    seen_choices = set()
    for state in found["states"]:
        rounds = [one for one in recording["rounds"] if one["active"][state["row"]]]
        one = rounds[state["round"]]
        seen = one["seen"][state["row"]]
        of = evicted[:, state["row"], :seen]  # [L, seen]
        gone = (of >= 0) & (of <= one["step"])
        shown = gone.all(0) if state["choice"] == "all" else gone[int(state["choice"])]
        assert state["gone"] == np.flatnonzero(shown).tolist()
        assert state["prompt"] == recording["sequences"][state["row"]]["prompt"]
        assert state["later"] == list(range(seen, len(recording["sequences"][state["row"]]["tokens"])))
        if state["choice"] != "all":
            kept = one["after"][int(state["choice"])][state["row"]]
            assert f"keeps {kept} of {seen} tokens" in state["status"]
        seen_choices.add((state["row"], state["choice"], bool(state["gone"])))
    assert len(seen_choices) == 12, "for each row and layer, rounds with and without evicted tokens"
    assert found["info"].startswith('Token 1, "') and "of the prompt" in found["info"] and found["focus"] == "solid"
    assert found["second"] == "After" and found["panels"] == [False, True, False, False, False]
    assert found["last"] == "Operators"
    wanted = {"frontier-group", "cache-sequence", "cache-unit", "text-sequence", "text-layer", "text-step", "text-play"}
    assert wanted | {"text-body", "graph"} <= set(found["reachable"])
    assert found["played"] > 0, "playing moves the slider"


@needs_chromium
@pytest.mark.parametrize(
    "dark", [pytest.param(False, id="light", marks=pytest.mark.slow), pytest.param(True, id="dark")]
)
def test_it_can_be_read_in(dark: bool, page: Path, tmp_path: Path) -> None:
    from PIL import Image

    screenshot(page, tmp_path / "page.png", dark=dark, height=4200)
    with Image.open(tmp_path / "page.png") as picture:
        pixels = np.asarray(picture.convert("RGB"), np.int64)
    assert pixels.shape[1] == 1280
    grey = pixels.mean(2)
    assert (grey.mean() < 70) if dark else (grey.mean() > 200)
    inked = np.abs(grey - np.median(grey)) > 60
    assert 0.01 < inked.mean() < 0.5, "neither blank nor full"
    parts = inked[: len(inked) // 12 * 12].reshape(12, -1, 1280).any(2).mean(1)  # twelve strips down the page
    assert (parts > 0.05).sum() >= 11, "something everywhere down the page"
    colourful = (pixels.max(2) - pixels.min(2)) > 80
    assert colourful.mean() > 0.005, "charts have colours"


def test_cards_say_what_the_recording_says(made: dict[str, Any]) -> None:
    recording = made["recording"]
    found = course(recording, 0)
    assert found is not None and found.tokens == 47 and found.prompt == 7
    size = sum(layer["token_bytes"] for layer in recording["layers"])
    held = []  # bytes after each step, from round to round
    rounds = [one for one in recording["rounds"] if one["active"][0]]
    ends = [one["step"] for one in rounds[1:]] + [found.tokens - 1 - found.prompt]
    for one, end in zip(rounds, ends, strict=True):
        kept = sum(of[0] * layer["token_bytes"] for of, layer in zip(one["after"], recording["layers"], strict=True))
        held += [kept + (step + 0.5) * size for step in range(end - one["step"])]
    assert found.kv_mean == pytest.approx(np.mean(held))
    assert found.kv_end == held[-1] + size / 2 and found.full_end == 46 * size
    dropped = sum(sum(step >= 0 for step in layer[0]) for layer in recording["segments"][0]["evicted"])
    assert found.evicted == dropped > 0


def test_sweeps_of_either_form_are_read(tmp_path: Path) -> None:
    read = read_sweep(sweep(tmp_path / "summary.json"))
    assert read["points"][0]["curve"] == "full" and read["points"][1]["accuracy"] == pytest.approx(60)
    stored = read_sweep(RESULTS)
    assert stored["model"] == "reasoner" and "NVIDIA H100" in stored["title"]
    curves = {point["curve"] for point in stored["points"] if point["group"] == "policies"}
    assert {"full", "lethe", "lethe uncapped", "h2o", "random"} <= curves
    groups = {point["group"] for point in stored["points"]}
    assert {"policies", "ablations: decay"} <= groups
    uncapped = [point for point in stored["points"] if point["curve"] == "lethe uncapped"]
    assert len(uncapped) == 3 and uncapped[0]["low"] < uncapped[0]["accuracy"] < uncapped[0]["high"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "not JSON"),
        ("[]", "no sweep of a form that is known"),
        ("{}", "holds no cells"),
        ('{"cells": [{"policy": "full"}]}', "KeyError"),
    ],
)
def test_other_files_are_no_sweeps(tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / "file.json").write_text(content)
    with pytest.raises(InputError, match=message) as refused:
        write_report(tmp_path / "report.html", sweep=tmp_path / "file.json")
    assert "file.json" in str(refused.value) and not (tmp_path / "report.html").exists()


def test_each_part_makes_a_report_by_itself(made: dict[str, Any], tmp_path: Path) -> None:
    for name, part in {"comparison": comparison(True), "sweep": RESULTS, **made}.items():
        text = write_report(tmp_path / f"{name}.html", **{name: part}).read_text()
        sections = re.findall(r'<section id="([\w-]+)"', text)
        wanted = {"recording": ["cache", "rounds", "text"], "sweep": ["frontier"]}.get(name, [name])
        assert sections == wanted
    with pytest.raises(InputError, match="a report of nothing"):
        write_report(tmp_path / "none.html")
    with pytest.raises(InputError, match="cannot be written to"):
        write_report(tmp_path / "no" / "folder.html", sweep=RESULTS)


@needs_chromium
@pytest.mark.slow
@pytest.mark.parametrize("policy", ["full", "h2o"])
def test_a_policy_that_evicts_nothing_and_one_by_head(policy: str, tmp_path: Path) -> None:
    fast = lethe.optimize(tiny("llama"), replace(CONFIG, policy=policy), verified=False)
    recording, _ = record(fast)
    page = write_report(tmp_path / "report.html", recording=recording)
    told = browse(
        page, LOOK.replace("return {", "return { heads: document.querySelectorAll('#text-head option').length,")
    )
    assert told["errors"] == [] and told["scrollWidth"] <= told["innerWidth"]
    assert told["result"]["heads"] == (2 if policy == "h2o" else 0)
    drawn = {name for name, there in told["result"]["charts"].items() if there}
    assert drawn == {"retained", "bytes", "budgets"} | ({"sparsity", "timeline"} if policy == "h2o" else set())


def test_without_plotly_it_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "plotly.offline", None)
    with pytest.raises(MissingPackageError, match=r"pip install 'lethe-compile\[report\]'"):
        write_report(tmp_path / "report.html", sweep=RESULTS)


def test_what_does_not_fit_is_told(made: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lethe_compile.viewer._MOST", 200)
    text = write_report(tmp_path / "report.html", recording=made["recording"]).read_text()
    assert "1 more sequences were recorded and do not fit" in text
    embedded = json.loads(re.search(r'id="data">(.*?)</script>', text)[1])["recording"]  # type: ignore[index]
    assert len(embedded["sequences"]) == 1 and {len(of) for of in embedded["rounds"][0]["after"]} == {1}
