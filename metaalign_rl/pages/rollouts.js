"use strict";

const PAGE = 20;

const overrated = (sample) => (sample.gold === null || sample.proxy === null ? -2 : sample.proxy - sample.gold);
const SORTS = {
  "first step first": (a, b) => a.step - b.step,
  "last step first": (a, b) => b.step - a.step,
  "highest reward first": (a, b) => b.reward - a.reward,
  "lowest reward first": (a, b) => a.reward - b.reward,
  "longest first": (a, b) => b.tokens - a.tokens,
  "shortest first": (a, b) => a.tokens - b.tokens,
  "proxy above gold first": (a, b) => overrated(b) - overrated(a),
};

// The answers in the scripts beside the page, each of which calls `addRollouts` with rows and samples as the page's.
async function loadParts(count, tell) {
  const rows = [], samples = [];
  window.addRollouts = (part) => {
    for (const sample of part.samples) samples.push({ ...sample, row: sample.row + rows.length });
    rows.push(...part.rows);
  };
  for (let number = 0; number < count; number++) {
    tell(`${number} of ${count} parts`);
    await new Promise((resolve, reject) => {
      const script = make("script", { src: `rollouts_page/part-${number}.js` });
      script.addEventListener("load", resolve);
      script.addEventListener("error", reject);
      document.head.append(script);
    });
  }
  return { rows, samples };
}

function setUpRollouts({ rows, samples, parts }) {
  const section = document.getElementById("rollouts"), form = section.querySelector("form");
  const list = section.querySelector(".list"), more = section.querySelector(".more"), count = section.querySelector(".count");
  const loading = section.querySelector(".loading");
  for (const name of Object.keys(SORTS)) form.sort.append(make("option", {}, name));
  const textOf = (sample) => {
    const row = rows[sample.row];
    return [row.row, row.system_info, row.user_info, sample.answer, ...row.messages.map((m) => m.content)].join("\n").toLowerCase();
  };
  const inRange = (value, name) => {
    const [from, to] = [form[`${name}_from`].value, form[`${name}_to`].value];
    return (!from || value >= +from) && (!to || value <= +to);
  };
  let found = [], shown = 0;

  function offerChoices() {
    for (const name of ["tier", "relation"]) {
      const offered = new Set([...form[name].options].map((option) => option.value));
      for (const value of [...new Set(rows.map((row) => row[name]))].sort()) if (!offered.has(value)) form[name].append(make("option", {}, value));
    }
  }

  function matches(sample) {
    const row = rows[sample.row];
    return (
      (!form.tier.value || row.tier === form.tier.value) &&
      (!form.relation.value || row.relation === form.relation.value) &&
      inRange(sample.step, "step") &&
      inRange(sample.reward, "reward") &&
      (!form.agreement.value || sample.agrees === (form.agreement.value === "agree")) &&
      (!form.text.value || textOf(sample).includes(form.text.value.toLowerCase()))
    );
  }

  function showMore() {
    for (const sample of found.slice(shown, shown + PAGE)) list.append(describe(sample, rows[sample.row]));
    shown = Math.min(found.length, shown + PAGE);
    more.hidden = shown === found.length;
  }

  function filter() {
    found = samples.filter(matches).sort(SORTS[form.sort.value]);
    shown = 0;
    list.replaceChildren();
    const wrong = found.filter((sample) => sample.agrees === false).length;
    count.textContent = `${found.length} answers; gold and proxy disagree on ${wrong}`;
    showMore();
  }

  async function loadAll() {
    const button = loading.querySelector("button"), told = loading.querySelector("span");
    button.disabled = true;
    try {
      ({ rows, samples } = await loadParts(parts, (text) => (told.textContent = text)));
    } catch {
      told.textContent = "not found: the folder rollouts_page is not beside this page";
      button.disabled = false;
      return;
    }
    loading.replaceChildren(`${samples.length} are loaded.`);
    offerChoices();
    filter();
  }

  form.addEventListener("input", filter);
  form.addEventListener("submit", (event) => event.preventDefault());
  more.addEventListener("click", showMore);
  if (loading) loading.querySelector("button").addEventListener("click", loadAll);
  offerChoices();
  filter();
}

function describe(sample, row) {
  const verdict = (good) => make("span", { class: good ? "yes" : "no" }, good ? "follows" : "does not follow");
  const dialog = row.messages.map((m) => make("p", { class: "question" }, row.messages.length > 1 ? `${m.role}: ${m.content}` : m.content));
  const labels = Object.entries(sample.p).map(([label, p]) => {
    const check = sample.passes[label];
    return `${label} ${p.toFixed(2)}${check === undefined ? "" : check ? " ✓" : " ✗"}`;
  });
  const gold = sample.gold === null ? ["no check"] : ["gold: ", verdict(sample.gold)];
  return make("div", { class: "sample" },
    make("p", { class: "note" }, `step ${sample.step} · ${row.row} · ${row.relation}, the ${row.tier} tier governs${row.kind ? ` · ${row.kind}` : ""}`),
    make("dl", { class: "tiers" }, make("dt", {}, "System Info"), make("dd", {}, row.system_info || "–"), make("dt", {}, "User Info"), make("dd", {}, row.user_info || "–")),
    ...dialog,
    make("p", { class: "answer" }, sample.answer || "(empty)"),
    make("p", { class: "note" }, ...gold, ` · proxy ${number(sample.proxy)} · reward ${number(sample.reward)} · ${sample.tokens} tokens${sample.finished ? "" : ", cut"} · ${labels.join(", ")}`));
}

if (data.rollouts) setUpRollouts(data.rollouts);
