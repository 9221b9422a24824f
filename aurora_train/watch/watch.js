"use strict";
// The page is asked for again every two seconds, and only what has changed is replaced: nothing flickers, a film runs on,
// what is ticked, open or typed stays.
const every = 2000;
let shown = "", timer = 0, asking = null;

function same(old, fresh) { return old.nodeName === fresh.nodeName && (old.id ?? "") === (fresh.id ?? ""); }

function morph(old, fresh) {
  if (old.isEqualNode(fresh)) return;
  if (!same(old, fresh)) return old.replaceWith(fresh);
  if (old.nodeType === Node.TEXT_NODE) { old.data = fresh.data; return; }
  for (const {name, value} of fresh.attributes) if (old.getAttribute(name) !== value) old.setAttribute(name, value);
  for (const {name} of [...old.attributes]) if (!fresh.hasAttribute(name) && name !== "open") old.removeAttribute(name);
  const named = new Map([...old.children].filter(node => node.id).map(node => [node.id, node]));
  let at = old.firstChild;
  for (const next of [...fresh.childNodes]) {
    const known = next.id && named.get(next.id);
    if (known && known !== at) old.insertBefore(known, at);
    const here = known || at;
    if (here && same(here, next)) {
      at = here.nextSibling;
      morph(here, next);
    } else old.insertBefore(next, at);
  }
  while (at) { const gone = at; at = at.nextSibling; gone.remove(); }
}

async function refresh() {
  clearTimeout(timer);
  asking?.abort();
  asking = new AbortController();
  let wait = every;
  try {
    const response = await fetch(location.href, {signal: asking.signal});
    if (response.status === 401) return location.reload();
    const text = await response.text();
    if (text !== shown) {
      const fresh = new DOMParser().parseFromString(text, "text/html");
      document.title = fresh.title;
      morph(document.querySelector("main"), fresh.querySelector("main"));
      shown = text;
    }
    wait = Number(document.querySelector("main").dataset.again) || every;
    document.getElementById("lost").textContent = "";
  } catch (error) {
    if (error.name === "AbortError") return;
    document.getElementById("lost").textContent = "no answer from aurora watch: this page is not live";
  }
  timer = setTimeout(() => document.hidden || refresh(), wait);
}

// A form of class `live` is sent whenever it changes; the page's address holds its settings.
function live(event) {
  const form = event.target.closest("form.live");
  if (!form) return;
  event.preventDefault();
  const kept = [...new FormData(form)].filter(([, value]) => value !== "");
  history.replaceState(null, "", `?${new URLSearchParams(kept)}`);
  clearTimeout(timer);
  timer = setTimeout(refresh, event.type === "input" && event.target.type === "search" ? 200 : 0);
}
for (const kind of ["input", "submit"]) document.addEventListener(kind, live);
document.addEventListener("visibilitychange", () => document.hidden || refresh());

// ---- what a chart shows under the pointer

const points = new WeakMap();  // of a line: its path, and the points read from it

function read(line) {
  const path = line.getAttribute("d");
  if (points.get(line)?.path !== path)
    points.set(line, {path, at: (path.match(/[\d.-]+,[\d.-]+/g) ?? []).map(pair => pair.split(",").map(Number))});
  return points.get(line).at;
}

function value(share, scale) {
  const [low, high, log] = scale.split(" ").map(Number);
  return log ? low * (high / low) ** share : low + share * (high - low);
}

function written(number, scale) {
  const [low, high] = scale.split(" ").map(Number), size = Math.max(Math.abs(low), Math.abs(high));
  if (size >= 1e4) return new Intl.NumberFormat("en", {notation: "compact", maximumSignificantDigits: 4}).format(number);
  return size < 1e-3 ? number.toExponential(2) : number.toPrecision(4);
}

document.addEventListener("pointermove", event => {
  const chart = event.target.closest?.(".chart[data-x]"), box = document.getElementById("readout");
  box.hidden = true;
  if (!chart) return;
  const area = chart.getBoundingClientRect(), share = (event.clientX - area.left) / area.width;
  const found = [...chart.querySelectorAll("path.line")].flatMap(line => {
    const at = read(line);
    if (!at.length) return [];
    const [x, y] = at.reduce((best, one) => Math.abs(one[0] - share * 1000) < Math.abs(best[0] - share * 1000) ? one : best);
    return [{x, y, name: line.dataset.name, colour: line.style.stroke}];
  });
  if (!found.length || share < 0 || share > 1) return;
  const [first] = found.toSorted((a, b) => Math.abs(a.x - share * 1000) - Math.abs(b.x - share * 1000));
  const title = document.createElement("b");
  const x = value(first.x / 1000, chart.dataset.x), unit = chart.dataset.unit;
  title.textContent = `${unit} ${unit === "step" && x < 1e4 ? Math.round(x) : written(x, chart.dataset.x)}`;
  const marks = [...chart.querySelectorAll("path.mark")].filter(mark =>
    Math.abs(Number(mark.getAttribute("d").match(/[\d.]+/)[0]) / 1000 - share) * area.width < 8).slice(0, 5);
  const happened = marks.map(mark => {
    const line = document.createElement("span");
    line.textContent = mark.textContent;
    return line;
  });
  box.replaceChildren(title, ...happened, ...found.map(({y, name, colour}) => {
    const line = document.createElement("span");
    line.className = "swatch";
    line.style.setProperty("--colour", colour);
    line.append(`${written(value(1 - y / 1000, chart.dataset.y), chart.dataset.y)}  ${name}`);
    return line;
  }));
  box.hidden = false;
  box.style.left = `${Math.min(event.clientX + 16, innerWidth - box.offsetWidth - 8)}px`;
  box.style.top = `${Math.max(Math.min(event.clientY + 16, innerHeight - box.offsetHeight - 8), 8)}px`;
});

timer = setTimeout(refresh, Number(document.querySelector("main").dataset.again) || every);
