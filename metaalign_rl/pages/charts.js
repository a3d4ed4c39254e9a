"use strict";
const WIDTH = 460, HEIGHT = 210, LEFT = 42, RIGHT = 8, TOP = 8, BOTTOM = 24;

// Round tick values for an axis from low to high.
function ticks(low, high, count) {
  const rough = (high - low) / count || 1, power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 5, 10].map((n) => n * power).find((n) => n >= rough);
  const values = [];
  for (let tick = Math.ceil(low / step) * step; tick <= high + step / 1e6; tick += step) values.push(+tick.toPrecision(6));
  return values;
}

// Draws a line chart. Each series is {name, points: [[x, y], …]}. Options:
// - x, y: range of an axis
// - dots: mark each point
// - diagonal: draw the line from (0, 0) to (1, 1)
// - marks: x values to mark with a vertical line
// - stacked: draw areas; points are [x, top, value]
function drawLines(figure, series, options = {}) {
  series = series.filter((line) => line.points.length);
  if (!series.length) return figure.remove();
  const all = series.flatMap((line) => line.points), xs = all.map((p) => p[0]), ys = all.map((p) => p[1]);
  const [x0, x1] = options.x || [Math.min(...xs), Math.max(Math.min(...xs) + 1, ...xs)];
  let [y0, y1] = options.y || [Math.min(0, ...ys), Math.max(...ys)];
  if (y0 === y1) y1 = y0 + 1;
  const x = (value) => LEFT + ((value - x0) / (x1 - x0)) * (WIDTH - LEFT - RIGHT);
  const y = (value) => HEIGHT - BOTTOM - ((value - y0) / (y1 - y0)) * (HEIGHT - TOP - BOTTOM);
  const title = figure.querySelector("figcaption b").textContent;
  const svg = make("svg", { viewBox: `0 0 ${WIDTH} ${HEIGHT}`, role: "img", "aria-label": title });
  for (const tick of ticks(y0, y1, 4)) {
    svg.append(make("line", { class: "grid", x1: LEFT, x2: WIDTH - RIGHT, y1: y(tick), y2: y(tick) }));
    svg.append(make("text", { x: LEFT - 6, y: y(tick) + 4, "text-anchor": "end" }, number(tick)));
  }
  for (const tick of ticks(x0, x1, 6)) svg.append(make("text", { x: x(tick), y: HEIGHT - 6, "text-anchor": "middle" }, number(tick)));
  if (options.diagonal) svg.append(make("line", { class: "diagonal", x1: x(0), y1: y(0), x2: x(1), y2: y(1) }));
  const legend = make("div", { class: "legend" }), values = [];
  series.forEach((line, index) => {
    const color = `var(--c${index % 6})`;
    const path = line.points.map((p, i) => `${i ? "L" : "M"}${x(p[0]).toFixed(1)},${y(p[1]).toFixed(1)}`).join("");
    if (options.stacked) {
      const bottom = line.points.map((p) => `L${x(p[0]).toFixed(1)},${y(p[1] - p[2]).toFixed(1)}`).reverse().join("");
      svg.append(make("path", { class: "area", d: `${path}${bottom}Z`, style: `fill: ${color}` }));
    }
    svg.append(make("path", { class: "line", d: path, style: `stroke: ${color}` }));
    if (options.dots) line.points.forEach((p) => svg.append(make("circle", { cx: x(p[0]), cy: y(p[1]), r: 3, style: `fill: ${color}` })));
    const value = make("b");
    values.push(value);
    legend.append(make("span", {}, make("i", { style: `background: ${color}` }), `${line.name} `, value));
  });
  for (const mark of options.marks || []) {
    const place = x(Math.min(x1, Math.max(x0, mark))); // a failed step has no point, so it can be outside the range
    svg.append(make("line", { class: "mark", x1: place, x2: place, y1: TOP, y2: HEIGHT - BOTTOM }));
  }
  const cursor = make("line", { class: "cursor", y1: TOP, y2: HEIGHT - BOTTOM, visibility: "hidden" });
  svg.append(cursor);
  // Shows the values nearest to an x value. Without a pointer these are the last ones.
  const show = (place) => series.forEach((line, index) => {
    const point = line.points.reduce((a, b) => (Math.abs(b[0] - place) < Math.abs(a[0] - place) ? b : a));
    values[index].textContent = number(point[2] ?? point[1]);
  });
  svg.addEventListener("pointermove", (event) => {
    const box = svg.getBoundingClientRect();
    const raw = x0 + (((event.clientX - box.left) / box.width) * WIDTH - LEFT) / (WIDTH - LEFT - RIGHT) * (x1 - x0);
    const place = series[0].points.reduce((a, b) => (Math.abs(b[0] - raw) < Math.abs(a[0] - raw) ? b : a))[0];
    cursor.setAttribute("x1", x(place));
    cursor.setAttribute("x2", x(place));
    cursor.setAttribute("visibility", "visible");
    show(place);
  });
  svg.addEventListener("pointerleave", () => { cursor.setAttribute("visibility", "hidden"); show(x1); });
  show(x1);
  figure.append(svg, legend);
}

const metric = (name, key) => ({
  name,
  points: (data.training[key] || []).map((value, i) => [data.training.step[i], value]).filter((p) => p[1] !== null),
});
// All metrics whose key matches, named after the pattern's group.
const metrics = (pattern) => Object.keys(data.training).filter((key) => pattern.test(key)).map((key) => metric(key.match(pattern)[1].replace("_", " "), key));

// The mean of the last few points, because one step has few responses of each kind.
const SMOOTH = 5;
const smoothed = ({ name, points }) => ({
  name,
  points: points.map(([x], i) => {
    const recent = points.slice(Math.max(0, i + 1 - SMOOTH), i + 1);
    return [x, recent.reduce((sum, point) => sum + point[1], 0) / recent.length];
  }),
});

// The parts of a step's time, in order. They sum to the step.
const PARTS = ["rollout", "reward", "reference", "learn", "transfer", "evaluate", "idle"];
function stackedSeconds() {
  const tops = data.training.step.map(() => 0);
  return PARTS.filter((part) => data.training[`seconds_${part}`]).map((part) => ({
    name: part,
    points: data.training[`seconds_${part}`].map((own, i) => [data.training.step[i], (tops[i] += own || 0), own || 0]),
  }));
}

const alarmsOf = (kind) => ({ marks: data.alarms.filter((alarm) => alarm.kind === kind).map((alarm) => alarm.step) });

const SHARE = [0, 1];
const CHARTS = {
  gold_proxy: () => [[metric("gold", "gold"), metric("proxy", "proxy"), metric("gold, held out", "held_out_gold")], { y: SHARE, ...alarmsOf("hacking") }],
  reward_tier: () => [metrics(/^tier\/(.+)\/reward$/).map(smoothed), {}],
  gold_tier: () => [metrics(/^tier\/(.+)\/gold$/).map(smoothed), { y: SHARE }],
  gold_relation: () => [metrics(/^relation\/(.+)\/gold$/).map(smoothed), { y: SHARE }],
  kl: () => [[metric("all", "kl"), ...metrics(/^tier\/(.+)\/kl$/)], alarmsOf("kl")],
  length: () => [[metric("all", "response_tokens"), ...metrics(/^tier\/(.+)\/response_tokens$/)], {}],
  entropy: () => [[metric("exact, all", "entropy"), metric("estimate, all", "surprisal"), ...metrics(/^tier\/(.+)\/surprisal$/)], {}],
  refused: () => [metrics(/^tier\/(.+)\/refused$/).map(smoothed), {}],
  seconds: () => [stackedSeconds(), { stacked: true, marks: data.faults }],
  clip: () => [[metric("clipped tokens", "clip_ratio"), metric("truncated responses", "unfinished")], {}],
  mismatch: () => [[metric("mismatch", "mismatch")], {}],
  staleness: () => [[metric("mean", "staleness"), metric("maximum", "staleness_max")], {}],
  critic: () => [[metric("explained variance", "explained_variance")], {}],
  reliability: () => [
    Object.entries(data.reliability).map(([name, curve]) => ({ name, points: curve.map((bin) => [bin.p, bin.share]) })),
    { x: SHARE, y: SHARE, dots: true, diagonal: true },
  ],
};
for (const figure of document.querySelectorAll("[data-chart]")) drawLines(figure, ...CHARTS[figure.dataset.chart]());
