/* Fills the page from the JSON that report.py embeds: a summary, the curves, samples, configurations, time, memory. */
"use strict";

const data = JSON.parse(document.getElementById("data").textContent);
const dark = matchMedia("(prefers-color-scheme: dark)");
const LIGHT = ["#0072B2", "#D55E00", "#00805E", "#B4538A", "#9A6A00", "#3A8FC4", "#7A3FB5", "#5B5B5B"];
const DARK = ["#5FB3F2", "#FF9250", "#3FCFA0", "#F0A3CB", "#F2C14E", "#A3D5FF", "#C8A2FF", "#C4C4C4"];
const DASHES = [[], [7, 3], [2, 3], [9, 3, 2, 3]];
const colourOf = i => (dark.matches ? DARK : LIGHT)[i % LIGHT.length];
const dashOf = i => DASHES[Math.floor(i / LIGHT.length) % DASHES.length];
const runs = data.runs;
const state = {x: "step", logX: false, logY: false, raw: true, on: runs.map(() => true), view: null};

// ---- making elements

function make(tag, attributes = {}, ...children) {
  const element = document.createElement(tag);
  for (const [key, value] of Object.entries(attributes))
    if (key === "class") element.className = value;
    else if (key.startsWith("on")) element.addEventListener(key.slice(2), value);
    else if (key === "style") element.style.cssText = value;
    else if (value !== false && value !== undefined) element.setAttribute(key, value === true ? "" : value);
  element.append(...children.filter(child => child !== null && child !== undefined));
  return element;
}
const swatchOf = i => make("i", {class: "swatch", "data-run": i, style: `background:${colourOf(i)}`});
const named = i => runs.length > 1 ? [swatchOf(i), " " + runs[i].name] : [runs[i].name];
function section(title, ...children) {
  document.getElementById("sections").append(make("h2", {}, title), ...children);
}
function table(head, rows, numbers = new Set()) {
  const cell = (tag, content, i, extra = {}) =>
    make(tag, {class: numbers.has(i) ? "number" : false, ...extra}, ...(Array.isArray(content) ? content : [content]));
  return make("div", {class: "card scroll"}, make("table", {},
    make("thead", {}, make("tr", {}, ...head.map((h, i) => cell("th", h, i, {scope: "col"})))),
    make("tbody", {}, ...rows.map(row => make("tr", {}, ...row.map((c, i) =>
      c instanceof HTMLTableCellElement ? c : cell(i ? "td" : "th", c, i)))))));
}

// ---- numbers

const plain = new Intl.NumberFormat("en", {maximumFractionDigits: 0});
const loss = v => v === null || v === undefined ? "–" : v.toPrecision(5);
const percent = v => v === null || v === undefined ? "–" : (100 * v).toFixed(1) + " %";
function duration(s) {
  if (s === null || s === undefined) return "–";
  if (s < 60) return trim(s.toPrecision(3)) + " s";
  const d = Math.floor(s / 86400), h = Math.floor(s % 86400 / 3600), m = Math.floor(s % 3600 / 60);
  if (d) return `${d} d ${h} h`;
  return h ? `${h} h ${m} min` : `${m} min ${Math.round(s % 60)} s`;
}
function bytes(n) {
  const unit = n >= 1e9 ? [1e9, "GB"] : n >= 1e6 ? [1e6, "MB"] : [1e3, "kB"];
  return (n / unit[0]).toPrecision(3) + " " + unit[1];
}

// ---- the horizontal axis

const timeUnit = () => {
  const longest = Math.max(0, ...runs.flatMap(r => r.seconds.slice(-1)));
  return longest >= 7200 ? [3600, "h"] : longest >= 120 ? [60, "min"] : [1, "s"];
};
const axes = {
  step: {label: "step", of: run => run.step, has: () => true, format: v => shortNumber(v)},
  tokens: {label: "tokens", of: run => run.tokens, has: run => run.tokens.some(v => v !== null), format: v => shortNumber(v)},
  flops: {label: "FLOPs", of: run => run.tokens.map(v => v === null ? null : v * run.flops_per_token),
          has: run => !!run.flops_per_token && axes.tokens.has(run), format: v => shortNumber(v)},
  time: {label: "time", of: run => run.seconds, has: run => run.seconds.some(v => v > 0),
         format: v => shortNumber(v / timeUnit()[0]) + " " + timeUnit()[1]},
};

/* x of a run's rows, and of steps in between, which evaluations may have. */
function place(run, steps) {
  const x = axes[state.x].of(run);
  if (state.x === "step") return steps;
  return steps.map(step => {
    let low = 0, high = run.step.length - 1;
    if (high < 0) return null;
    while (low < high) {
      const middle = (low + high) >> 1;
      if (run.step[middle] < step) low = middle + 1;
      else high = middle;
    }
    if (run.step[low] <= step || low === 0) return run.step[low] ? x[low] * (step < run.step[low] ? step / run.step[low] : 1) : x[low];
    const part = (step - run.step[low - 1]) / (run.step[low] - run.step[low - 1]);
    return x[low - 1] + part * (x[low] - x[low - 1]);
  });
}

// ---- curves

/* A chart's series of one run: rows of a column, evaluations, or parts. */
const shown = i => state.on[i] && axes[state.x].has(runs[i]);
function line(i, steps, y, more = {}) {
  const x = place(runs[i], steps), keep = x.map((v, k) => k).filter(k => x[k] !== null);
  const full = keep.length === x.length;
  return {name: runs[i].name, label: runs[i].name, colour: colourOf(i), dash: dashOf(i),
          x: full ? x : keep.map(k => x[k]), y: full ? y : keep.map(k => y[k]), steps, ...more};
}
const prefix = i => runs.length > 1 ? runs[i].name + " " : "";
function lossSeries() {
  const series = [];
  runs.forEach((run, i) => {
    if (!shown(i)) return;
    if (state.raw) series.push(line(i, run.step, run.loss, {alpha: 0.3, width: 0.8, silent: true, noScale: run.step.length > 50}));
    series.push(line(i, run.step, run.smooth, {width: 2, label: prefix(i) + "train, smoothed"}));
    series.push(line(i, run.step, run.loss, {width: 0, pointsOnly: true, noScale: true, label: prefix(i) + "train, as logged"}));
    if (run.val.step.length)
      series.push(line(i, run.val.step, run.val.loss, {width: 1, dash: [2, 3], markers: "circle", sparse: true, label: prefix(i) + "validation"}));
  });
  return series;
}
const column = key => () => runs.map((run, i) => shown(i) && run[key].some(v => v !== null) ? line(i, run.step, run[key]) : null).filter(Boolean);
function gradientSeries() {
  const series = column("grad_norm")();
  runs.forEach((run, i) => {
    if (!shown(i) || !run.skipped.length) return;
    series.push(line(i, run.skipped.map(s => s.step), run.skipped.map(s => s.grad_norm), {
      pointsOnly: true, markers: "cross", sparse: true, label: prefix(i) + "skipped", colour: theme("--warn")}));
  });
  return series;
}
/* Parts of the model: a part has a colour, a run its dashes. */
const partNames = [...new Set(runs.flatMap(run => [...Object.keys(run.parts.grad), ...Object.keys(run.parts.weight)]))];
const partSeries = key => () => runs.flatMap((run, i) => !shown(i) ? [] : Object.entries(run.parts[key]).map(([part, y]) =>
  line(i, run.parts.step, y, {label: prefix(i) + part, sparse: true, colour: colourOf(partNames.indexOf(part)), dash: DASHES[i % 4]})));
const evalSeries = key => () => runs.map((run, i) => shown(i) && run.val[key] && run.val[key].some(v => v !== null) ?
  line(i, run.val.step, run.val[key], {markers: "circle", sparse: true}) : null).filter(Boolean);
const taskSeries = (name, key) => () => runs.map((run, i) => {
  const task = run.tasks[name];
  return shown(i) && task ? line(i, task.step, task[key], {markers: "circle", sparse: true}) : null;
}).filter(Boolean);
const any = test => runs.some(test);
const taskNames = [...new Set(runs.flatMap(run => Object.keys(run.tasks)))];

const definitions = [
  {title: "Loss", note: "nats per token; pale: as logged; circles: validation", wide: true, series: lossSeries, cutStart: true, value: v => v.toPrecision(6), logs: true},
  {title: "Gradient norm", note: "before clipping; crosses: skipped steps", series: gradientSeries, logs: true},
  {title: "Learning rate", note: "", series: column("lr"), format: v => v === 0 ? "0" : v.toExponential(0).replace("e-", "e−"), zero: true},
  {title: "Tokens per second", note: "without evaluation and saving", series: column("speed"), zero: true},
  any(run => run.mfu.some(v => v !== null)) && {title: "MFU", note: "of the device's dense peak", series: column("mfu"), format: v => trim((100 * v).toFixed(1)) + "%", value: percent, zero: true},
  any(run => run.val.accuracy) && {title: "Validation accuracy", note: "of targets that count", series: evalSeries("accuracy"), format: v => trim((100 * v).toFixed(1)) + "%", value: percent},
  any(run => run.val.exact) && {title: "Exact segments", note: "all targets right", series: evalSeries("exact"), format: v => trim((100 * v).toFixed(1)) + "%", value: percent},
  ...taskNames.map(name => ({title: `Choices: ${name}`, note: "accuracy, length-normalised", series: taskSeries(name, "accuracy_norm"), format: v => trim((100 * v).toFixed(1)) + "%", value: percent})),
  any(run => Object.keys(run.parts.grad).length) && {title: "Gradient norm by part", legend: partNames, series: partSeries("grad"), logs: true},
  any(run => Object.keys(run.parts.weight).length) && {title: "Weight norm by part", legend: partNames, series: partSeries("weight"), logs: true},
].filter(Boolean);

const charts = definitions.map(definition => {
  const plot = make("div", {class: "plot"});
  const card = make("div", {class: "card chart" + (definition.wide ? " wide" : "")},
    make("div", {class: "chart-head"}, make("h3", {}, definition.title),
      definition.legend ? make("span", {class: "key"}, ...definition.legend.map((name, k) => make("span", {}, swatchOf(k), name))) :
        make("span", {class: "muted"}, definition.note)), plot);
  document.getElementById("charts").append(card);
  return {definition, card, chart: new Chart(plot, {...definition, onZoom: zoomAll})};
});

function zoomAll(view) {
  state.view = view;
  for (const {chart} of charts) chart.setView(view);
}

/* The same for all charts, so that they can be compared and zoom together. */
function extent() {
  const x = runs.flatMap((run, i) => shown(i) ? axes[state.x].of(run) : []).filter(v => v !== null && (!state.logX || v > 0));
  return x.length ? x.reduce(([low, high], v) => [Math.min(low, v), Math.max(high, v)], [Infinity, -Infinity]) : undefined;
}

function refresh() {
  const axis = axes[state.x], whole = extent();
  for (const {definition, card, chart} of charts) {
    const series = definition.series();
    chart.view = state.view;
    chart.set({series, extent: whole, logX: state.logX, logY: state.logY && !!definition.logs, xFormat: axis.format,
               xName: (x, near) => {
                 const at = near[0].series.x[near[0].i];
                 return state.x === "step" ? "step " + plain.format(at) : `${axis.label} ${axis.format(at)}`;
               }});
    card.hidden = !series.length && !definition.wide;
  }
  window.reportCharts = charts.map(({definition, chart}) => ({title: definition.title, series: chart.data.series})); // for tests
}

// ---- controls

function toggles() {
  const bar = document.getElementById("controls");
  const choice = Object.entries(axes).map(([key, axis]) => make("button", {
    type: "button", disabled: !any(axis.has), "aria-pressed": String(state.x === key), onclick: event => {
      state.x = key;
      state.view = null;
      for (const button of event.target.parentNode.querySelectorAll("button")) button.setAttribute("aria-pressed", String(button === event.target));
      refresh();
    }}, axis.label));
  const flag = (key, label) => make("button", {type: "button", "aria-pressed": String(state[key]), onclick: event => {
    state[key] = !state[key];
    if (key === "logX") state.view = null;
    event.target.setAttribute("aria-pressed", String(state[key]));
    refresh();
  }}, label);
  const zoom = (label, name, action) => make("button", {type: "button", "aria-label": name, title: name, onclick: action}, label);
  bar.append(make("span", {class: "group", role: "group", "aria-label": "Horizontal axis"}, make("span", {}, "x"), ...choice),
             make("span", {class: "group", role: "group", "aria-label": "Scales"}, flag("logX", "log x"), flag("logY", "log y"), flag("raw", "raw")),
             make("span", {class: "group", role: "group", "aria-label": "Zoom"}, zoom("+", "Zoom in", () => charts[0].chart.zoomBy(0.6)),
                  zoom("−", "Zoom out", () => charts[0].chart.zoomBy(1 / 0.6)), zoom("all", "Show everything", () => zoomAll(null))));
  if (runs.length < 2) return;
  bar.append(make("div", {class: "runs", role: "group", "aria-label": "Runs"}, ...runs.map((run, i) => {
    const label = make("label", {}, make("input", {type: "checkbox", checked: true, onchange: event => {
      state.on[i] = event.target.checked;
      label.classList.toggle("off", !state.on[i]);
      refresh();
    }}), swatchOf(i), run.name);
    return label;
  })));
}

// ---- tables

function summary() {
  const single = runs.length === 1;
  document.getElementById("title").textContent = data.title;
  document.getElementById("subtitle").textContent = (single ? "" : `${runs.length} runs · `) +
    `written ${data.written}` + (data.thinned ? ` · curves thinned to ${plain.format(data.points)} points a run` : "");
  const head = ["run", "steps", "tokens", "loss, last", "validation, last", "validation, best", "bits per byte", "tokens/s", "time", "skipped"];
  const rows = runs.map((run, i) => {
    const s = run.summary, of = s.total_steps && s.total_steps > s.step ? ` of ${plain.format(s.total_steps)}` : "";
    return [named(i), plain.format(s.step) + of, s.tokens === null ? "–" : shortNumber(s.tokens), loss(s.loss), loss(s.val),
            s.best === null ? "–" : `${loss(s.best)} at ${plain.format(s.best_step)}`, s.bits_per_byte ? s.bits_per_byte.toFixed(3) : "–",
            s.speed === null ? "–" : shortNumber(s.speed), duration(s.seconds), plain.format(s.skipped)];
  });
  const keep = head.map((_, i) => i < 2 || rows.some(row => row[i] !== "–"));
  const cut = row => row.filter((_, i) => keep[i]);
  document.getElementById("summary").append(...table(cut(head), rows.map(cut), new Set(head.map((_, i) => i).slice(1))).children);
}

function evaluations() {
  const rows = [];
  runs.forEach((run, i) => {
    for (const [name, task] of Object.entries(run.tasks)) {
      const last = task.step.length - 1;
      rows.push([named(i), name, plain.format(task.step[last]), plain.format(task.items[last]), percent(task.chance[last]), percent(task.accuracy[last]), percent(task.accuracy_norm[last])]);
    }
  });
  if (rows.length)
    section("Choices", table(["run", "task", "step", "items", "chance", "accuracy", "length-normalised"], rows, new Set([2, 3, 4, 5, 6])));
  if (!any(run => run.val.step.length)) return;
  const steps = [...new Set(runs.flatMap(run => run.val.step))].sort((a, b) => a - b);
  const lines = steps.map(step => [plain.format(step), ...runs.map(run => {
    const k = run.val.step.indexOf(step);
    return k < 0 ? "–" : loss(run.val.loss[k]);
  })]);
  section("Evaluations", make("details", {open: steps.length <= 12}, make("summary", {}, `Validation loss at ${plain.format(steps.length)} steps`),
    table(["step", ...runs.map((run, i) => named(i))], lines, new Set(steps.length ? [...runs.keys()].map(i => i + 1) : []))));
}

function samples() {
  const with_samples = runs.map((run, i) => i).filter(i => runs[i].samples.length);
  if (!with_samples.length) return;
  const steps = [...new Set(with_samples.flatMap(i => runs[i].samples.map(s => s[0])))].sort((a, b) => a - b);
  const label = make("label", {for: "sample"}), boxes = with_samples.map(i => make("pre"));
  const heads = with_samples.map(i => make("span", {class: "muted"}));
  const range = make("input", {type: "range", id: "sample", min: 0, max: steps.length - 1, value: steps.length - 1, step: 1, disabled: steps.length < 2});
  const show = () => {
    const step = steps[range.value];
    label.textContent = `Step ${plain.format(step)}`;
    range.setAttribute("aria-valuetext", label.textContent);
    with_samples.forEach((i, k) => {
      const sample = runs[i].samples.filter(s => s[0] <= step).pop();
      heads[k].textContent = sample ? ` step ${plain.format(sample[0])}` : " no sample yet";
      boxes[k].textContent = sample ? sample[1] : "";
    });
  };
  range.addEventListener("input", show);
  section("Samples", make("div", {class: "card"}, label, range,
    make("div", {class: "columns"}, ...with_samples.map((i, k) => make("div", {}, make("h3", {}, ...named(i), heads[k]), boxes[k])))));
  show();
}

function configurations() {
  const known = runs.map((run, i) => i).filter(i => Object.keys(runs[i].config).length);
  if (!known.length) return;
  const keys = [...new Set(known.flatMap(i => Object.keys(runs[i].config)))];
  const value = (i, key) => runs[i].config[key] === undefined ? "–" : runs[i].config[key];
  const rows = (list, mark) => list.map(key => [make("th", {scope: "row"}, make("code", {}, key)), ...known.map(i =>
    make("td", {class: mark && value(i, key) !== value(known[0], key) ? "differs" : false}, make("code", {}, value(i, key))))]);
  const head = ["key", ...known.map(named)];
  const differing = keys.filter(key => known.some(i => value(i, key) !== value(known[0], key)));
  const children = [];
  if (known.length > 1)
    children.push(differing.length ? table(head, rows(differing, true)) : make("p", {class: "card"}, "The configurations are the same."));
  children.push(make("details", {}, make("summary", {}, `All ${keys.length} keys`), table(head, rows(keys, known.length > 1))));
  section(known.length > 1 ? "Configuration: differences" : "Configuration", ...children);
}

function times() {
  const profiled = runs.map((run, i) => i).filter(i => runs[i].profile.length);
  if (!profiled.length) return;
  section("Where time goes", make("div", {class: "columns"}, ...profiled.map(i => {
    const all = runs[i].profile, total = all.reduce((sum, r) => sum + r[1], 0), most = all[0][1];
    const rows = all.filter(r => r[1] >= 0.002 * total), rest = all.filter(r => r[1] < 0.002 * total);
    if (rest.length) rows.push([`${rest.length} others`, ...[1, 2].map(k => rest.reduce((sum, r) => sum + r[k], 0))]);
    const card = table(["self time of", "share", "ms", "calls", ""], rows.map(([name, seconds, calls]) => [
      name, percent(seconds / total), (1e3 * seconds).toFixed(1), plain.format(calls),
      make("td", {class: "bar"}, make("i", {style: `width:${100 * seconds / most}%`}))]), new Set([1, 2, 3]));
    card.prepend(make("h3", {}, ...named(i)));
    return card;
  })), make("p", {class: "muted"}, "Of the steps that --profile traced. Operations are timed one by one."));
}

function memory() {
  const known = runs.map((run, i) => i).filter(i => runs[i].memory);
  if (!known.length) return;
  const most = Math.max(...known.map(i => Object.values(runs[i].memory).reduce((a, b) => a + b, 0)));
  section("Memory of a rank", make("div", {class: "columns"}, ...known.map(i => {
    const parts = Object.entries(runs[i].memory).filter(([, n]) => n > 0), total = parts.reduce((sum, [, n]) => sum + n, 0);
    return make("div", {class: "card"}, make("h3", {}, ...named(i), make("span", {class: "muted"}, ` planned ${bytes(total)}` +
        (runs[i].peak ? `; largest of the process ${bytes(runs[i].peak)}` : ""))),
      make("div", {class: "stack", style: `width:${100 * total / most}%`}, ...parts.map(([, n], k) =>
        make("i", {"data-run": k, style: `width:${100 * n / total}%;background:${colourOf(k)}`}))),
      make("dl", {class: "legend"}, ...parts.map(([name, n], k) => make("div", {},
        make("i", {class: "swatch", "data-run": k, style: `background:${colourOf(k)}`}), make("dt", {}, name), make("dd", {}, bytes(n))))));
  })));
}

function skipped() {
  const rows = runs.flatMap((run, i) => run.skipped.map(s => [named(i), plain.format(s.step), loss(s.loss), shortNumber(s.grad_norm)]));
  if (!rows.length) return;
  section("Skipped steps", make("details", {open: rows.length <= 20}, make("summary", {}, `${plain.format(rows.length)} steps`),
    table(["run", "step", "loss", "gradient norm"], rows.slice(0, 500), new Set([1, 2, 3]))));
}

function starts() {
  const rows = runs.flatMap((run, i) => run.starts.map(s => [named(i), s.time, plain.format(s.step), [make("code", {}, s.command)],
    s.device + (s.ranks > 1 ? `; ${s.ranks} ranks` : "")]));
  if (rows.length) section("Commands and machines", table(["run", "started", "at step", "command", "device"], rows, new Set([2])));
}

summary();
toggles();
refresh();
evaluations();
samples();
configurations();
times();
memory();
skipped();
starts();
dark.addEventListener("change", () => {
  for (const element of document.querySelectorAll("[data-run]")) element.style.backgroundColor = colourOf(+element.dataset.run);
  refresh();
});
