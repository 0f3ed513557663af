"use strict";
// Shared by the charts and the text: data, colours that follow the system's theme, tabs and the navigation.
const DATA = JSON.parse(document.getElementById("data").textContent);
const byId = (name) => document.getElementById(name);
const number = new Intl.NumberFormat("en-US");
const colour = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
const CONFIG = { displaylogo: false, responsive: true, modeBarButtons: [["zoom2d", "pan2d", "resetScale2d", "toImage"]] };
const drawings = []; // every chart's function, to be called again when the theme changes

function bytesText(count) {
  for (const unit of ["B", "KiB", "MiB"]) {
    if (count < 1024) return `${count.toFixed(unit === "B" || count >= 100 ? 0 : 1)} ${unit}`;
    count /= 1024;
  }
  return `${count.toFixed(2)} GiB`;
}

function layoutOf(extra) {
  const axis = { gridcolor: colour("--grid"), zerolinecolor: colour("--grid"), linecolor: colour("--line"), automargin: true };
  const base = {
    paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)", hovermode: "closest",
    font: { color: colour("--fg"), size: 12.5, family: "system-ui, sans-serif" },
    margin: { l: 64, r: 20, t: 34, b: 48 },
    hoverlabel: { bgcolor: colour("--panel"), bordercolor: colour("--line"), font: { color: colour("--fg") }, align: "left" },
    legend: { bgcolor: "rgba(0,0,0,0)" },
    modebar: { bgcolor: "rgba(0,0,0,0)", color: colour("--dim"), activecolor: colour("--accent") },
  };
  const layout = { ...base, ...extra };
  for (const key of Object.keys(layout)) if (/^[xy]axis\d*$/.test(key)) layout[key] = { ...axis, ...layout[key] };
  return layout;
}

function plot(name, traces, extra) {
  const place = byId(name);
  if (!traces.length) {
    place.textContent = "Nothing was measured.";
    place.style.minHeight = place.style.height = "auto";
    return;
  }
  Plotly.react(place, traces, layoutOf(extra), CONFIG);
}

function chart(draw, ...controls) {
  drawings.push(draw);
  for (const control of controls) if (control) control.addEventListener("change", draw);
  draw();
}

function tabs(list) {
  const heads = [...list.querySelectorAll("[role=tab]")];
  const show = (chosen, focus) => {
    for (const head of heads) {
      const on = head === chosen;
      head.setAttribute("aria-selected", on);
      head.tabIndex = on ? 0 : -1;
      byId(head.getAttribute("aria-controls")).hidden = !on;
    }
    if (focus) chosen.focus();
  };
  list.addEventListener("click", (event) => {
    const head = event.target.closest("[role=tab]");
    if (head) show(head, false);
  });
  list.addEventListener("keydown", (event) => {
    const at = heads.indexOf(document.activeElement);
    const to = { ArrowRight: at + 1, ArrowLeft: at - 1, Home: 0, End: heads.length - 1 }[event.key];
    if (at < 0 || to === undefined) return;
    event.preventDefault();
    show(heads[(to + heads.length) % heads.length], true);
  });
  show(heads[0], false);
}

function markCurrent() {
  const links = [...document.querySelectorAll("nav a")];
  const shown = new IntersectionObserver((entries) => {
    for (const entry of entries) {
      if (!entry.isIntersecting) continue;
      for (const link of links) {
        if (link.hash === `#${entry.target.id}`) link.setAttribute("aria-current", "true");
        else link.removeAttribute("aria-current");
      }
    }
  }, { rootMargin: "-20% 0px -70% 0px" });
  for (const link of links) shown.observe(byId(link.hash.slice(1)));
}

document.querySelectorAll("[role=tablist]").forEach(tabs);
markCurrent();
window.matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => drawings.forEach((draw) => draw()));
