"use strict";

// ---------------------------------------------------------------- tabs: one section of a group at a time

function makeTabs(box, number) {
  const panels = [...box.children].filter((child) => child.dataset.tab !== undefined);
  if (panels.length < 2) return;
  const list = document.createElement("div");
  list.className = "tablist";
  list.setAttribute("role", "tablist");
  list.setAttribute("aria-label", box.dataset.label);
  panels.forEach((panel, place) => {
    const tab = document.createElement("button");
    tab.type = "button";
    tab.textContent = panel.dataset.tab;
    tab.id = `tab-${number}-${place}`;
    panel.id = `panel-${number}-${place}`;
    tab.setAttribute("role", "tab");
    tab.setAttribute("aria-controls", panel.id);
    panel.setAttribute("role", "tabpanel");
    panel.setAttribute("aria-labelledby", tab.id);
    tab.addEventListener("click", () => choose(box.dataset.tabs, panel.dataset.tab));
    list.append(tab);
  });
  list.addEventListener("keydown", (event) => {
    const tabs = [...list.children];
    const here = tabs.indexOf(document.activeElement);
    const places = { ArrowRight: here + 1, ArrowLeft: here - 1, Home: 0, End: tabs.length - 1 };
    if (here < 0 || !(event.key in places)) return;
    event.preventDefault();
    const next = tabs[(places[event.key] + tabs.length) % tabs.length];
    next.click();
    next.focus();
  });
  box.prepend(list);
  choose(box.dataset.tabs, panels[0].dataset.tab);
}

// Groups of one name move together, so that a dataset chosen once is chosen everywhere.
function choose(group, name) {
  for (const box of document.querySelectorAll("[data-tabs]")) {
    if (box.dataset.tabs !== group) continue;
    for (const panel of box.children) {
      if (panel.dataset.tab !== undefined) panel.hidden = panel.dataset.tab !== name;
    }
    for (const tab of box.querySelectorAll(":scope > [role=tablist] > [role=tab]")) {
      const chosen = tab.textContent === name;
      tab.setAttribute("aria-selected", String(chosen));
      tab.tabIndex = chosen ? 0 : -1;
    }
  }
  document.dispatchEvent(new CustomEvent("chosen", { detail: { group, name } }));
}

document.querySelectorAll("[data-tabs]").forEach(makeTabs);

// ---------------------------------------------------------------- methods in the charts

const boxes = [...document.querySelectorAll(".chips input")];

function showMethods() {
  const shown = new Set(boxes.filter((box) => box.checked).map((box) => box.value));
  for (const shape of document.querySelectorAll("[data-method]")) {
    shape.style.display = shown.has(shape.dataset.method) ? "" : "none";
  }
}

for (const box of boxes) {
  box.hidden = false;
  box.checked = box.dataset.shown === "1";
  box.addEventListener("change", showMethods);
}
for (const button of document.querySelectorAll("[data-group]")) {
  button.addEventListener("click", () => {
    const group = button.dataset.group;
    for (const box of boxes) {
      box.checked = group === "all" || box.dataset.groups.split(" ").includes(group);
    }
    showMethods();
  });
}
document.getElementById("groups").hidden = false;
showMethods();

// ---------------------------------------------------------------- two methods, seed by seed

const values = JSON.parse(document.getElementById("seeds").textContent);
const form = document.getElementById("comparison");
const result = document.getElementById("difference");

function fillMethods() {
  const methods = Object.keys(values[form.elements.dataset.value] ?? {});
  for (const name of ["first", "second"]) {
    const select = form.elements[name];
    const wanted = methods.includes(select.value) ? select.value : select.dataset.wanted;
    select.replaceChildren(...methods.map((method) => new Option(method)));
    const fallback = name === "first" ? methods.length - 1 : 0;
    select.selectedIndex = methods.includes(wanted) ? methods.indexOf(wanted) : fallback;
  }
}

function signed(value, digits = 1) {
  return (value < 0 ? "\u2212" : "+") + Math.abs(value).toFixed(digits);
}

function line(kind, texts) {
  const row = document.createElement("tr");
  texts.forEach((text, place) => {
    const cell = document.createElement(kind === "head" || place === 0 ? "th" : "td");
    if (cell.tagName === "TH") cell.scope = kind === "head" ? "col" : "row";
    if (place === 0) cell.className = "left";
    cell.textContent = text;
    row.append(cell);
  });
  return row;
}

// A dot for each seed, the mean with its standard error below them, and where no difference would be.
function plot(differences, mean, error) {
  const width = 420, height = 74, margin = 24;
  const ends = [0, ...differences, mean - error, mean + error].filter(Number.isFinite);
  const low = Math.min(...ends), span = Math.max(...ends) - low || 1;
  const x = (value) => (margin + ((value - low) / span) * (width - 2 * margin)).toFixed(1);
  const shapes = [
    ["line", { x1: x(0), x2: x(0), y1: 4, y2: 56, class: "zero" }],
    ...differences.map((value) => ["circle", { cx: x(value), cy: 20, r: 5, class: "seed" }]),
    ["line", { x1: x(mean - (error || 0)), x2: x(mean + (error || 0)), y1: 44, y2: 44, class: "error" }],
    ["circle", { cx: x(mean), cy: 44, r: 6, class: "mean" }],
  ];
  const hidden = "true"; // from readers aloud: the sentence and the table say the same
  const drawing = element("svg", { viewBox: `0 0 ${width} ${height}`, "aria-hidden": hidden });
  for (const [name, attributes] of shapes) drawing.append(element(name, attributes));
  const labels = Math.abs(x(mean) - x(0)) < 40 ? [] : [[0, "0"]]; // not one over the other
  for (const [value, text] of [...labels, [mean, signed(mean)]]) {
    const label = element("text", { x: x(value), y: 69, "text-anchor": "middle" });
    label.textContent = text;
    drawing.append(label);
  }
  return drawing;
}

function element(name, attributes) {
  const made = document.createElementNS("http://www.w3.org/2000/svg", name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  return made;
}

function compare() {
  const [dataset, first, second, measure] = ["dataset", "first", "second", "measure"].map((name) => form.elements[name].value);
  const more = values[dataset]?.[first]?.[measure] ?? {};
  const less = values[dataset]?.[second]?.[measure] ?? {};
  const seeds = Object.keys(more).filter((seed) => seed in less);
  const differences = seeds.map((seed) => more[seed] - less[seed]);
  const said = result.querySelector(".verdict");
  const [head, body] = [result.querySelector("thead"), result.querySelector("tbody")];
  head.replaceChildren(line("head", ["seed", first, second, "difference"]));
  body.replaceChildren(
    ...seeds.map((seed, place) =>
      line("body", [seed, more[seed].toFixed(1), less[seed].toFixed(1), signed(differences[place])])),
  );
  const drawn = result.querySelector(".plot");
  drawn.replaceChildren();
  if (!seeds.length) {
    said.textContent = `${first} and ${second} have no finished seed in common on ${dataset}.`;
    return;
  }
  const mean = differences.reduce((sum, one) => sum + one, 0) / seeds.length;
  const square = differences.reduce((sum, one) => sum + (one - mean) ** 2, 0);
  const error = Math.sqrt(square / (seeds.length - 1) / seeds.length);
  const spread = seeds.length > 1
    ? ` \u00b1 ${error.toFixed(1)} percentage points (mean \u00b1 standard error over ${seeds.length} seeds)`
    : " percentage points (1 seed, so no standard error)";
  drawn.append(plot(differences, mean, error));
  said.textContent = `${measure} of ${first} \u2212 ${second}: ${signed(mean)}${spread}`;
}

if (Object.keys(values).length) {
  fillMethods();
  compare();
  form.elements.dataset.addEventListener("change", () => {
    fillMethods();
    choose("dataset", form.elements.dataset.value);
  });
  document.addEventListener("chosen", (event) => {
    const { group, name } = event.detail;
    if (group !== "dataset" || form.elements.dataset.value === name) return;
    form.elements.dataset.value = name;
    fillMethods();
    compare();
  });
  form.addEventListener("change", compare);
  form.addEventListener("submit", (event) => event.preventDefault());
  form.hidden = false;
  result.hidden = false;
}
