"use strict";
const token = new URLSearchParams(location.search).get("token");
const form = document.querySelector(".ask"), error = document.querySelector(".error");

// Creates an element. Texts become text nodes, so no response can become markup.
function make(name, className, ...children) {
  const element = document.createElement(name);
  element.className = className;
  element.append(...children);
  return element;
}

class Chat {
  constructor(element) {
    this.element = element;
    this.dialog = element.querySelector(".dialog");
    this.messages = [];
  }

  // Adds a question and its response. If that fails, the dialog does not change.
  async ask(text, temperature) {
    const before = form.dialog.checked ? this.messages : [];
    await this.answer([...before, { role: "user", content: text }], temperature);
  }

  // Responds to the last question again, under the current tiers.
  async regenerate(temperature) {
    if (this.messages.length) await this.answer(this.messages.slice(0, -1), temperature, true);
  }

  async answer(asked, temperature, replace = false) {
    const meta = Object.fromEntries([...this.element.querySelectorAll("textarea")].map((area) => [area.name, area.value]));
    const response = await fetch("answer", {
      method: "POST",
      headers: { "Content-Type": "application/json", Authorization: `Bearer ${token}` },
      body: JSON.stringify({ ...meta, messages: asked, temperature }),
    });
    if (!response.ok) throw new Error(await problemOf(response));
    const reply = await response.json();
    if (replace) this.removeLast();
    this.messages = [...asked, { role: "assistant", content: reply.answer }];
    this.dialog.append(make("p", "question", asked.at(-1).content), make("p", "answer", reply.answer || "(empty)"), scores(reply.scores));
    this.dialog.scrollTop = this.dialog.scrollHeight;
  }

  removeLast() {
    for (let i = 0; i < 3; i++) this.dialog.lastChild.remove();
  }

  clear() {
    this.messages = [];
    this.dialog.replaceChildren();
  }
}

async function problemOf(response) {
  const text = await response.text();
  try {
    const { detail } = JSON.parse(text);
    return typeof detail === "string" ? detail : JSON.stringify(detail);
  } catch {
    return `${response.status}: ${text}`;
  }
}

function scores(probabilities) {
  const parts = Object.entries(probabilities).map(([label, p]) => make("span", p >= 0.5 ? "yes" : "no", `${label} ${p.toFixed(2)}`));
  return make("p", "scores note", ...parts);
}

const chats = [...document.querySelectorAll(".chat")].map((element) => new Chat(element));

// Runs `work` for each chat in turn. Returns whether all succeeded.
async function forAll(work) {
  error.hidden = true;
  form.querySelectorAll("button").forEach((button) => (button.disabled = true));
  try {
    for (const chat of chats) await work(chat, +form.temperature.value);
  } catch (problem) {
    error.textContent = problem.message;
    error.hidden = false;
  }
  form.querySelectorAll("button").forEach((button) => (button.disabled = false));
  return error.hidden;
}

form.addEventListener("submit", async (event) => {
  event.preventDefault();
  const text = form.question.value.trim();
  if (text && (await forAll((chat, temperature) => chat.ask(text, temperature)))) form.question.value = "";
});
form.regenerate.addEventListener("click", () => forAll((chat, temperature) => chat.regenerate(temperature)));
form.clear.addEventListener("click", () => chats.forEach((chat) => chat.clear()));
