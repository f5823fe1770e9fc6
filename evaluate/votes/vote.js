"use strict";
// Votes on pairs of pictures. What is on which side is decoded only where the votes are saved.

const page = JSON.parse(document.getElementById("page").textContent);
const place = `nanodit-votes-${page.id}`;
const KEYS = {ArrowLeft: "left", 1: "left", ArrowRight: "right", 2: "right", " ": "tie", ArrowDown: "tie"};
const element = (id) => document.getElementById(id);
const choices = [...document.querySelectorAll("[data-answer]")];
let since = 0; // when the pictures were shown, ms

function newState() {
  const ballot = [...crypto.getRandomValues(new Uint8Array(8))].map((byte) => byte.toString(16).padStart(2, "0"));
  // saved: all answers are in a file
  return {ballot: ballot.join(""), at: 0, saved: true, answers: page.trials.map(() => null)};
}

function sound(one) {
  const whole = (number, most) => Number.isInteger(number) && number >= 0 && number <= most;
  const answer = (own) => ["left", "right", "tie"].includes(own.answer) && whole(own.milliseconds, 1e9);
  return one !== null && /^[0-9a-f]{16}$/.test(one.ballot) && whole(one.at, page.trials.length)
    && Array.isArray(one.answers) && one.answers.length === page.trials.length
    && one.answers.every((own) => own === null || answer(own));
}

function restore() {
  try {
    const kept = JSON.parse(localStorage.getItem(place));
    return sound(kept) ? kept : newState();
  } catch {
    return newState(); // no storage here, or not ours
  }
}

function keep() {
  try {
    localStorage.setItem(place, JSON.stringify(state));
  } catch {
    const note = "This browser keeps nothing for this page. Save your votes before you close or reload it.";
    element("note").textContent = note;
    element("note").hidden = false;
  }
}

function show() {
  const answered = state.answers.filter(Boolean).length;
  const over = state.at >= page.trials.length;
  element("bar").value = answered / page.trials.length;
  element("count").textContent = `${over ? answered : state.at + 1} of ${page.trials.length}${over ? " answered" : ""}`;
  element("trial").hidden = over;
  element("end").hidden = !over;
  element("save").hidden = over;
  element("save").disabled = answered === 0;
  element("back").disabled = state.at === 0;
  element("saved").textContent = "";
  if (over) {
    element("done").focus();
    return;
  }
  const trial = page.trials[state.at];
  const prompt = element("prompt");
  prompt.textContent = trial.prompt;
  prompt.scrollTop = 0;
  trial.pictures.forEach((one, index) => {
    const image = element(`picture-${index + 1}`);
    image.src = one.data;
    image.width = one.width;
    image.height = one.height;
    image.classList.toggle("small", Math.max(one.width, one.height) <= 256);
  });
  const own = state.answers[state.at];
  choices.forEach((button) => button.setAttribute("aria-pressed", String(own?.answer === button.dataset.answer)));
  prompt.focus({preventScroll: true}); // no button keeps the focus, so that the next space is a tie
  scrollTo(0, 0);
  since = performance.now();
}

function go(at) {
  state.at = at;
  keep();
  show();
}

function vote(answer) {
  state.answers[state.at] = {answer, milliseconds: Math.min(1e9, Math.round(performance.now() - since))};
  state.saved = false;
  go(state.at + 1);
}

function back() {
  if (state.at > 0) go(state.at - 1);
}

function save() {
  const bytes = Uint8Array.from(atob(page.sealed), (letter) => letter.charCodeAt(0));
  const sealed = JSON.parse(new TextDecoder().decode(bytes));
  const none = {answer: null, milliseconds: null};
  const trials = sealed.trials.map((trial, index) => ({...trial, ...(state.answers[index] ?? none)}));
  const content = `${JSON.stringify({...sealed, ballot: state.ballot, trials}, null, 1)}\n`;
  const link = document.createElement("a");
  link.href = URL.createObjectURL(new Blob([content], {type: "application/json"}));
  link.download = `votes-${page.id}.json`;
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 60000);
  state.saved = true;
  keep();
  element("saved").textContent = `Saved as ${link.download}, where the browser keeps downloads.`;
}

function again() {
  if (!state.saved && !confirm("These votes are in no file yet. Drop them?")) return;
  state = newState();
  go(0);
}

document.addEventListener("keydown", (event) => {
  if (event.repeat || event.ctrlKey || event.metaKey || event.altKey) return;
  const onButton = event.target instanceof HTMLButtonElement;
  if (onButton && [" ", "Enter"].includes(event.key)) return; // which press it
  if (event.key === "Backspace") {
    event.preventDefault();
    back();
  } else if (event.key in KEYS && !element("trial").hidden) {
    event.preventDefault();
    vote(KEYS[event.key]);
  }
});
choices.forEach((button) => button.addEventListener("click", (event) => {
  if (event.detail < 2) vote(button.dataset.answer); // the second of a double click would be on a pair not yet seen
}));
element("back").addEventListener("click", back);
for (const id of ["save", "save-end"]) element(id).addEventListener("click", save);
element("again").addEventListener("click", again);
addEventListener("beforeunload", (event) => {
  if (!state.saved && !element("note").hidden) event.preventDefault();
});

let state = restore();
keep();
show();
