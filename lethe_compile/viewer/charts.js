"use strict";
// The frontier, a comparison's steps, and what the cache did over time.
const PALETTE = ["#d55e00", "#2b8ccb", "#009e73", "#cc79a7", "#e6a100", "#7d6bd0", "#56b4e9", "#a0662b", "#8b9299", "#b0a800"];
const MARKS = ["circle", "square", "diamond", "triangle-up", "triangle-down", "x", "cross", "star", "pentagon", "hexagon"];

// A name as itself: Plotly reads some HTML in labels.
const literal = (name) => name.replaceAll("&", "&amp;").replaceAll("<", "&lt;");

// Bytes on a logarithmic axis: powers of two in their units.
function byteAxis(values, title) {
  const [low, high] = [Math.log2(Math.min(...values)), Math.log2(Math.max(...values))];
  const every = Math.max(1, Math.ceil((high - low) / 8));
  const ticks = [];
  for (let power = Math.floor(low) - 1; power <= Math.ceil(high) + 1; power += every) ticks.push(2 ** power);
  return { type: "log", title: { text: title }, tickvals: ticks, ticktext: ticks.map(bytesText) };
}

function frontier() {
  const group = byId("frontier-group").value;
  const whole = DATA.sweep.points.filter((point) => point.curve === "full");
  const full = whole.find((point) => point.group === group) || whole[0];
  const points = DATA.sweep.points.filter((point) => point.group === group && point.curve !== "full");
  const curves = [...new Set(points.map((point) => point.curve))];
  const traces = curves.map((curve, index) => {
    const of = points.filter((point) => point.curve === curve).sort((a, b) => a.kv - b.kv);
    const known = of.every((point) => point.low !== null);
    const shade = PALETTE[index % PALETTE.length];
    return {
      type: "scatter", mode: "lines+markers", name: literal(curve), x: of.map((p) => p.kv), y: of.map((p) => p.accuracy),
      line: { color: shade, width: 2, dash: index >= PALETTE.length ? "dash" : "solid" },
      marker: { color: shade, size: 8, symbol: MARKS[index % MARKS.length] },
      error_y: known ? {
        type: "data", symmetric: false, thickness: 1, width: 3, color: shade,
        array: of.map((p) => p.high - p.accuracy), arrayminus: of.map((p) => p.accuracy - p.low),
      } : undefined,
      text: of.map((p) => `${bytesText(p.kv)}${p.new_tokens ? `, ${number.format(Math.round(p.new_tokens))} tokens written` : ""}`),
      customdata: of.map((p) => literal(p.label)), hovertemplate: "<b>%{customdata}</b><br>%{y:.1f}%<br>%{text}<extra></extra>",
    };
  });
  const shapes = [];
  if (full) {
    traces.push({
      type: "scatter", mode: "markers", name: "full cache", x: [full.kv], y: [full.accuracy],
      marker: { color: colour("--fg"), size: 11, symbol: "hexagon" },
      hovertemplate: `<b>full cache</b><br>%{y:.1f}%<br>${bytesText(full.kv)}<extra></extra>`,
    });
    shapes.push({ type: "line", xref: "paper", x0: 0, x1: 1, y0: full.accuracy, y1: full.accuracy, line: { color: colour("--dim"), width: 1, dash: "dot" } });
  }
  const all = [...points, ...(full ? [full] : [])].map((point) => point.kv);
  plot("frontier-chart", traces, {
    xaxis: byteAxis(all, "KV cache of a sequence, mean"), yaxis: { title: { text: "accuracy, %" }, rangemode: "tozero" }, shapes,
  });
}

function bySteps() {
  const { step, kl, top1 } = DATA.by_step;
  plot("by-step", [
    { type: "scatter", mode: "lines", name: "KL(unpruned ‖ pruned)", x: step, y: kl, line: { color: PALETTE[0], width: 2 } },
    { type: "scatter", mode: "lines", name: "top-1 agreement", x: step, y: top1, yaxis: "y2", line: { color: PALETTE[1], width: 2 } },
  ], {
    xaxis: { title: { text: "step after the prompt" }, anchor: "y2" }, legend: { orientation: "h", y: 1.14 }, hovermode: "x unified",
    yaxis: { title: { text: "KL, nats" }, domain: [0.56, 1], rangemode: "tozero" },
    yaxis2: { title: { text: "top-1" }, domain: [0, 0.44], tickformat: ".1%" },
  });
}

// The rounds that a sequence took part in, and the row of a head of it.
const roundsOf = (sequence) => DATA.recording.rounds.filter((round) => round.active[sequence]);
const headOf = (name) => (byId(name) ? Number(byId(name).value) : 0);
const layerNames = () => DATA.recording.layers.map((layer) => `layer ${layer.layer}`);

// A heat map in cells of one round each: from its step to the next round's.
function heat(name, rounds, values, options) {
  const steps = rounds.map((round) => round.step);
  const gap = steps.length > 1 ? steps[steps.length - 1] - steps[steps.length - 2] : 1;
  const edges = [...steps, steps[steps.length - 1] + gap];
  plot(name, [{
    type: "heatmap", x: edges, y: layerNames(), z: values, text: options.notes, colorscale: options.scale, zmin: 0,
    zmax: options.most,
    hoverongaps: false, colorbar: { thickness: 12, outlinewidth: 0, tickformat: options.ticks, title: { text: options.title, side: "right" } },
    hovertemplate: "<b>%{y}</b>, %{text}<extra></extra>",
  }], { xaxis: { title: { text: "decode step" } }, yaxis: { autorange: "reversed", type: "category" }, margin: { l: 64, r: 12, t: 34, b: 44 } });
}

function overTime() {
  const { layers, heads } = DATA.recording;
  const sequence = Number(byId("cache-sequence").value);
  const row = sequence * heads + headOf("cache-head");
  const share = byId("cache-unit").value === "share";
  const rounds = roundsOf(sequence);
  const each = (value) => layers.map((_, layer) => rounds.map((round) => value(round, layer)));
  const part = (r, l) => r.after[l][row] / Math.max(1, r.seen[sequence]);
  const note = (r, l) => `after step ${number.format(r.step)}: ${number.format(r.after[l][row])} of ${number.format(r.seen[sequence])} tokens, ${(100 * part(r, l)).toFixed(0)}%`;
  heat("retained", rounds, each((r, l) => (share ? part(r, l) : r.after[l][row])), {
    scale: "Cividis", title: share ? "share" : "tokens", ticks: share ? ".0%" : "", most: share ? 1 : Math.max(1, ...each((r, l) => r.after[l][row]).flat()), notes: each(note),
  });
  const sparsity = (r, l) => (r.sparsity === null ? null : r.sparsity[l][row]);
  const measured = each(sparsity);
  const told = (r, l) => `step ${number.format(r.step)}: ${sparsity(r, l) === null ? "not measured" : sparsity(r, l).toFixed(3)}`;
  if (measured.flat().some((value) => value !== null)) heat("sparsity", rounds, measured, { scale: "Viridis", title: "sparsity", most: 1, notes: each(told) });
  else plot("sparsity", [], {});
  bytesOverTime(rounds, sequence);
}

function bytesOverTime(rounds, sequence) {
  const { layers, heads } = DATA.recording;
  const total = layers.reduce((sum, layer) => sum + layer.token_bytes, 0);
  const held = (of) => layers.reduce((sum, layer, index) => {
    const rows = of[index].slice(sequence * heads, (sequence + 1) * heads);
    return sum + rows.reduce((a, b) => a + b, 0) * layer.token_bytes / layer.heads;
  }, 0);
  const [x, y] = [[], []];
  for (const round of rounds) {
    x.push(round.step, round.step);
    y.push(held(round.before), held(round.after));
  }
  const full = rounds.map((round) => round.seen[sequence] * total);
  const most = Math.max(...full, ...y);
  const unit = 2 ** (10 * Math.floor(Math.log2(Math.max(most, 1)) / 10));
  const name = { 1: "B", 1024: "KiB", 1048576: "MiB" }[unit] || "GiB";
  plot("bytes", [
    { type: "scatter", mode: "lines", name: "full cache", x: rounds.map((round) => round.step), y: full.map((v) => v / unit), line: { color: colour("--dim"), dash: "dot", width: 2 }, text: full.map(bytesText), hovertemplate: "full cache: %{text}<extra></extra>" },
    { type: "scatter", mode: "lines", name: "retained", x, y: y.map((v) => v / unit), fill: "tozeroy", line: { color: PALETTE[1], width: 2 }, text: y.map(bytesText), hovertemplate: "retained, step %{x}: %{text}<extra></extra>" },
  ], { xaxis: { title: { text: "decode step" } }, yaxis: { title: { text: name }, rangemode: "tozero" }, legend: { orientation: "h", y: 1.16 } });
}

function budgets() {
  const { layers, heads } = DATA.recording;
  const sequence = Number(byId("cache-sequence").value);
  const row = sequence * heads + headOf("cache-head");
  const rounds = roundsOf(sequence);
  const mean = [], more = [], less = [], next = [];
  layers.forEach((_, layer) => {
    const pruning = rounds.filter((r) => r.before[layer][row] > r.after[layer][row]);
    const kept = (pruning.length ? pruning : rounds).map((r) => r.after[layer][row]);
    const middle = kept.reduce((a, b) => a + b, 0) / kept.length;
    mean.push(middle);
    more.push(Math.max(...kept) - middle);
    less.push(middle - Math.min(...kept));
    const last = rounds[rounds.length - 1].threshold;
    next.push(last === null ? null : last[layer][row]);
  });
  const traces = [{
    type: "bar", name: "kept after a round", x: layerNames(), y: mean, marker: { color: PALETTE[1] },
    error_y: { type: "data", symmetric: false, array: more, arrayminus: less, color: colour("--fg"), thickness: 1.2, width: 5 },
    hovertemplate: "<b>%{x}</b><br>%{y:,.0f} tokens, mean<extra></extra>",
  }];
  if (next.some((value) => value !== null)) traces.push({
    type: "scatter", mode: "markers", name: "next round from", x: layerNames(), y: next,
    marker: { symbol: "line-ew-open", size: 26, color: PALETTE[0], line: { width: 3 } }, hovertemplate: "<b>%{x}</b><br>next round from %{y:,d} tokens on<extra></extra>",
  });
  plot("budgets", traces, { yaxis: { title: { text: "tokens" }, rangemode: "tozero" }, xaxis: { type: "category" }, legend: { orientation: "h", y: 1.14 } });
  timeline(rounds, row);
}

function timeline(rounds, row) {
  const [x, y, size, share, text] = [[], [], [], [], []];
  rounds.forEach((round) => DATA.recording.layers.forEach((layer, index) => {
    const [before, after] = [round.before[index][row], round.after[index][row]];
    if (before === after) return;
    x.push(round.step);
    y.push(`layer ${layer.layer}`);
    size.push(before - after);
    share.push((before - after) / before);
    const sparsity = round.sparsity === null ? null : round.sparsity[index][row];
    text.push(`${number.format(before)} → ${number.format(after)} tokens${sparsity === null ? "" : `<br>Hoyer sparsity ${sparsity.toFixed(3)}`}`);
  }));
  const most = Math.max(1, ...size);
  plot("timeline", size.length ? [{
    type: "scatter", mode: "markers", x, y, text, hovertemplate: "<b>%{y}</b>, step %{x}<br>%{text}<extra></extra>",
    marker: {
      size: size.map((n) => 4 + 14 * Math.sqrt(n / most)), color: share, colorscale: [[0, PALETTE[1]], [0.5, PALETTE[4]], [1, PALETTE[0]]], cmin: 0, cmax: Math.max(...share), line: { width: 0 },
      colorbar: { thickness: 12, outlinewidth: 0, tickformat: ".0%", title: { text: "evicted", side: "right" } },
    },
  }] : [], {
    xaxis: { title: { text: "decode step" } }, margin: { l: 64, r: 12, t: 34, b: 44 },
    yaxis: { type: "category", autorange: "reversed", categoryorder: "array", categoryarray: layerNames() },
  });
}

if (DATA.sweep) chart(frontier, byId("frontier-group"));
if (DATA.by_step) chart(bySteps);
if (DATA.recording) {
  const controls = [byId("cache-sequence"), byId("cache-head")];
  chart(overTime, ...controls, byId("cache-unit"));
  chart(budgets, ...controls);
}
