"use strict";

// State is two numbers: the token under the pointer or the keyboard (`cursor`) and the one kept (`pinned`).
// `show` draws from them; every event handler only sets them and calls it.

const $ = (id) => document.getElementById(id);
const page = JSON.parse($("payload").textContent);

const TWICE = Math.LN2; // nats; below a factor of two either way the picture makes no difference worth naming
const STRONG = 4; // nats at which the evidence bar has its full colour
const CANVAS = 288; // pixels of an overlay's longer side; CSS stretches it over the picture
const TINT_STEPS = 16; // few enough that most words keep their tint from one token to the next
const PLAY_MS = 400;

const colors = new Uint32Array(decode(page.colors).buffer);
const tokens = page.response.pieces.map(([, text]) => text);
const nTokens = tokens.length;
const nPrompt = page.prompt.pieces.length;

let view = null;
let cursor = null;
let pinned = null;
let active = null;
let lowWords = []; // of the view, in reading order
let lowOf = new Map(); // from a token to the one of them it spells a part of

// ---- building the page, once -------------------------------------------------------------------

const promptWords = page.prompt.pieces.map(([, text, isText]) => element("span", isText ? "asked" : "asked bare", text));
const responseWords = page.response.pieces.map(([, text, isText], i) => {
  const word = element("span", isText ? "token" : "token bare", text);
  word.dataset.index = i;
  word.setAttribute("role", "button");
  word.tabIndex = i === 0 ? 0 : -1;
  if (/^\s+$/.test(text)) word.classList.add(text.includes("\n") ? "newline" : "space");
  return word;
});
const words = [...promptWords, ...responseWords];
const tints = new Uint8Array(words.length);
const screens = page.pictures.map(buildScreen);

layOut($("prompt"), page.prompt, promptWords);
layOut($("response"), page.response, responseWords);
$("model").textContent = page.model;
document.title = `${$("response").textContent.replace(/\s+/g, " ").slice(0, 60)} · fastattr`;
buildSwitch();
drawHeatKey();
use(0);

function layOut(parent, { pieces, tail }, spans) {
  pieces.forEach(([before], i) => parent.append(before, spans[i]));
  parent.append(tail);
}

function buildSwitch() {
  page.views.forEach(({ label }, i) => {
    const choice = element("label");
    const radio = element("input");
    radio.type = "radio";
    radio.name = "view";
    radio.checked = i === 0;
    radio.addEventListener("change", () => use(i));
    choice.append(radio, element("span", "", label));
    $("views").append(choice);
  });
  $("views").hidden = page.views.length < 2;
  if (page.views.length < 2) $("model").append(page.model ? " · " : "", page.views[0].label);
}

/** A picture with its overlay; a video also has a slider and a play button. */
function buildScreen(picture, k) {
  const figure = element("figure");
  const stack = element("div", "stack");
  stack.style.setProperty("--aspect", picture.width / picture.height);
  const canvas = element("canvas", "overlay");
  canvas.dataset.image = k;
  const img = element("img");
  img.alt = `Image ${k + 1}, ${picture.width} by ${picture.height} pixels`;
  if (picture.frames.length) stack.append(img);
  else stack.classList.add("blank");
  stack.append(canvas);
  figure.append(stack);
  $("pictures").append(figure);

  const count = Math.max(picture.frames.length, ...page.views.map((v) => v.maps[k].grid[0]));
  const screen = { k, picture, img, canvas, count, frame: -1, slider: null, button: null, timer: 0 };
  if (count > 1) figure.append(buildPlayer(screen));
  return screen;
}

function buildPlayer(screen) {
  const bar = element("div", "player");
  const button = element("button", "", "Play");
  button.type = "button";
  const slider = element("input");
  slider.type = "range";
  slider.max = screen.count - 1;
  slider.value = 0;
  slider.setAttribute("aria-label", `Frame of video ${screen.k + 1}`);
  const output = element("output");
  Object.assign(screen, { slider, button, output });
  slider.addEventListener("input", () => {
    pause(screen);
    setFrame(screen, Number(slider.value));
  });
  button.addEventListener("click", () => {
    if (screen.timer) return pause(screen);
    button.textContent = "Pause";
    screen.timer = setInterval(() => setFrame(screen, (screen.frame + 1) % screen.count), PLAY_MS);
  });
  bar.append(button, slider, output);
  return bar;
}

function pause(screen) {
  clearInterval(screen.timer);
  screen.timer = 0;
  screen.button.textContent = "Play";
}

function drawHeatKey() {
  const context = $("heat").getContext("2d");
  const strip = context.createImageData(96, 1);
  const pixels = new Uint32Array(strip.data.buffer);
  for (let x = 0; x < 96; x++) pixels[x] = colors[Math.round((x / 95) * 255)];
  context.putImageData(strip, 0, 0);
}

// ---- switching between attributions ------------------------------------------------------------

/** Make attribution `i` the one that is shown. Its maps are decoded on first use. */
function use(i) {
  view = page.views[i];
  if (typeof view.tints === "string") {
    view.tints = decode(view.tints);
    for (const map of view.maps) {
      map.levels = decode(map.levels);
      map.mass = massOfFrames(map);
    }
  }
  for (const screen of screens) fitCanvas(screen);
  lowWords = view.low ? view.low.words : [];
  lowOf = new Map(lowWords.flatMap((word) => word.targets.map((target) => [target, word])));
  responseWords.forEach(colorByEvidence);
  $("low-key").textContent = view.low ? view.low.key : "";
  $("low-step").hidden = lowWords.length === 0;
  $("low-step").textContent = `${lowWords.length} ${lowWords.length === 1 ? "word" : "words"} with low evidence`;
  document.body.classList.toggle("no-evidence", !view.evidence);
  $("tint-key").lastElementChild.textContent =
    view.tint === "relevance"
      ? "other words, by relevance: how alike the model's predictions are there and here"
      : "earlier words, by context activation: how active the shown word already is there";
  $("agreement").hidden = view.scales.length < 2;
  fill($("agreement").lastElementChild, view.scales.map(agreementRow));
  fill($("notes"), view.notes.map((note) => element("li", "", note)));
  fill($("settings"), view.settings.flatMap(([name, value]) => [element("dt", "", name), element("dd", "", value)]));
  show();
}

/** Sum of each frame's levels, `[target t]`, so that a video can open at the frame a token looks at. */
function massOfFrames({ grid: [t, h, w], levels }) {
  const mass = new Float64Array(nTokens * t);
  for (let i = 0; i < levels.length; i++) mass[Math.floor(i / (h * w))] += levels[i];
  return mass;
}

function fitCanvas(screen) {
  const { canvas, picture } = screen;
  const { grid: [, rows, cols], extent: [left, top, right, bottom] } = view.maps[screen.k];
  const aspect = ((right - left) * picture.width) / ((bottom - top) * picture.height);
  canvas.width = Math.max(1, Math.round(CANVAS * Math.min(1, aspect)));
  canvas.height = Math.max(1, Math.round(CANVAS / Math.max(1, aspect)));
  const percent = (share) => `${share * 100}%`;
  Object.assign(canvas.style, {
    left: percent(left), top: percent(top), width: percent(right - left), height: percent(bottom - top),
  });
  canvas.classList.toggle("part", right - left < 1 || bottom - top < 1);
  screen.context = canvas.getContext("2d");
  screen.image = screen.context.createImageData(canvas.width, canvas.height);
  screen.pixels = new Uint32Array(screen.image.data.buffer);
  screen.across = taps(cols, canvas.width);
  screen.down = taps(rows, canvas.height);
  screen.strips = new Float32Array(rows * canvas.width);
}

function colorByEvidence(word, i) {
  const nats = view.evidence ? view.evidence[i] : null;
  const low = lowOf.get(i);
  word.classList.remove("seen", "even", "against");
  word.classList.toggle("low", low !== undefined);
  word.classList.toggle("low-end", low?.targets.at(-1) === i);
  if (nats !== null) word.classList.add(verdict(nats).kind);
  word.style.setProperty("--strength", nats === null ? 0 : Math.min(1, Math.abs(nats) / STRONG));
  const said = tokens[i].trim() || "white space";
  const sure = view.logProb[i] === null ? "" : `, probability ${percentOf(Math.exp(view.logProb[i]))}`;
  const seen = nats === null ? "" : `, ${verdict(nats).name}`;
  word.setAttribute("aria-label", `${said}${sure}${seen}${low ? ", low evidence" : ""}`);
}

// ---- showing a token ---------------------------------------------------------------------------

function show() {
  const shown = cursor ?? pinned;
  if (active !== shown) {
    responseWords[active]?.classList.remove("active");
    responseWords[shown]?.classList.add("active");
    active = shown;
  }
  const kept = document.querySelector(".pinned");
  if (kept !== (responseWords[pinned] ?? null)) {
    kept?.classList.remove("pinned");
    kept?.setAttribute("aria-pressed", "false");
    responseWords[pinned]?.classList.add("pinned");
    responseWords[pinned]?.setAttribute("aria-pressed", "true");
  }
  tintWords();
  screens.forEach((screen) => setFrame(screen, screen.timer ? screen.frame : bestFrame(screen)));
  describe();
}

/** Only words whose tint really changes are touched. */
function tintWords() {
  const before = active === null ? 0 : nPrompt + active;
  const row = active === null ? 0 : active * (nPrompt + nTokens);
  for (let j = 0; j < words.length; j++) {
    const step = j < before ? Math.round((view.tints[row + j] / 255) * TINT_STEPS) : 0;
    if (tints[j] === step) continue;
    tints[j] = step;
    words[j].style.setProperty("--tint", step / TINT_STEPS);
  }
}

function bestFrame(screen) {
  if (screen.count === 1 || active === null) return Math.max(0, screen.frame);
  const { grid: [t], mass } = view.maps[screen.k];
  const own = mass.subarray(active * t, (active + 1) * t);
  return Math.ceil((own.indexOf(Math.max(...own)) * screen.count) / t);
}

function setFrame(screen, frame) {
  const { picture, count } = screen;
  if (frame !== screen.frame) {
    const before = screen.frame;
    const of = (n, at) => Math.floor((at * n) / count);
    screen.frame = frame;
    const shots = picture.frames.length;
    if (shots && (before < 0 || of(shots, before) !== of(shots, frame))) screen.img.src = picture.frames[of(shots, frame)];
    if (screen.slider) {
      screen.slider.value = frame;
      screen.output.textContent = `${frame + 1} / ${count}`;
    }
  }
  paint(screen);
}

/** Bilinear heat, pixel centres aligned, then colour: the same as `overlay` in Python. */
function paint(screen) {
  const { context, canvas: { width, height }, across, down, strips, pixels } = screen;
  if (active === null) return context.clearRect(0, 0, width, height);
  const { grid: [t, rows, cols], levels } = view.maps[screen.k];
  const start = (active * t + Math.floor((screen.frame * t) / screen.count)) * rows * cols;
  for (let y = 0, at = 0; y < rows; y++) {
    const row = start + y * cols;
    for (let x = 0; x < width; x++, at++) {
      const a = levels[row + across.low[x]];
      strips[at] = a + (levels[row + across.high[x]] - a) * across.share[x];
    }
  }
  for (let y = 0, at = 0; y < height; y++) {
    const upper = down.low[y] * width;
    const lower = down.high[y] * width;
    const share = down.share[y];
    for (let x = 0; x < width; x++, at++) {
      const a = strips[upper + x];
      pixels[at] = colors[(a + (strips[lower + x] - a) * share + 0.5) | 0];
    }
  }
  context.putImageData(screen.image, 0, 0);
}

/** For each of `size` pixels the two of `n` cells it lies between and how far it is from the first. */
function taps(n, size) {
  const low = new Uint16Array(size);
  const high = new Uint16Array(size);
  const share = new Float32Array(size);
  for (let i = 0; i < size; i++) {
    const at = Math.min(n - 1, Math.max(0, ((i + 0.5) * n) / size - 0.5));
    low[i] = Math.floor(at);
    high[i] = Math.min(n - 1, low[i] + 1);
    share[i] = at - low[i];
  }
  return { low, high, share };
}

// ---- the panel ---------------------------------------------------------------------------------

function describe() {
  $("panel").classList.toggle("idle", active === null);
  if (active === null) return;
  $("word").textContent = tokens[active].replace(/\n/g, "↵").trim() || "space";
  $("place").textContent = `token ${active + 1} of ${nTokens}`;
  describeProbability(view.logProb[active]);
  describeEvidence(view.evidence ? view.evidence[active] : null);
  describeLow(lowOf.get(active));
  view.agreement[active].forEach((share, s) => {
    const row = $("agreement").lastElementChild.children[s];
    fillBar(row.lastElementChild, share, share === null ? "unknown" : percentOf(share));
  });
  $("degenerate").hidden = !view.degenerate[active];
}

function describeProbability(logProb) {
  const sure = logProb === null ? null : Math.exp(logProb);
  fillBar($("probability"), sure, sure === null ? "unknown" : `${percentOf(sure)} · ${signed(logProb)} nats`);
}

function fillBar(parent, share, text) {
  parent.firstElementChild.style.setProperty("--share", Math.min(1, share ?? 0));
  parent.lastElementChild.textContent = text;
}

function describeEvidence(nats) {
  $("verdict").hidden = $("evidence").hidden = nats === null;
  if (nats === null) return;
  const { kind, name, why } = verdict(nats);
  $("verdict").className = `verdict ${kind}`;
  $("verdict").firstElementChild.textContent = name;
  $("verdict").lastElementChild.textContent = why;
  $("evidence").lastElementChild.textContent = `${signed(nats)} nats`;
}

function describeLow(word) {
  $("low").hidden = !word;
  if (!word) return;
  const nats = word.evidence === null ? "unknown" : `${signed(word.evidence)} nats`;
  $("low").lastElementChild.textContent = `“${word.text}” has ${nats}, less than ${signed(view.low.threshold)}`;
}

function verdict(nats) {
  if (nats >= TWICE) return { kind: "seen", name: "Seen", why: `the picture makes it ${times(nats)} as likely` };
  if (nats <= -TWICE) return { kind: "against", name: "Against the picture", why: `${times(-nats)} less likely than without it` };
  return { kind: "even", name: "From the text", why: "the picture changes little" };
}

function agreementRow(scale) {
  const row = element("div");
  const value = element("dd");
  value.append(element("i", "bar"), element("span"));
  row.append(element("dt", "", `${scale}×`), value);
  return row;
}

// ---- pointer and keyboard ----------------------------------------------------------------------

let pointer = "";

/** Text that scrolls under a resting pointer also sends pointer events; only a hand that moved means them. */
function moved(event) {
  const place = `${event.clientX} ${event.clientY}`;
  if (place === pointer) return false;
  pointer = place;
  return true;
}

$("response").addEventListener("pointerover", (event) => {
  const token = tokenOf(event.target);
  if (event.pointerType === "touch" || !token || !moved(event)) return; // between two words the last one stays
  cursor = indexOf(token);
  show();
});
$("response").addEventListener("pointerleave", (event) => {
  if (!moved(event)) return;
  cursor = null;
  show();
});
$("response").addEventListener("click", (event) => {
  const token = tokenOf(event.target);
  if (token) toggle(indexOf(token));
});
$("response").addEventListener("focusin", (event) => {
  if (!event.target.matches(".token:focus-visible")) return; // a click also focuses, and has said what it wants
  cursor = indexOf(event.target);
  show();
});
$("response").addEventListener("focusout", (event) => {
  if (tokenOf(event.relatedTarget)) return; // it only moves on
  cursor = null;
  show();
});
document.addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey) return;
  if (event.key === "Escape") letGo();
  if (event.target.matches("input, summary")) return; // their keys are their own
  const now = cursor ?? pinned ?? (event.key === "ArrowLeft" ? nTokens : -1);
  const to = { ArrowLeft: now - 1, ArrowRight: now + 1, Home: 0, End: nTokens - 1 }[event.key];
  if (to !== undefined) stepTo(Math.max(0, Math.min(nTokens - 1, to)));
  else if ((event.key === "Enter" || event.key === " ") && tokenOf(event.target)) toggle(indexOf(event.target));
  else return;
  event.preventDefault();
});

/** Keep the next word with low evidence, and after the last the first again. */
$("low-step").addEventListener("click", () => {
  const now = pinned ?? -1;
  const next = lowWords.find(({ targets }) => targets[0] > now) ?? lowWords[0];
  cursor = null;
  if (pinned !== next.targets[0]) toggle(next.targets[0]);
});

/** The pin, if there is one, travels along. */
function stepTo(i) {
  if (pinned !== null) pinned = i;
  $("response").querySelector('[tabindex="0"]').tabIndex = -1;
  responseWords[i].tabIndex = 0;
  responseWords[i].focus({ preventScroll: true });
  responseWords[i].scrollIntoView({ block: "nearest" });
  cursor = i;
  show();
}

function toggle(i) {
  pinned = pinned === i ? null : i;
  show();
  responseWords[pinned]?.scrollIntoView({ block: "nearest" }); // out from under what sticks to a phone's edges
}

function letGo() {
  cursor = pinned = null;
  tokenOf(document.activeElement)?.blur();
  show();
}

// ---- small things ------------------------------------------------------------------------------

function element(tag, className = "", text = "") {
  const made = document.createElement(tag);
  if (className) made.className = className;
  if (text) made.textContent = text;
  return made;
}

function fill(parent, children) {
  parent.replaceChildren(...children);
  parent.hidden = children.length === 0;
}

function tokenOf(node) {
  return node?.closest?.(".token");
}

function indexOf(token) {
  return Number(token.dataset.index);
}

function times(nats) {
  return nats > Math.log(1000) ? "over 1,000×" : `${Number(Math.exp(nats).toPrecision(2))}×`;
}

function signed(x) {
  const digits = Math.abs(x).toFixed(2);
  return Number(digits) === 0 ? digits : `${x < 0 ? "−" : "+"}${digits}`;
}

function percentOf(x) {
  return x > 0 && x < 0.001 ? "<0.1 %" : `${(x * 100).toFixed(x < 0.1 ? 1 : 0)} %`;
}

function decode(text) {
  return Uint8Array.from(atob(text), (letter) => letter.charCodeAt(0));
}
