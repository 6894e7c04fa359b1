/* A line chart on a canvas: hover, zoom by dragging, pinching and keys, logarithmic axes. Its values are those it is
 * given; where more of them lie in one column of pixels than can be told apart, the canvas draws them all.
 *
 *   new Chart(element, {title, format, value, zero, cutStart, onZoom})    then set({series, x, logX, logY}) as often as needed
 *   series: [{name, colour, dash, width, alpha, markers, x: [], y: [], label}]; a y of null is a gap
 *     silent: not under the cursor; noScale: may leave the vertical axis; sparse: few points; pointsOnly: no line */
"use strict";

const theme = name => getComputedStyle(document.documentElement).getPropertyValue(name).trim();

function shortNumber(v) {
  if (v === null || v === undefined || Number.isNaN(v)) return "–";
  const a = Math.abs(v);
  for (const [unit, name] of [[1e21, "Z"], [1e18, "E"], [1e15, "P"], [1e12, "T"], [1e9, "G"], [1e6, "M"], [1e4, "k"]])
    if (a >= unit) return trim((v / (unit === 1e4 ? 1e3 : unit)).toPrecision(4)) + name;
  if (a !== 0 && a < 1e-3) return v.toExponential(2);
  return trim(v.toPrecision(5));
}
const trim = text => text.includes(".") ? text.replace(/\.?0+$/, "") : text;

/* Round values between low and high, about `count` of them. */
function linearTicks(low, high, count) {
  const rough = (high - low) / Math.max(1, count), power = 10 ** Math.floor(Math.log10(rough));
  const step = power * [1, 2, 5, 10].find(m => m * power >= rough * 0.999);
  const ticks = [];
  for (let i = Math.ceil(low / step - 1e-9); i * step <= high + 1e-9 * step; i++) ticks.push(+(i * step).toPrecision(12));
  return ticks;
}
function logTicks(low, high, count) {
  const decades = Math.log10(high / low);
  if (decades < 1.2) return linearTicks(low, high, count).filter(t => t > 0);
  const factors = decades > count ? [1] : decades * 3 > count ? [1, 3] : [1, 2, 5];
  const every = Math.max(1, Math.ceil(decades / count)), ticks = [];
  for (let p = Math.floor(Math.log10(low)); p <= Math.log10(high); p++)
    if (p % every === 0)
      for (const f of factors) if (f * 10 ** p >= low && f * 10 ** p <= high) ticks.push(f * 10 ** p);
  return ticks;
}

class Chart {
  constructor(element, options) {
    this.element = element;
    this.options = options;
    this.data = {series: [], logX: false, logY: false};
    this.view = null;      // [low, high] of x, null: everything
    this.cursor = null;    // x under the pointer
    this.canvas = document.createElement("canvas");
    this.canvas.tabIndex = 0;
    this.canvas.setAttribute("role", "img");
    this.tip = document.createElement("div");
    this.tip.className = "tip";
    this.tip.setAttribute("aria-live", "polite");
    this.tip.hidden = true;
    element.append(this.canvas, this.tip);
    this.listen();
    new ResizeObserver(() => this.draw()).observe(element);
  }

  set(data) {
    this.data = data;
    this.draw();
  }

  // ---- scales

  scales() {
    const {series, logX, logY} = this.data;
    let [x0, x1] = this.view || this.extent();
    let y0 = Infinity, y1 = -Infinity;
    for (const s of series)
      for (let i = 0; i < s.x.length; i++) {
        const y = s.y[i];
        if (y === null || s.x[i] < x0 || s.x[i] > x1 || (logY && y <= 0) || s.noScale) continue;
        if (y < y0) y0 = y;
        if (y > y1) y1 = y;
      }
    if (y0 > y1) [y0, y1] = logY ? [1, 10] : [0, 1];
    if (this.options.cutStart && !this.view && !logY) y1 = Math.min(y1, this.withoutStart(y0));
    if (logY) {
      const pad = (y1 / y0) ** 0.05 || 1;
      [y0, y1] = y0 === y1 ? [y0 / 2, y1 * 2] : [y0 / pad, y1 * pad];
    } else {
      const pad = 0.06 * (y1 - y0) || Math.abs(y1) * 0.1 || 1;
      const zero = y0 >= 0 && this.options.zero;
      [y0, y1] = [zero ? 0 : y0 - pad, y1 + pad];
    }
    if (x0 === x1) [x0, x1] = logX ? [x0 / 2, x1 * 2] : [x0 - 1, x1 + 1];
    const fx = logX ? Math.log : v => v, fy = logY ? Math.log : v => v, p = this.plot;
    const kx = (p.right - p.left) / (fx(x1) - fx(x0)), ky = (p.bottom - p.top) / (fy(y1) - fy(y0));
    return {x0, x1, y0, y1, fx, px: x => p.left + (fx(x) - fx(x0)) * kx, py: y => p.bottom - (fy(y) - fy(y0)) * ky,
            toX: px => { const v = fx(x0) + (px - p.left) / kx; return logX ? Math.exp(v) : v; }};
  }

  /* The top of the axis where the fall from a curve's beginning would leave the rest little room: the later nine tenths
   * of the points, and a part of the fall. */
  withoutStart(low) {
    let later = -Infinity;
    for (const s of this.data.series)
      if (!s.noScale) for (let i = Math.floor(s.x.length / 10); i < s.x.length; i++) if (s.y[i] > later) later = s.y[i];
    return later > low ? low + 1.5 * (later - low) : Infinity;
  }

  /* Where all of x lies; on a logarithmic axis, the positive part. */
  extent() {
    if (this.data.extent) return this.data.extent;
    let low = Infinity, high = -Infinity;
    for (const s of this.data.series)
      for (let i = 0; i < s.x.length; i++) {
        if (s.y[i] === null || (this.data.logX && s.x[i] <= 0)) continue;
        if (s.x[i] < low) low = s.x[i];
        if (s.x[i] > high) high = s.x[i];
      }
    if (low > high) return this.data.logX ? [1, 10] : [0, 1];
    return [low, high];
  }

  // ---- drawing

  draw() {
    const ratio = window.devicePixelRatio || 1, width = this.element.clientWidth, height = this.element.clientHeight;
    if (!width || !height) return;
    this.canvas.width = Math.round(width * ratio);
    this.canvas.height = Math.round(height * ratio);
    const c = this.context = this.canvas.getContext("2d");
    c.setTransform(ratio, 0, 0, ratio, 0, 0);
    c.clearRect(0, 0, width, height);
    c.font = "12px system-ui, sans-serif";
    this.plot = {left: 52, right: width - 12, top: 8, bottom: height - 24};
    const s = this.scale = this.scales();
    this.drawGrid(c, s);
    c.save();
    c.beginPath();
    c.rect(this.plot.left, this.plot.top - 2, this.plot.right - this.plot.left, this.plot.bottom - this.plot.top + 4);
    c.clip();
    for (const series of this.data.series) this.drawSeries(c, s, series);
    if (this.drag) {
      c.fillStyle = theme("--selection");
      c.fillRect(Math.min(this.drag[0], this.drag[1]), this.plot.top, Math.abs(this.drag[1] - this.drag[0]),
                 this.plot.bottom - this.plot.top);
    }
    if (this.cursor !== null) this.drawCursor(c, s);
    c.restore();
    this.canvas.setAttribute("aria-label", this.description());
  }

  drawGrid(c, s) {
    const p = this.plot;
    const yCount = Math.max(2, Math.floor((p.bottom - p.top) / 42)), xCount = Math.max(2, Math.floor((p.right - p.left) / 80));
    c.lineWidth = 1;
    c.fillStyle = theme("--muted");
    c.strokeStyle = theme("--grid");
    c.textAlign = "right";
    c.textBaseline = "middle";
    for (const t of this.data.logY ? logTicks(s.y0, s.y1, yCount) : linearTicks(s.y0, s.y1, yCount)) {
      const y = Math.round(s.py(t)) + 0.5;
      if (y < p.top - 1 || y > p.bottom + 1) continue;
      c.beginPath();
      c.moveTo(p.left, y);
      c.lineTo(p.right, y);
      c.stroke();
      c.fillText(this.options.format ? this.options.format(t) : shortNumber(t), p.left - 7, y);
    }
    c.textBaseline = "top";
    for (const t of this.data.logX ? logTicks(s.x0, s.x1, xCount) : linearTicks(s.x0, s.x1, xCount)) {
      const x = s.px(t), text = this.data.xFormat(t), half = c.measureText(text).width / 2;
      if (x < p.left - 1 || x > p.right + 1) continue;
      c.textAlign = x + half > p.right + 10 ? "right" : "center";
      c.fillText(text, Math.min(x, p.right + 10), p.bottom + 8);
    }
    c.strokeStyle = theme("--axis");
    c.beginPath();
    c.moveTo(p.left, p.bottom + 0.5);
    c.lineTo(p.right, p.bottom + 0.5);
    c.stroke();
  }

  drawSeries(c, s, series) {
    const {x, y} = series, logX = this.data.logX, logY = this.data.logY;
    c.strokeStyle = c.fillStyle = series.colour;
    c.globalAlpha = series.alpha || 1;
    c.lineWidth = series.width || 1.6;
    c.lineJoin = "round";
    c.setLineDash(series.dash || []);
    let open = false, alone = false, lastX = 0, lastY = 0;
    c.beginPath();
    const dot = () => { if (alone) { c.moveTo(lastX + 1.5, lastY); c.arc(lastX, lastY, 1.5, 0, 7); } };
    if (!series.pointsOnly)
      for (let i = 0; i < x.length; i++) {
        if (y[i] === null || (logX && x[i] <= 0) || (logY && y[i] <= 0)) {
          dot();
          open = alone = false;
          continue;
        }
        lastX = s.px(x[i]);
        lastY = s.py(y[i]);
        if (open) c.lineTo(lastX, lastY);
        else c.moveTo(lastX, lastY);
        alone = !open;
        open = true;
      }
    dot();
    c.stroke();
    c.setLineDash([]);
    if (series.markers) {
      const visible = x.filter((v, i) => y[i] !== null && v >= s.x0 && v <= s.x1).length;
      const every = Math.max(1, Math.ceil(visible / 60)); // more would be a band
      c.lineWidth = 1.6;
      for (let i = x.length - 1; i >= 0; i -= every) {
        if (y[i] === null || (logX && x[i] <= 0) || (logY && y[i] <= 0)) continue;
        this.drawMarker(c, s.px(x[i]), s.py(y[i]), series.markers);
      }
    }
    c.globalAlpha = 1;
  }

  drawMarker(c, x, y, kind) {
    c.beginPath();
    if (kind === "cross") {
      c.moveTo(x - 4, y - 4); c.lineTo(x + 4, y + 4);
      c.moveTo(x - 4, y + 4); c.lineTo(x + 4, y - 4);
    } else {
      c.arc(x, y, 3.2, 0, 7);
      c.save();
      c.fillStyle = theme("--card");
      c.fill();
      c.restore();
    }
    c.stroke();
  }

  drawCursor(c, s) {
    const x = s.px(this.cursor);
    c.strokeStyle = theme("--muted");
    c.lineWidth = 1;
    c.beginPath();
    c.moveTo(Math.round(x) + 0.5, this.plot.top);
    c.lineTo(Math.round(x) + 0.5, this.plot.bottom);
    c.stroke();
    for (const {series, i} of this.nearest()) {
      if (this.data.logY && series.y[i] <= 0) continue;
      c.fillStyle = series.colour;
      c.beginPath();
      c.arc(s.px(series.x[i]), s.py(series.y[i]), 4, 0, 7);
      c.fill();
    }
  }

  // ---- reading values

  /* For each series the point that is nearest to the cursor, and that is not far from it. */
  nearest() {
    const found = [], s = this.scale;
    for (const series of this.data.series) {
      if (series.silent) continue;
      const {x, y} = series;
      let low = 0, high = x.length - 1;
      while (low < high) {
        const middle = (low + high) >> 1;
        if (x[middle] < this.cursor) low = middle + 1;
        else high = middle;
      }
      let best = -1;
      for (const step of [-1, 1])
        for (let i = step < 0 ? low - 1 : low; i >= 0 && i < x.length; i += step)
          if (y[i] !== null && !(this.data.logX && x[i] <= 0)) {
            if (best < 0 || Math.abs(s.px(x[i]) - s.px(this.cursor)) < Math.abs(s.px(x[best]) - s.px(this.cursor))) best = i;
            break;
          }
      const gap = series.sparse ? 24 : 60;
      if (best >= 0 && Math.abs(s.px(x[best]) - s.px(this.cursor)) <= gap) found.push({series, i: best});
    }
    return found;
  }

  showTip() {
    const near = this.cursor === null ? [] : this.nearest();
    this.tip.hidden = near.length === 0;
    if (!near.length) return;
    this.tip.replaceChildren();
    const head = document.createElement("b");
    head.textContent = this.data.xName(this.cursor, near);
    this.tip.append(head);
    for (const {series, i} of near) {
      const row = document.createElement("div"), swatch = document.createElement("i"), value = document.createElement("span");
      swatch.style.background = series.colour;
      value.textContent = (this.options.value || shortNumber)(series.y[i]);
      row.append(swatch, document.createTextNode(series.label || series.name), value);
      this.tip.append(row);
    }
    const x = this.scale.px(this.cursor), width = this.tip.offsetWidth, room = this.element.clientWidth;
    this.tip.style.left = Math.max(0, Math.min(room - width, x + (x > room / 2 ? -width - 12 : 12))) + "px";
    this.tip.style.top = this.plot.top + 4 + "px";
  }

  description() {
    const parts = this.data.series.filter(s => !s.silent && s.x.length).map(s => {
      const i = s.y.findLastIndex(y => y !== null);
      return i < 0 ? "" : `${s.label || s.name}: last ${shortNumber(s.y[i])}`;
    });
    return `${this.options.title}. ${parts.filter(Boolean).join("; ")}. Arrow keys move the cursor, plus and minus zoom, 0 shows everything.`;
  }

  // ---- pointer and keys

  place(x) {
    this.cursor = x;
    this.draw();
    this.showTip();
  }

  /* Zoom to [low, high] of x; charts that share an axis follow. */
  zoom(view) {
    if (view) {
      const [low, high] = this.extent();
      view = [Math.max(low, view[0]), Math.min(high, view[1])];
      if (!(view[1] > view[0])) return;
      if (view[0] <= low && view[1] >= high) view = null;
    }
    this.options.onZoom ? this.options.onZoom(view) : this.setView(view);
  }

  setView(view) {
    this.view = view;
    this.draw();
    this.showTip();
  }

  zoomBy(factor, centre) {
    const s = this.scale, log = this.data.logX, f = log ? Math.log : v => v, back = log ? Math.exp : v => v;
    const c = f(centre === undefined ? (this.cursor ?? back((f(s.x0) + f(s.x1)) / 2)) : centre);
    this.zoom([back(c - (c - f(s.x0)) * factor), back(c + (f(s.x1) - c) * factor)]);
  }

  move(pixels) {
    const s = this.scale, low = s.toX(this.plot.left + pixels), high = s.toX(this.plot.right + pixels), [a, b] = this.extent();
    if (low >= a && high <= b) this.zoom([low, high]);
  }

  listen() {
    const c = this.canvas, at = e => {
      const box = c.getBoundingClientRect();
      return Math.max(this.plot.left, Math.min(this.plot.right, e.clientX - box.left));
    };
    const touches = new Map();
    let pinch = 0;
    c.addEventListener("pointerdown", e => {
      if (e.pointerType === "touch") {
        touches.set(e.pointerId, e.clientX);
        if (touches.size === 2) pinch = spread();
        this.place(this.scale.toX(at(e)));
      } else if (e.button === 0) {
        this.drag = [at(e), at(e)];
        c.setPointerCapture(e.pointerId);
      }
    });
    const spread = () => { const [a, b] = [...touches.values()]; return Math.max(20, Math.abs(a - b)); };
    c.addEventListener("pointermove", e => {
      if (touches.has(e.pointerId)) touches.set(e.pointerId, e.clientX);
      if (touches.size === 2) {
        const now = spread();
        if (Math.abs(now - pinch) > 6) { this.zoomBy(pinch / now); pinch = now; }
        return;
      }
      if (this.drag) this.drag[1] = at(e);
      this.place(this.scale.toX(at(e)));
    });
    const end = e => {
      touches.delete(e.pointerId);
      if (!this.drag) return;
      const [a, b] = this.drag;
      this.drag = null;
      if (e.type === "pointerup" && Math.abs(a - b) > 5) this.zoom([this.scale.toX(Math.min(a, b)), this.scale.toX(Math.max(a, b))]);
      else this.draw();
    };
    c.addEventListener("pointerup", end);
    c.addEventListener("pointercancel", end);
    c.addEventListener("pointerleave", e => { if (e.pointerType !== "touch" && document.activeElement !== c) this.place(null); });
    c.addEventListener("blur", () => this.place(null));
    c.addEventListener("dblclick", () => this.zoom(null));
    c.addEventListener("wheel", e => {
      if (!e.ctrlKey && !e.metaKey) return; // the page scrolls
      e.preventDefault();
      this.zoomBy(e.deltaY > 0 ? 1.25 : 0.8, this.scale.toX(at(e)));
    }, {passive: false});
    c.addEventListener("keydown", e => {
      const step = (this.plot.right - this.plot.left) / (e.shiftKey ? 10 : 100);
      const now = this.cursor === null ? (this.plot.left + this.plot.right) / 2 : this.scale.px(this.cursor);
      const clamp = px => Math.max(this.plot.left, Math.min(this.plot.right, px));
      const moves = {ArrowLeft: () => now - step < this.plot.left ? (this.move(-10 * step), this.place(this.cursor)) : this.place(this.scale.toX(clamp(now - step))),
                     ArrowRight: () => now + step > this.plot.right ? (this.move(10 * step), this.place(this.cursor)) : this.place(this.scale.toX(clamp(now + step))),
                     Home: () => this.place(this.scale.x0), End: () => this.place(this.scale.x1),
                     "+": () => this.zoomBy(0.7), "=": () => this.zoomBy(0.7), "-": () => this.zoomBy(1 / 0.7),
                     0: () => this.zoom(null), Escape: () => { this.zoom(null); this.place(null); }};
      if (!moves[e.key] || e.ctrlKey || e.metaKey || e.altKey) return;
      e.preventDefault();
      moves[e.key]();
    });
  }
}
