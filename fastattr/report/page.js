"use strict";

// State is two numbers: the token or field under the pointer or the keyboard (`cursor`) and the one kept (`pinned`).
// Tokens count from 0, the fields of an answer that is JSON go on from there. `show` draws from the two; every event
// handler only sets them and calls it.

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
const fields = page.fields.map(([stem, step, value, isText, complete, targets]) => ({
  stem, step, value, isText, complete, targets,
}));
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
const rows = fields.map(buildRow);
const words = [...promptWords, ...responseWords];
const things = [...responseWords, ...rows]; // all that can be shown
const tints = new Uint8Array(words.length);
const screens = page.pictures.map(buildScreen);

layOut($("prompt"), page.prompt, promptWords);
layOut($("response"), page.response, responseWords);
$("fields").append(...rows);
$("fields-count").textContent = `${fields.length} ${fields.length === 1 ? "value" : "values"}`;
document.body.classList.toggle("structured", fields.length > 0);
$("model").textContent = page.model;
document.title = `${$("response").textContent.replace(/\s+/g, " ").slice(0, 60)} · fastattr`;
buildSwitch();
drawHeatKey();
use(0);

function layOut(parent, { pieces, tail }, spans) {
  pieces.forEach(([before], i) => parent.append(before, spans[i]));
  parent.append(tail);
}

function buildRow({ stem, step, value, isText, complete }, k) {
  const row = element("tr", "field");
  row.dataset.index = nTokens + k;
  const name = element("th");
  name.scope = "row";
  const button = element("button");
  button.type = "button";
  button.tabIndex = k === 0 ? 0 : -1;
  const head = element("i");
  for (const part of stem.split(/(?=[.[])/)) head.append(part, element("wbr"));
  button.append(head, step);
  name.append(button);
  const cell = element("td");
  const shown = element("span", isText ? "value" : "value literal", value);
  shown.dir = "auto";
  if (value === "") {
    shown.classList.add("empty");
    shown.textContent = "empty";
  }
  cell.append(shown);
  if (!complete) cell.append(element("span", "cut", "cut off"));
  row.append(name, cell, element("td", "evidence-key"));
  return row;
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
  const frameOfBox = element("div", "frame");
  frameOfBox.hidden = true;
  stack.append(canvas, frameOfBox);
  figure.append(stack);
  $("pictures").append(figure);

  const count = Math.max(picture.frames.length, ...page.views.map((v) => v.maps[k].grid[0]));
  const screen = { k, picture, img, canvas, frameOfBox, count, frame: -1, slider: null, button: null, timer: 0 };
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
  rows.forEach(colorRow);
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
  underline(word, nats);
  word.classList.toggle("low", low !== undefined);
  word.classList.toggle("low-end", low?.targets.at(-1) === i);
  speak(word, tokens[i].trim() || "white space", view.logProb[i], nats, low ? ", low evidence" : "");
}

function colorRow(row, k) {
  const { stem, step, value, complete } = fields[k];
  const { nats, logProb } = scoresOf(nTokens + k);
  underline(row.querySelector(".value"), nats);
  row.lastElementChild.textContent = nats === null ? "–" : signed(nats);
  speak(row.querySelector("button"), `${stem}${step}: ${value || "empty"}`, logProb, nats, complete ? "" : ", cut off");
}

function underline(word, nats) {
  word.classList.remove("seen", "even", "against");
  if (nats !== null) word.classList.add(verdict(nats).kind);
  word.style.setProperty("--strength", nats === null ? 0 : Math.min(1, Math.abs(nats) / STRONG));
}

function speak(button, said, logProb, nats, remark) {
  const sure = logProb === null ? "" : `, probability ${percentOf(Math.exp(logProb))}`;
  const seen = nats === null ? "" : `, ${verdict(nats).name}`;
  button.setAttribute("aria-label", `${said}${sure}${seen}${remark}`);
}

// ---- showing a token or a field ----------------------------------------------------------------

function fieldOf(i) {
  return i === null || i < nTokens ? undefined : fields[i - nTokens];
}

function targetsOf(i) {
  return i === null ? [] : (fieldOf(i)?.targets ?? [i]);
}

/** Evidence, log-probability and agreement of a token, or of all tokens of a field together; null is unknown. */
function scoresOf(i) {
  const targets = targetsOf(i);
  const over = (join, of) => {
    const values = targets.map(of);
    return values.length && values.every((value) => value !== null) ? values.reduce(join) : null;
  };
  const sum = (a, b) => a + b;
  return {
    nats: view.evidence && over(sum, (target) => view.evidence[target]),
    logProb: over(sum, (target) => view.logProb[target]),
    agreement: view.scales.map((_, s) => over((a, b) => a * b, (target) => view.agreement[target][s])),
  };
}

function show() {
  const shown = cursor ?? pinned;
  if (active !== shown) {
    mark(active, false);
    mark(shown, true);
    active = shown;
  }
  const kept = document.querySelector(".pinned");
  if (kept !== (things[pinned] ?? null)) {
    kept?.classList.remove("pinned");
    if (kept) buttonOf(kept).setAttribute("aria-pressed", "false");
    things[pinned]?.classList.add("pinned");
    if (things[pinned]) buttonOf(things[pinned]).setAttribute("aria-pressed", "true");
  }
  tintWords();
  for (const screen of screens) screen.heat = heatOf(view.maps[screen.k]);
  screens.forEach((screen) => setFrame(screen, screen.timer ? screen.frame : bestFrame(screen)));
  describe();
}

function mark(i, on) {
  things[i]?.classList.toggle("active", on);
  for (const target of fieldOf(i)?.targets ?? []) responseWords[target].classList.toggle("held", on);
}

/** Only words whose tint really changes are touched. */
function tintWords() {
  const targets = targetsOf(active);
  const before = targets.length ? nPrompt + targets[0] : 0;
  for (let j = 0; j < words.length; j++) {
    let level = 0;
    if (j < before) for (const target of targets) level = Math.max(level, view.tints[target * words.length + j]);
    const step = Math.round((level / 255) * TINT_STEPS);
    if (tints[j] === step) continue;
    tints[j] = step;
    words[j].style.setProperty("--tint", step / TINT_STEPS);
  }
}

/** Levels `[t h w]` of what is shown, of a field the maximum over its tokens. */
function heatOf({ grid: [t, h, w], levels }) {
  const size = t * h * w;
  const [first, ...others] = targetsOf(active).map((target) => levels.subarray(target * size, (target + 1) * size));
  if (!others.length) return first ?? null;
  const heat = first.slice();
  for (const other of others) for (let i = 0; i < size; i++) if (other[i] > heat[i]) heat[i] = other[i];
  return heat;
}

function boxOf({ k }) {
  return fieldOf(active) ? view.boxes[active - nTokens][k] : null;
}

function bestFrame(screen) {
  const targets = targetsOf(active);
  if (screen.count === 1 || !targets.length) return Math.max(0, screen.frame);
  const { grid: [t], mass } = view.maps[screen.k];
  const box = boxOf(screen);
  if (box) return Math.ceil((box[4] * screen.count) / t);
  const own = mass.subarray(targets[0] * t, (targets[0] + 1) * t);
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
  const { context, canvas: { width, height }, across, down, strips, pixels, heat } = screen;
  const { grid: [t, rows, cols] } = view.maps[screen.k];
  const frame = Math.floor((screen.frame * t) / screen.count);
  placeBox(screen, frame);
  if (!heat) return context.clearRect(0, 0, width, height);
  const start = frame * rows * cols;
  for (let y = 0, at = 0; y < rows; y++) {
    const row = start + y * cols;
    for (let x = 0; x < width; x++, at++) {
      const a = heat[row + across.low[x]];
      strips[at] = a + (heat[row + across.high[x]] - a) * across.share[x];
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

/** The box of a field, on the frame it was found on. */
function placeBox(screen, frame) {
  const box = boxOf(screen);
  screen.frameOfBox.hidden = !box || box[4] !== frame;
  if (!box) return;
  const [left, top, right, bottom] = box.map((share) => share * 100);
  Object.assign(screen.frameOfBox.style, {
    left: `${left}%`, top: `${top}%`, width: `${right - left}%`, height: `${bottom - top}%`,
  });
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
  const field = fieldOf(active);
  const { nats, logProb, agreement } = scoresOf(active);
  const written = (field ? field.value : tokens[active]).replace(/\n/g, "↵").trim();
  $("word").textContent = written || (field?.value === "" ? "empty" : "space");
  $("place").textContent = field ? placeOf(field) : `token ${active + 1} of ${nTokens}`;
  $("cut").hidden = field?.complete ?? true;
  describeProbability(logProb);
  describeEvidence(nats);
  describeLow(lowOf.get(active));
  agreement.forEach((share, s) => {
    const row = $("agreement").lastElementChild.children[s];
    fillBar(row.lastElementChild, share, share === null ? "unknown" : percentOf(share));
  });
  const targets = targetsOf(active);
  $("degenerate").hidden = !targets.length || !targets.every((target) => view.degenerate[target]);
  $("unasked").hidden = !view.explained || !targets.length || targets.some((target) => view.explained[target]);
}

function placeOf({ stem, step, targets }) {
  return `${stem}${step} · ${targets.length} ${targets.length === 1 ? "token" : "tokens"}`;
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

for (const list of [$("response"), $("fields")]) {
  list.addEventListener("pointerover", (event) => {
    const thing = thingOf(event.target);
    if (event.pointerType === "touch" || !thing || !moved(event)) return; // between two words the last one stays
    cursor = indexOf(thing);
    show();
  });
  list.addEventListener("pointerleave", (event) => {
    if (!moved(event)) return;
    cursor = null;
    show();
  });
  list.addEventListener("click", (event) => {
    const thing = thingOf(event.target);
    if (thing) toggle(indexOf(thing));
  });
  list.addEventListener("focusin", (event) => {
    if (!event.target.matches(":focus-visible")) return; // a click also focuses, and has said what it wants
    cursor = indexOf(thingOf(event.target));
    show();
  });
  list.addEventListener("focusout", (event) => {
    if (thingOf(event.relatedTarget)) return; // it only moves on
    cursor = null;
    show();
  });
}
document.addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey) return;
  if (event.key === "Escape") letGo();
  if (event.target.matches("input, summary")) return; // their keys are their own
  const thing = thingOf(event.target);
  const to = thing?.matches(".field") ? rowFor(event.key, indexOf(thing)) : undefined;
  const next = to ?? tokenFor(event.key);
  if (next !== undefined) stepTo(next);
  else if ((event.key === "Enter" || event.key === " ") && thing?.matches(".token")) toggle(indexOf(thing));
  else return; // a row has a button, which takes the other keys itself
  event.preventDefault();
});

/** The row that a key leads to from row `i`. */
function rowFor(key, i) {
  const first = nTokens;
  const last = nTokens + fields.length - 1;
  const to = { ArrowUp: i - 1, ArrowDown: i + 1, Home: first, End: last }[key];
  return to === undefined ? undefined : Math.max(first, Math.min(last, to));
}

/** The token that a key leads to; from a field into its own. */
function tokenFor(key) {
  const now = cursor ?? pinned;
  const [first, last] = [targetsOf(now)[0], targetsOf(now).at(-1)];
  const outside = fieldOf(now) ? 0 : 1;
  const to = {
    ArrowLeft: last === undefined ? nTokens - 1 : last - outside,
    ArrowRight: first === undefined ? 0 : first + outside,
    Home: 0,
    End: nTokens - 1,
  }[key];
  return to === undefined ? undefined : Math.max(0, Math.min(nTokens - 1, to));
}

/** Keep the next word with low evidence, and after the last the first again. */
$("low-step").addEventListener("click", () => {
  const now = targetsOf(pinned)[0] ?? -1;
  const next = lowWords.find(({ targets }) => targets[0] > now) ?? lowWords[0];
  cursor = null;
  if (pinned !== next.targets[0]) toggle(next.targets[0]);
});

/** The pin, if there is one, travels along. */
function stepTo(i) {
  if (pinned !== null) pinned = i;
  const button = buttonOf(things[i]);
  things[i].parentElement.querySelector('[tabindex="0"]').tabIndex = -1;
  button.tabIndex = 0;
  button.focus({ preventScroll: true });
  things[i].scrollIntoView({ block: "nearest" });
  cursor = i;
  show();
}

function toggle(i) {
  pinned = pinned === i ? null : i;
  show();
  things[pinned]?.scrollIntoView({ block: "nearest" }); // out from under what sticks to a phone's edges
}

function letGo() {
  cursor = pinned = null;
  if (thingOf(document.activeElement)) document.activeElement.blur();
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

/** The token or the row of a field that a node is a part of. */
function thingOf(node) {
  return node?.closest?.(".token, .field");
}

function buttonOf(thing) {
  return thing.querySelector("button") ?? thing;
}

function indexOf(thing) {
  return Number(thing.dataset.index);
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
