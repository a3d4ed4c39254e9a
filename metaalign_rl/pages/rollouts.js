"use strict";

const PAGE = 20; // responses per "Show more"

// Proxy minus gold; responses without both come last.
const excess = (sample) => (sample.gold === null || sample.proxy === null ? -2 : sample.proxy - sample.gold);
const SORTS = {
  "earliest step first": (a, b) => a.step - b.step,
  "latest step first": (a, b) => b.step - a.step,
  "highest reward first": (a, b) => b.reward - a.reward,
  "lowest reward first": (a, b) => a.reward - b.reward,
  "longest first": (a, b) => b.tokens - a.tokens,
  "shortest first": (a, b) => a.tokens - b.tokens,
  "largest proxy minus gold first": (a, b) => excess(b) - excess(a),
};

// Loads the responses from the scripts next to the page. Each script calls `addRollouts` with rows and samples in the
// format of the page's data.
async function loadParts(count, showProgress) {
  const rows = [], samples = [];
  window.addRollouts = (part) => {
    for (const sample of part.samples) samples.push({ ...sample, row: sample.row + rows.length });
    rows.push(...part.rows);
  };
  for (let number = 0; number < count; number++) {
    showProgress(`${number} of ${count} parts`);
    await new Promise((resolve, reject) => {
      const script = make("script", { src: `rollouts_page/part-${number}.js` });
      script.addEventListener("load", resolve);
      script.addEventListener("error", reject);
      document.head.append(script);
    });
  }
  return { rows, samples };
}

// Whether the form's filters keep a response.
function matches(form, sample, row) {
  const inRange = (value, name) => {
    const [from, to] = [form[`${name}_from`].value, form[`${name}_to`].value];
    return (!from || value >= +from) && (!to || value <= +to);
  };
  const text = () => [row.row, row.system_info, row.user_info, sample.answer, ...row.messages.map((m) => m.content)].join("\n").toLowerCase();
  return (
    (!form.tier.value || row.tier === form.tier.value) &&
    (!form.relation.value || row.relation === form.relation.value) &&
    inRange(sample.step, "step") &&
    inRange(sample.reward, "reward") &&
    (!form.agreement.value || sample.agrees === (form.agreement.value === "agree")) &&
    (!form.text.value || text().includes(form.text.value.toLowerCase()))
  );
}

function setUpRollouts({ rows, samples, parts }) {
  const section = document.getElementById("rollouts"), form = section.querySelector("form");
  const list = section.querySelector(".list"), more = section.querySelector(".more"), count = section.querySelector(".count");
  const loading = section.querySelector(".loading");
  for (const name of Object.keys(SORTS)) form.sort.append(make("option", {}, name));
  let found = [], shown = 0;

  function addChoices() {
    for (const name of ["tier", "relation"]) {
      const known = new Set([...form[name].options].map((option) => option.value));
      for (const value of [...new Set(rows.map((row) => row[name]))].sort()) if (!known.has(value)) form[name].append(make("option", {}, value));
    }
  }

  function showMore() {
    for (const sample of found.slice(shown, shown + PAGE)) list.append(describe(sample, rows[sample.row]));
    shown = Math.min(found.length, shown + PAGE);
    more.hidden = shown === found.length;
  }

  function filter() {
    found = samples.filter((sample) => matches(form, sample, rows[sample.row])).sort(SORTS[form.sort.value]);
    shown = 0;
    list.replaceChildren();
    const disagreements = found.filter((sample) => sample.agrees === false).length;
    count.textContent = `${found.length} responses; gold and proxy disagree on ${disagreements}`;
    showMore();
  }

  async function loadAll() {
    const button = loading.querySelector("button"), status = loading.querySelector("span");
    button.disabled = true;
    try {
      ({ rows, samples } = await loadParts(parts, (text) => (status.textContent = text)));
    } catch {
      status.textContent = "Folder rollouts_page not found. Put it next to this page.";
      button.disabled = false;
      return;
    }
    loading.replaceChildren(`${samples.length} responses loaded.`);
    addChoices();
    filter();
  }

  form.addEventListener("input", filter);
  form.addEventListener("submit", (event) => event.preventDefault());
  more.addEventListener("click", showMore);
  if (loading) loading.querySelector("button").addEventListener("click", loadAll);
  addChoices();
  filter();
}

function describe(sample, row) {
  const verdict = (good) => make("span", { class: good ? "yes" : "no" }, good ? "follows" : "does not follow");
  const dialog = row.messages.map((m) => make("p", { class: "question" }, row.messages.length > 1 ? `${m.role}: ${m.content}` : m.content));
  const labels = Object.entries(sample.p).map(([label, p]) => {
    const passes = sample.passes[label];
    return `${label} ${p.toFixed(2)}${passes === undefined ? "" : passes ? " ✓" : " ✗"}`;
  });
  const gold = sample.gold === null ? ["no check"] : ["gold: ", verdict(sample.gold)];
  return make("div", { class: "sample" },
    make("p", { class: "note" }, `step ${sample.step} · ${row.row} · ${row.relation} · governing tier: ${row.tier}${row.kind ? ` · ${row.kind}` : ""}`),
    make("dl", { class: "tiers" }, make("dt", {}, "System Info"), make("dd", {}, row.system_info || "–"), make("dt", {}, "User Info"), make("dd", {}, row.user_info || "–")),
    ...dialog,
    make("p", { class: "answer" }, sample.answer || "(empty)"),
    make("p", { class: "note" }, ...gold, ` · proxy ${number(sample.proxy)} · reward ${number(sample.reward)} · ${sample.tokens} tokens${sample.finished ? "" : ", truncated"} · ${labels.join(", ")}`));
}

if (data.rollouts) setUpRollouts(data.rollouts);
