"use strict";
// The text as a layer sees it after a round: what it kept, and what was evicted.
function textPanel() {
  const { recording } = DATA;
  const { heads } = recording;
  const [body, slider, layerBox, status, info] = ["text-body", "text-step", "text-layer", "text-status", "text-info"].map(byId);
  const sequenceBox = byId("text-sequence");
  let rounds = [], spans = [], evicted = [], cursor = -1, playing = null;
  const sequence = () => Number(sequenceBox.value);
  const row = () => sequence() * heads + headOf("text-head");
  const layers = () => (layerBox.value === "all" ? recording.layers.map((_, index) => index) : [Number(layerBox.value)]);
  const current = () => rounds[Number(slider.value)];
  const present = () => recording.layers.map((layer, index) => index).filter((index) => headOf("text-head") < recording.layers[index].heads);

  // [layers][tokens] of the last time that the cache was filled before a step.
  const segmentAt = (step) => recording.segments.filter((segment) => segment.step <= step).pop().evicted;
  const gone = (layer, token, step) => evicted[layer][row()][token] >= 0 && evicted[layer][row()][token] <= step;

  function load() {
    rounds = roundsOf(sequence());
    slider.max = rounds.length - 1;
    slider.value = slider.max;
    cursor = -1;
    spans = recording.sequences[sequence()].tokens.map((token) => {
      const span = document.createElement("span");
      span.textContent = token;
      return span;
    });
    body.replaceChildren(...spans);
    show();
  }

  function show() {
    const round = current();
    const { prompt } = recording.sequences[sequence()];
    const seen = round.seen[sequence()];
    evicted = segmentAt(round.step);
    const chosen = layers().filter((index) => present().includes(index));
    let kept = 0;
    spans.forEach((span, token) => {
      const classes = token < prompt ? ["p"] : [];
      let holding = 0, now = false;
      if (token < seen) {
        for (const layer of chosen) {
          if (gone(layer, token, round.step)) now = now || evicted[layer][row()][token] === round.step;
          else holding += 1;
        }
        kept += holding;
        if (!holding) classes.push("g");
        else if (token >= prompt) classes.push("k");
        if (now) classes.push("n");
      } else classes.push("l");
      if (token === cursor) classes.push("c");
      span.className = classes.join(" ");
      if (holding) span.style.setProperty("--held", holding / chosen.length);
    });
    const share = chosen.length ? kept / chosen.length : 0;
    const who = chosen.length === 1 ? `layer ${recording.layers[chosen[0]].layer} keeps` : `${chosen.length} layers keep, on average,`;
    const words = `After step ${number.format(round.step)}, ${who} ${number.format(Math.round(share))} of ${number.format(seen)} tokens (${(100 * share / Math.max(1, seen)).toFixed(0)}%).`;
    status.textContent = words;
    slider.setAttribute("aria-valuetext", words);
    tell(cursor);
  }

  function tell(token) {
    if (token < 0) {
      info.textContent = "";
      return;
    }
    const { prompt, tokens } = recording.sequences[sequence()];
    const round = current();
    const seen = round.seen[sequence()];
    const when = token < prompt ? "of the prompt" : `written at step ${number.format(token - prompt + 1)}`;
    const holders = present().filter((layer) => !gone(layer, token, round.step));
    const fate = layers().length === 1 ? fateIn(layers()[0], token) : "";
    const held = token < seen ? `Now held by ${holders.length} of ${present().length} layers${holders.length && holders.length < present().length ? `: ${holders.map((index) => recording.layers[index].layer).join(", ")}` : ""}.` : "Not in the cache yet.";
    info.textContent = `Token ${number.format(token)}, ${JSON.stringify(tokens[token])}, ${when}. ${held}${fate}`;
  }

  function fateIn(layer, token) {
    if (!present().includes(layer)) return "";
    const step = evicted[layer][row()][token];
    return ` Layer ${recording.layers[layer].layer} ${step < 0 ? "keeps it to the end" : `evicts it after step ${number.format(step)}`}.`;
  }

  function move(to) {
    if (to < 0 || to >= spans.length) return;
    if (cursor >= 0) spans[cursor].classList.remove("c");
    cursor = to;
    spans[to].classList.add("c");
    spans[to].scrollIntoView({ block: "nearest" });
    tell(to);
  }

  function play() {
    const stop = () => {
      clearInterval(playing);
      playing = null;
      byId("text-play").textContent = "Play";
    };
    if (playing) return stop();
    if (slider.value === slider.max) slider.value = 0;
    byId("text-play").textContent = "Pause";
    playing = setInterval(() => {
      slider.value = Number(slider.value) + 1;
      show();
      const newest = spans[Math.max(0, current().seen[sequence()] - 1)];
      body.scrollTop = newest.offsetTop - body.offsetTop - 0.8 * body.clientHeight;
      if (slider.value === slider.max) stop();
    }, 180);
  }

  sequenceBox.addEventListener("change", load);
  for (const box of [layerBox, byId("text-head")]) if (box) box.addEventListener("change", show);
  slider.addEventListener("input", show);
  byId("text-play").addEventListener("click", play);
  body.addEventListener("pointerover", (event) => tell(event.target === body ? cursor : spans.indexOf(event.target)));
  body.addEventListener("click", (event) => move(spans.indexOf(event.target)));
  body.addEventListener("keydown", (event) => {
    const to = { ArrowRight: cursor + 1, ArrowLeft: cursor - 1, ArrowDown: cursor + 10, ArrowUp: cursor - 10, Home: 0, End: spans.length - 1 }[event.key];
    if (to === undefined) return;
    event.preventDefault();
    move(Math.max(0, Math.min(spans.length - 1, to)));
  });
  load();
}

if (DATA.recording) textPanel();
