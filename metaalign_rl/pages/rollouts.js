"use strict";
const PAGE = 20;

function setUpRollouts({ rows, samples }) {
  const section = document.getElementById("rollouts"), form = section.querySelector("form");
  const list = section.querySelector(".list"), more = section.querySelector(".more"), count = section.querySelector(".count");
  for (const name of ["tier", "relation"])
    for (const value of [...new Set(rows.map((row) => row[name]))].sort()) form[name].append(make("option", {}, value));
  const textOf = (sample) => {
    const row = rows[sample.row];
    return [row.row, row.system_info, row.user_info, sample.answer, ...row.messages.map((m) => m.content)].join("\n").toLowerCase();
  };
  let found = [], shown = 0;

  function matches(sample) {
    const row = rows[sample.row];
    return (
      (!form.tier.value || row.tier === form.tier.value) &&
      (!form.relation.value || row.relation === form.relation.value) &&
      (!form.from.value || sample.step >= +form.from.value) &&
      (!form.to.value || sample.step <= +form.to.value) &&
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
    found = samples.filter(matches);
    shown = 0;
    list.replaceChildren();
    const wrong = found.filter((sample) => sample.agrees === false).length;
    count.textContent = `${found.length} answers; gold and proxy disagree on ${wrong}`;
    showMore();
  }

  form.addEventListener("input", filter);
  form.addEventListener("submit", (event) => event.preventDefault());
  more.addEventListener("click", showMore);
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
    make("p", { class: "note" }, ...gold, ` · proxy ${number(sample.proxy)} · reward ${number(sample.reward)} · ${labels.join(", ")}`));
}

if (data.rollouts) setUpRollouts(data.rollouts);
