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
const PLAY_MS = 400; // fewer than three frames a second: no picture flashes faster than is safe
const CALM_PLAY_MS = 1000; // for readers who ask for less motion

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
  if (/^\s+$/.test(text)) word.classList.add(text.includes("\n") ? "newline" : "space");
  return word;
});
const rows = fields.map(buildRow);
const words = [...promptWords, ...responseWords];
const things = [...responseWords, ...rows]; // all that can be shown
const tints = new Uint8Array(words.length);
const screens = page.pictures.map(buildScreen);

layOut($("prompt"), page.prompt, promptWords);
layOut($("response"), page.response, responseWords, page.folds);
$("fields").append(...rows);
$("fields-count").textContent = `${fields.length} ${fields.length === 1 ? "value" : "values"}`;
document.body.classList.toggle("structured", fields.length > 0);
$("pictures").classList.toggle("several", screens.length > 1);
$("strongest-key").hidden = screens.length < 2;
$("bars-key").hidden = screens.every(({ count }) => count < 2);
$("model").textContent = page.model;
responseWords.forEach((word, i) => (word.tabIndex = i === (nextShown(0, 1) ?? 0) ? 0 : -1));
const answer = [...$("response").childNodes].filter((part) => part.nodeName !== "DETAILS").map((part) => part.textContent).join("");
document.title = `${answer.trim().replace(/\s+/g, " ").slice(0, 60)} · fastattr`;
buildSwitch();
drawHeatKey();
use(0);

/** Append the tokens in order; those of a fold go into a <details> element. */
function layOut(parent, { pieces, tail }, spans, folds = []) {
  const ranges = folds[Symbol.iterator]();
  let [first, last] = ranges.next().value ?? [];
  let into = parent;
  pieces.forEach(([before], i) => {
    if (i === first) {
      into = element("details", "fold");
      into.append(element("summary", "", `Reasoning · ${last - first} ${last - first === 1 ? "token" : "tokens"}`));
      parent.append(into);
    }
    into.append(before, spans[i]);
    if (i + 1 !== last) return;
    into = parent;
    [first, last] = ranges.next().value ?? [];
  });
  parent.append(tail);
}

/** Whether a token is inside a closed fold. */
function isFolded(i) {
  return i < nTokens && responseWords[i].closest("details:not([open])") !== null;
}

/** The visible token nearest to `i` in the given direction, or else in the other one. */
function nextShown(i, direction) {
  const along = (by) => {
    let at = i;
    while (at >= 0 && at < nTokens && isFolded(at)) at += by;
    return at >= 0 && at < nTokens ? at : undefined;
  };
  return along(direction) ?? along(-direction);
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

/** A picture with its overlay; a video also has a player, and where there are several each has its caption. */
function buildScreen(picture, k) {
  const count = Math.max(picture.frames.length, ...page.views.map((v) => v.maps[k].grid[0]));
  const name = `${count > 1 ? "video" : "image"} ${k + 1}`;
  const figure = element("figure", count > 1 ? "video" : "image");
  figure.style.setProperty("--aspect", picture.width / picture.height);
  const stack = element("div", "stack");
  const canvas = element("canvas", "overlay");
  canvas.dataset.image = k;
  const img = element("img");
  img.alt = `${name[0].toUpperCase()}${name.slice(1)}, ${picture.width} by ${picture.height} pixels`;
  if (picture.frames.length) stack.append(img);
  else stack.classList.add("blank");
  const frameOfBox = element("div", "frame");
  frameOfBox.hidden = true;
  stack.append(canvas, frameOfBox);
  figure.append(stack);
  $("pictures").append(figure);

  const screen = { k, picture, name, figure, img, canvas, frameOfBox, count, frame: -1, held: false, timer: 0 };
  if (count > 1) figure.append(buildPlayer(screen));
  if (page.pictures.length > 1) {
    const caption = element("figcaption", "", name);
    caption.append(element("span", "", " · strongest"));
    figure.append(caption);
  }
  return screen;
}

/** Play, and a timeline: a slider over bars that show how strong the map is at each time step. */
function buildPlayer(screen) {
  const player = element("div", "player");
  const button = element("button", "play");
  button.type = "button";
  const timeline = element("div", "timeline");
  timeline.style.setProperty("--count", screen.count);
  const strip = element("div", "strip");
  strip.setAttribute("role", "img");
  const slider = element("input");
  slider.type = "range";
  slider.max = screen.count - 1;
  slider.value = 0;
  slider.title = "← → a frame, space to play";
  slider.setAttribute("aria-label", `Frame of ${screen.name}`);
  const output = element("output");
  output.setAttribute("aria-live", "off"); // a frame every 400 ms is not to be read out
  timeline.append(strip, slider);
  player.append(button, timeline, output);
  Object.assign(screen, { slider, button, strip, output });
  labelPlay(screen);
  slider.addEventListener("input", () => hold(screen, Number(slider.value)));
  button.addEventListener("click", () => playOrHold(screen));
  player.addEventListener("keydown", (event) => playerKey(screen, event));
  return player;
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
    for (const map of view.maps) map.levels = decode(map.levels);
  }
  for (const screen of screens) {
    fitCanvas(screen);
    if (screen.strip) fitStrip(screen);
  }
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

/** A bar for each time step, as wide as its frames. */
function fitStrip({ k, count, strip }) {
  const [t] = view.maps[k].grid;
  const bars = Array.from({ length: t }, (_, step) => {
    const bar = element("i");
    bar.style.flexGrow = firstFrame(step + 1, t, count) - firstFrame(step, t, count);
    return bar;
  });
  strip.replaceChildren(...bars);
}

function firstFrame(step, steps, count) {
  return Math.ceil((step * count) / steps);
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
  for (const screen of screens) {
    screen.heat = heatOf(view.maps[screen.k]);
    screen.peaks = peaksOf(view.maps[screen.k], screen.heat);
  }
  compareScreens();
  screens.forEach((screen) => setFrame(screen, screen.timer || screen.held ? screen.frame : bestFrame(screen)));
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

/** The highest level of each time step; nothing where there is no map. */
function peaksOf({ grid: [t, h, w] }, heat) {
  if (!heat) return [];
  return Array.from({ length: t }, (_, step) => {
    let peak = 0;
    for (let i = step * h * w; i < (step + 1) * h * w; i++) if (heat[i] > peak) peak = heat[i];
    return peak;
  });
}

/** Outline the one of several pictures with the highest peak, and draw each video's bars on one scale. */
function compareScreens() {
  const highest = Math.max(0, ...screens.flatMap(({ peaks }) => peaks));
  const strongest = highest > 0 ? screens.find(({ peaks }) => peaks.includes(highest)) : undefined;
  for (const screen of screens) {
    screen.figure.classList.toggle("strongest", screens.length > 1 && screen === strongest);
    if (screen.strip) drawStrip(screen, highest);
  }
  if (screens.length > 1 && strongest) bringIntoView(strongest.figure, $("pictures"));
}

/** Scroll a box, and nothing around it, as little as shows a whole part of it. */
function bringIntoView(part, box) {
  const [inner, outer] = [part.getBoundingClientRect(), box.getBoundingClientRect()];
  if (inner.top < outer.top) box.scrollTop += inner.top - outer.top - 5;
  else if (inner.bottom > outer.bottom) box.scrollTop += Math.min(inner.bottom - outer.bottom + 5, inner.top - outer.top - 5);
}

/** Bars relative to the highest of the word: many a right map peaks at a fifth, and it is *when* that they show. */
function drawStrip(screen, highest) {
  const { strip, peaks, name, count } = screen;
  const best = bestStep(screen);
  [...strip.children].forEach((bar, step) => {
    bar.style.setProperty("--share", highest > 0 ? (peaks[step] ?? 0) / highest : 0);
    bar.classList.toggle("best", step === best);
  });
  const where = best === null ? "no word is shown, or its map is dark" : `highest at frame ${firstFrame(best, peaks.length, count) + 1}`;
  strip.setAttribute("aria-label", `Strength of the shown word over ${name}: ${where}`);
}

/** The time step where the map of what is shown peaks; null where it is dark or nothing is shown. */
function bestStep(screen) {
  const { grid: [t], peaks } = view.maps[screen.k];
  if (active === null || t === 1) return null;
  return fieldOf(active) ? (boxOf(screen)?.[4] ?? null) : peaks[active];
}

function bestFrame(screen) {
  const best = bestStep(screen);
  if (best === null) return Math.max(0, screen.frame);
  return firstFrame(best, view.maps[screen.k].grid[0], screen.count);
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
      screen.slider.setAttribute("aria-valuetext", `frame ${frame + 1} of ${count}`);
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

// ---- playing a video ---------------------------------------------------------------------------

// A word that is pointed at or kept brings a video to the frame where its map peaks. A reader who chose a frame has it
// held: other words are then seen on that frame, until one is kept or all is let go. While a video plays, it plays.

/** Stay on a frame that the reader chose. */
function hold(screen, frame) {
  stop(screen);
  screen.held = true;
  setFrame(screen, frame);
}

function release() {
  for (const screen of screens) screen.held = false;
}

function playOrHold(screen) {
  if (screen.timer) return hold(screen, screen.frame);
  const last = screen.count - 1;
  if (screen.frame === last) setFrame(screen, 0);
  screen.held = false;
  const calm = matchMedia("(prefers-reduced-motion: reduce)").matches;
  screen.timer = setInterval(() => {
    setFrame(screen, screen.frame + 1);
    if (screen.frame === last) stop(screen);
  }, calm ? CALM_PLAY_MS : PLAY_MS);
  labelPlay(screen);
}

function stop(screen) {
  clearInterval(screen.timer);
  screen.timer = 0;
  labelPlay(screen);
}

function labelPlay({ button, name, timer }) {
  button.classList.toggle("playing", timer !== 0);
  button.title = timer ? "Pause" : "Play";
  button.setAttribute("aria-label", `${button.title} ${name}`);
}

/** The slider takes the keys of time itself, the button those that press it; here is what each of them lacks. */
function playerKey(screen, event) {
  if (event.ctrlKey || event.metaKey || event.altKey) return;
  const onSlider = event.target === screen.slider;
  const last = screen.count - 1;
  const to = { ArrowLeft: screen.frame - 1, ArrowRight: screen.frame + 1, Home: 0, End: last }[event.key];
  if (onSlider && event.key === " ") playOrHold(screen);
  else if (!onSlider && to !== undefined) hold(screen, Math.max(0, Math.min(last, to)));
  else return;
  event.preventDefault();
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
    if (!thingOf(event.target) || !event.target.matches(":focus-visible")) return; // a click also focuses, and has its own handler
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
  if (event.target.closest("input, summary, .player")) return; // their keys are their own
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
  if (to === undefined) return undefined;
  return nextShown(Math.max(0, Math.min(nTokens - 1, to)), key === "ArrowLeft" || key === "End" ? -1 : 1);
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
  if (pinned !== null) keep(i);
  const button = buttonOf(things[i]);
  things[i].closest("#response, #fields").querySelector('[tabindex="0"]').tabIndex = -1;
  button.tabIndex = 0;
  button.focus({ preventScroll: true });
  things[i].scrollIntoView({ block: "nearest" });
  cursor = i;
  show();
}

/** Another word that is kept may move the videos again; one that is let go leaves them where they are. */
function keep(i) {
  if (i !== null && i !== pinned) release();
  pinned = i;
}

function toggle(i) {
  keep(pinned === i ? null : i);
  show();
  things[pinned]?.scrollIntoView({ block: "nearest" }); // out from under what sticks to a phone's edges
}

function letGo() {
  cursor = pinned = null;
  release();
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
