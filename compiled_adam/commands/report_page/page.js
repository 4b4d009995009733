"use strict";
const charts = JSON.parse(document.getElementById("charts").textContent);
const COLORS = ["#3b82f6", "#f97316", "#10b981", "#a855f7", "#ef4444", "#06b6d4", "#ca8a04", "#ec4899"];

const ink = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();

/** A number as people write it: 12K, 0.05, 2e-5. */
function text(value, digits) {
  if (value == null) return "–";
  const size = Math.abs(value);
  if (size !== 0 && (size < 1e-4 || size >= 1e15)) {
    const [mantissa, exponent] = value.toExponential(digits - 1).split("e");
    return `${Number(mantissa)}e${Number(exponent)}`;
  }
  return size < 1e4 ? String(Number(value.toPrecision(digits))) : value.toLocaleString("en-US", { maximumFractionDigits: 0 });
}

function short(value) {
  const size = Math.abs(value);
  if (size < 1e4 || size >= 1e15) return text(value, 4);
  return value.toLocaleString("en-US", { notation: "compact", maximumSignificantDigits: 3 });
}

function evenTicks(low, high, count) {
  const raw = (high - low) / count, power = 10 ** Math.floor(Math.log10(raw));
  const step = power * ([1, 2, 5].find((each) => each * power >= raw) || 10);
  const found = [];
  for (let i = Math.ceil(low / step); i * step <= high; i++) found.push(Number((i * step).toPrecision(12)));
  return found;
}

/** Ticks of a logarithmic axis: the coarsest of a few usual rows that has enough of them. */
function logTicks(low, high) {
  for (const digits of [[1], [1, 3], [1, 2, 5]]) {
    const found = [];
    for (let power = Math.floor(Math.log10(low)); power <= Math.log10(high); power++)
      for (const digit of digits) {
        const tick = Number(`${digit}e${power}`);
        if (tick >= low && tick <= high) found.push(tick);
      }
    if (found.length >= 3) return found.filter((_, i) => i % Math.ceil(found.length / 8) === 0);
  }
  return evenTicks(low, high, 5);
}

function range(chart, log) {
  return (plot, low, high) => {
    if (low == null) return log ? [1, 10] : [0, 1];
    if (log) {
      const pad = Math.max(1.02, (high / low) ** 0.05);
      return [low / pad, high * pad];
    }
    const pad = (high - low) * 0.05 || Math.abs(high) * 0.5 || 1;
    return [chart.zero ? 0 : low - pad, high + pad];
  };
}

/** What a series of a style looks like. */
function look(series) {
  const color = COLORS[series.color % COLORS.length];
  const marks = (size, fill) => ({ show: true, size, stroke: color, fill, width: 2 });
  const alone = { paths: () => null };
  const few = series.x.length < 60;
  return {
    label: series.label,
    stroke: color,
    value: (plot, value) => text(value, 5),
    ...{
      line: { width: 2, points: { show: series.x.length === 1, size: 6, fill: color } },
      faint: { width: 1, alpha: 0.35, points: { show: false } },
      dashed: { width: 2, dash: [6, 4], points: few ? marks(6, color) : { show: false } },
      steps: { width: 2, paths: uPlot.paths.stepped({ align: 1 }), points: { show: false } },
      dots: { ...alone, points: marks(4, color) },
      crosses: { ...alone, points: marks(7, ink("--card")) },
      best: { ...alone, points: marks(13, "transparent") },
    }[series.style],
  };
}

/** The nearest point of a series, since series have points at different iterations. */
function nearest(plot, series, at) {
  const values = plot.data[series];
  if (series === 0 || values[at] != null) return at;
  for (let far = 1; far < values.length; far++) {
    if (values[at - far] != null) return at - far;
    if (values[at + far] != null) return at + far;
  }
  return at;
}

function axis(more) {
  return { stroke: ink("--soft"), grid: { stroke: ink("--line"), width: 1 }, ticks: { show: false }, font: "12px system-ui", ...more };
}

function drawn(chart, box, log) {
  const steps = [1, 2, 5].flatMap((digit) => Array.from({ length: 12 }, (_, i) => digit * 10 ** i)).sort((a, b) => a - b);
  const whole = chart.series.every((each) => each.y.every(Number.isInteger)); // counts have no halves
  const options = {
    width: box.clientWidth,
    height: Math.round(Math.min(320, Math.max(200, box.clientWidth * 0.5))),
    cursor: { sync: { key: "iteration" }, dataIdx: nearest, points: { size: 7 } },
    scales: {
      x: { time: false, range: (plot, low, high) => (low == null ? [0, 1] : low === high ? [low - 1, high + 1] : [low, high]) },
      y: { distr: log ? 3 : 1, range: range(chart, log) },
    },
    axes: [
      axis({ size: 30, incrs: steps, values: (plot, ticks) => ticks.map(short) }),
      axis({
        splits: (plot, which, low, high) =>
          (log ? logTicks(low, high) : evenTicks(low, high, 7)).filter((tick) => !whole || Number.isInteger(tick)),
        filter: (plot, ticks) => ticks, // uPlot's own would hide some of a logarithmic axis
        values: (plot, ticks) => ticks.map(short),
        size: (plot, ticks) => 16 + 7 * Math.max(3, ...(ticks || []).map((tick) => tick.length)),
      }),
    ],
    series: [{ label: "iteration", value: (plot, value) => text(value, 9) }, ...chart.series.map(look)],
  };
  return new uPlot(options, uPlot.join(chart.series.map((each) => [each.x, each.y])), box);
}

/** What was chosen stays when a live page loads itself again. */
function kept(name, value) {
  try {
    if (value !== undefined) sessionStorage.setItem(name, value);
    return sessionStorage.getItem(name);
  } catch {
    return null; // a browser may forbid it
  }
}

document.querySelectorAll(".charts figure").forEach((figure, number) => {
  const chart = charts[number], box = figure.querySelector(".plot"), button = figure.querySelector("button");
  let log = (kept(chart.title) ?? String(chart.log)) === "true" && chart.positive;
  let plot = null;
  const draw = () => {
    if (plot) plot.destroy();
    plot = drawn(chart, box, log);
    button.setAttribute("aria-pressed", String(log));
  };
  button.hidden = !chart.positive;
  button.addEventListener("click", () => {
    log = !log;
    kept(chart.title, String(log));
    draw();
  });
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", draw);
  new ResizeObserver(() => plot && plot.setSize({ width: box.clientWidth, height: plot.height })).observe(box);
  draw();
});
