"use strict";
const WIDTH = 460, HEIGHT = 210, LEFT = 42, RIGHT = 8, TOP = 8, BOTTOM = 24;

// Round steps for an axis from low to high.
function ticks(low, high, count) {
  const rough = (high - low) / count || 1, power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 5, 10].map((n) => n * power).find((n) => n >= rough);
  const found = [];
  for (let tick = Math.ceil(low / step) * step; tick <= high + step / 1e6; tick += step) found.push(+tick.toPrecision(6));
  return found;
}

// A chart of lines: series are {name, points: [[x, y], …]}; options: range of y, range of x, dots, diagonal, marks (places
// on the x axis that are pointed out) and stacked: points are then [x, top, own value], drawn as areas.
function drawLines(figure, series, options = {}) {
  series = series.filter((one) => one.points.length);
  if (!series.length) return figure.remove();
  const all = series.flatMap((one) => one.points), xs = all.map((p) => p[0]), ys = all.map((p) => p[1]);
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
  series.forEach((one, index) => {
    const color = `var(--c${index % 6})`;
    const path = one.points.map((p, i) => `${i ? "L" : "M"}${x(p[0]).toFixed(1)},${y(p[1]).toFixed(1)}`).join("");
    if (options.stacked) {
      const bottom = one.points.map((p) => `L${x(p[0]).toFixed(1)},${y(p[1] - p[2]).toFixed(1)}`).reverse().join("");
      svg.append(make("path", { class: "area", d: `${path}${bottom}Z`, style: `fill: ${color}` }));
    }
    svg.append(make("path", { class: "line", d: path, style: `stroke: ${color}` }));
    if (options.dots) one.points.forEach((p) => svg.append(make("circle", { cx: x(p[0]), cy: y(p[1]), r: 3, style: `fill: ${color}` })));
    const value = make("b");
    values.push(value);
    legend.append(make("span", {}, make("i", { style: `background: ${color}` }), `${one.name} `, value));
  });
  for (const mark of options.marks || []) {
    const place = x(Math.min(x1, Math.max(x0, mark))); // a step that failed has no point
    svg.append(make("line", { class: "mark", x1: place, x2: place, y1: TOP, y2: HEIGHT - BOTTOM }));
  }
  const cursor = make("line", { class: "cursor", y1: TOP, y2: HEIGHT - BOTTOM, visibility: "hidden" });
  svg.append(cursor);
  // The values nearest to a place on the x axis; the last ones where nothing is pointed at.
  const show = (place) => series.forEach((one, index) => {
    const point = one.points.reduce((a, b) => (Math.abs(b[0] - place) < Math.abs(a[0] - place) ? b : a));
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
// All metrics whose key matches, named by the pattern's group.
const metrics = (pattern) => Object.keys(data.training).filter((key) => pattern.test(key)).map((key) => metric(key.match(pattern)[1].replace("_", " "), key));

// The mean of the last few steps, where one step has few answers.
const SMOOTH = 5;
const smoothed = ({ name, points }) => ({
  name,
  points: points.map(([x], i) => {
    const last = points.slice(Math.max(0, i + 1 - SMOOTH), i + 1);
    return [x, last.reduce((sum, point) => sum + point[1], 0) / last.length];
  }),
});

// Where a step's time goes, in its order; the parts sum to the step.
const PARTS = ["rollout", "reward", "reference", "learn", "transfer", "idle"];
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
  gold_proxy: () => [[metric("gold", "gold"), metric("proxy", "proxy")], { y: SHARE, ...alarmsOf("hacking") }],
  reward_tier: () => [metrics(/^tier\/(.+)\/reward$/).map(smoothed), {}],
  gold_tier: () => [metrics(/^tier\/(.+)\/gold$/).map(smoothed), { y: SHARE }],
  gold_relation: () => [metrics(/^relation\/(.+)\/gold$/).map(smoothed), { y: SHARE }],
  kl: () => [[metric("all", "kl"), ...metrics(/^tier\/(.+)\/kl$/)], alarmsOf("kl")],
  length: () => [[metric("all", "response_tokens"), ...metrics(/^tier\/(.+)\/response_tokens$/)], {}],
  entropy: () => [[metric("all, exact", "entropy"), metric("all", "surprisal"), ...metrics(/^tier\/(.+)\/surprisal$/)], {}],
  refused: () => [metrics(/^tier\/(.+)\/refused$/).map(smoothed), {}],
  seconds: () => [stackedSeconds(), { stacked: true, marks: data.faults }],
  clip: () => [[metric("clipped tokens", "clip_ratio"), metric("unfinished answers", "unfinished")], {}],
  mismatch: () => [[metric("mismatch", "mismatch")], {}],
  staleness: () => [[metric("mean", "staleness"), metric("furthest behind", "staleness_max")], {}],
  critic: () => [[metric("explained variance", "explained_variance")], {}],
  reliability: () => [
    Object.entries(data.reliability).map(([name, curve]) => ({ name, points: curve.map((bin) => [bin.p, bin.share]) })),
    { x: SHARE, y: SHARE, dots: true, diagonal: true },
  ],
};
for (const figure of document.querySelectorAll("[data-chart]")) drawLines(figure, ...CHARTS[figure.dataset.chart]());
