// Responses as tokens under the pointer or the focus, with their numbers; order, filters and search.
// Texts of models only ever become text nodes.
(() => {
"use strict";
const block = document.getElementById("responses-data");
if (block === null) return;
const panel = document.querySelector(".token-numbers");
const batches = new Map();
for (const [name, data] of Object.entries(JSON.parse(block.textContent))) batches.set(name, begin(name, data));

// ---- numbers of tokens: three digits in two bytes, deflated (adapters/report/responses/packing.py)

const MISSING = 0xffff;

function numbers(batch) {
  batch.numbers ??= unpack(batch.data);
  return batch.numbers;
}

// (column, token of the batch) -> code; the column after the last is the length of the token's text.
async function unpack({ packed, tokens }) {
  const stream = new Blob([bytesOf(packed)]).stream().pipeThrough(new DecompressionStream("deflate-raw"));
  const raw = new Uint8Array(await new Response(stream).arrayBuffer());
  return (column, i) => raw[2 * column * tokens + i] | (raw[(2 * column + 1) * tokens + i] << 8);
}

function bytesOf(base64) {
  if (Uint8Array.fromBase64) return Uint8Array.fromBase64(base64);
  const text = atob(base64);
  const bytes = new Uint8Array(text.length);
  for (let i = 0; i < bytes.length; i++) bytes[i] = text.charCodeAt(i);
  return bytes;
}

function shown(code, lowest, signed) {
  if (code === MISSING) return "not known";
  if (code === 0) return "0";
  const size = (code - 1) >> 1;
  return written((code - 1) & 1, String(100 + (size % 900)), lowest + Math.floor(size / 900), signed);
}

function written(negative, digits, exponent, signed) {
  const sign = negative ? "\u2212" : signed ? "+" : "";
  if (!signed && exponent >= -3 && exponent <= 2) {
    const whole = exponent >= 0 ? digits.slice(0, exponent + 1) : "0";
    const rest = exponent >= 0 ? digits.slice(exponent + 1) : "0".repeat(-exponent - 1) + digits;
    return sign + whole + (rest ? "." + rest : "");
  }
  const power = String(Math.abs(exponent)).padStart(2, "0");
  return `${sign}${digits[0]}.${digits.slice(1)}e${exponent < 0 ? "\u2212" : "+"}${power}`;
}

function ofNumber(value) {
  if (value === 0) return "0";
  const [digits, exponent] = Math.abs(value).toExponential(2).split("e");
  return (value > 0 ? "+" : "") + written(value < 0, digits.replace(".", ""), Number(exponent), false);
}

// ---- a response as tokens

// line: the element of the text; split: {tokens, whole (its nodes before)}, while it is in tokens.
async function divide(line) {
  const response = line.response;
  if (line.split || !response.batch.data.packed) return line.split;
  const code = await numbers(response.batch);
  if (line.split) return line.split;
  const column = response.batch.data.columns.length;
  const lengths = Array.from({ length: response.tokens }, (_, i) => code(column, response.start + i));
  const whole = [...line.childNodes];
  const { fragment, tokens } = divided(whole, lengths);
  line.split = { tokens, whole };
  line.replaceChildren(fragment);
  line.setAttribute("role", "listbox");
  line.setAttribute("aria-orientation", "horizontal");
  highlight(response);
  return line.split;
}

function join(line) {
  if (!line.split) return;
  if (panel.line === line) hide();
  line.replaceChildren(...line.split.whole);
  line.setAttribute("role", "group");
  for (const name of ["aria-orientation", "aria-activedescendant"]) line.removeAttribute(name);
  line.split = null;
  highlight(line.response);
}

function divided(nodes, lengths) {
  const fragment = document.createDocumentFragment();
  const tokens = [];
  let left = 0;
  const open = (parent) => {
    const token = document.createElement("span");
    token.className = "t";
    token.setAttribute("role", "option");
    left = lengths[tokens.length];
    tokens.push(token);
    parent.append(token);
  };
  const take = (leaf, parent) => {
    const text = leaf.textContent;
    if (text === "") {  // the piece of a character
      open(parent);
      tokens.at(-1).append(leaf.cloneNode(false));
    }
    for (let from = 0; from < text.length; ) {
      if (left === 0) open(parent);
      if (!(left > 0)) throw new Error("the text of a response is not that of its tokens");
      const part = text.slice(from, from + left);
      const token = tokens.at(-1);
      if (leaf.nodeType === Node.TEXT_NODE) {
        if (part.startsWith(" ") && !token.hasChildNodes()) token.classList.add("d");
        token.append(part);
      } else {
        const copy = leaf.cloneNode(false);
        copy.append(part);
        token.append(copy);
      }
      from += part.length;
      left -= part.length;
    }
  };
  for (const node of nodes) {
    if (/^[fr]-/.test(node.localName)) {
      const level = node.cloneNode(false);
      for (const leaf of node.childNodes) take(leaf, level);
      fragment.append(level);
    } else take(node, fragment);
  }
  tokens.forEach(named);
  return { fragment, tokens };
}

// Space alone is no name.
function named(token) {
  if (token.textContent.trim() === "") token.setAttribute("aria-label", visible(token.textContent));
}

// ---- the numbers of one token

async function show(line, i) {
  const { response, split } = line;
  const code = await numbers(response.batch);
  if (line.split !== split || !split || !split.tokens[i]) return;
  hide();
  const { data } = response.batch;
  const token = split.tokens[i];
  const rows = data.columns.map(([name, lowest], k) => {
    const [label, unit] = data.labels[name];
    return [label, shown(code(k, response.start + i), lowest, unit === data.labels.share[1]), unit];
  });
  if (response.advantage !== null) rows.push(["advantage", ofNumber(response.advantage), ""]);
  const name = visible(token.textContent);
  const place = `token ${i + 1} of ${response.tokens}`;
  const head = element("p", "", element("code", name), `  ${place}`);
  const list = element("dl", "");
  for (const [label, value, unit] of rows) {
    const own = unit === data.labels.share[1] ? "" : ` ${unit}`;
    list.append(element("dt", label), element("dd", value + own));
  }
  const unit = element("p", `Shares and their parts in ${data.labels.share[1]}`);
  unit.className = "unit";
  panel.replaceChildren(head, list, unit);
  panel.hidden = false;
  panel.line = line;
  panel.token = token;
  put(token);
  token.classList.add("active");
  token.id = "token-in-focus";
  token.setAttribute("aria-selected", "true");
  token.setAttribute("aria-label", `${name}, ${rows.map((row) => row.join(" ").trim()).join(", ")}; ${place}`);
  if (line === document.activeElement) line.setAttribute("aria-activedescendant", token.id);
  line.at = i;
}

function hide() {
  panel.hidden = true;
  if (!panel.token) return;
  panel.token.classList.remove("active");
  for (const name of ["id", "aria-selected", "aria-label"]) panel.token.removeAttribute(name);
  named(panel.token);
  panel.line.removeAttribute("aria-activedescendant");
  panel.token = panel.line = null;
}

function put(token) {
  const at = token.getClientRects()[0] ?? token.getBoundingClientRect();
  const page = document.documentElement;
  const { width, height } = panel.getBoundingClientRect();
  const left = Math.max(4, Math.min(at.left, page.clientWidth - width - 4));
  const below = at.bottom + 6 + height <= page.clientHeight || at.top < height + 6;
  const top = below ? at.bottom + 6 : at.top - height - 6;
  const origin = panel.parentElement.getBoundingClientRect();
  panel.style.left = `${left - origin.left}px`;
  panel.style.top = `${top - origin.top}px`;
}

function visible(text) {
  if (text === "") return "a piece of a character";
  return `\u201c${text.replaceAll(" ", "\u2423").replaceAll("\n", "\u21b5").replaceAll("\t", "\u21e5")}\u201d`;
}

function element(name, text, ...children) {
  const made = document.createElement(name);
  made.append(...(text ? [text] : []), ...children);
  return made;
}

// ---- pointer and keys

const lineOf = (event) => event.target.closest?.(".tokens") ?? null;

function pointed(line, x, y) {
  const token = document.elementFromPoint(x, y)?.closest(".t");
  return token && line.split ? line.split.tokens.indexOf(token) : -1;
}

let under = null;  // the line under the pointer

async function point(event) {
  const line = lineOf(event);
  if (under !== null && under !== line) {
    if (under !== document.activeElement) join(under);
    else if (panel.line === under) show(under, under.at ?? 0);
  }
  under = line;
  if (line === null || !line.response) return;
  await divide(line);
  if (under !== line || !line.split) return;
  const i = pointed(line, event.clientX, event.clientY);
  if (i >= 0 && event.type === "pointerdown") line.at = i;  // before the focus that follows
  if (i >= 0 && panel.token !== line.split.tokens[i]) show(line, i);
}

async function focus(event) {
  const line = lineOf(event);
  if (line === null || !line.response) return;
  await divide(line);
  if (line.split && line === document.activeElement) show(line, line.at ?? 0);
}

function blur(event) {
  const line = lineOf(event);
  if (line !== null && line !== under) join(line);
}

function key(event) {
  const line = lineOf(event);
  if (event.key === "Escape") return hide();
  if (line === null || !line.split?.tokens.length || event.ctrlKey || event.metaKey || event.altKey) return;
  const { tokens } = line.split;
  const at = line.at ?? 0;
  const to = {
    ArrowRight: () => Math.min(at + 1, tokens.length - 1),
    ArrowLeft: () => Math.max(at - 1, 0),
    Home: () => 0,
    End: () => tokens.length - 1,
    ArrowDown: () => beside(tokens, at, 1),
    ArrowUp: () => beside(tokens, at, -1),
  }[event.key];
  if (!to) return;
  event.preventDefault();
  const i = to();
  tokens[i].scrollIntoView({ block: "nearest" });
  show(line, i);
}

// The token above or below: of the next row of text, the nearest.
function beside(tokens, at, step) {
  const from = tokens[at].getBoundingClientRect();
  let best = at, row = null, distance = Infinity;
  for (let i = at + step; i >= 0 && i < tokens.length; i += step) {
    const to = tokens[i].getBoundingClientRect();
    if (step * (to.top - from.top) <= from.height / 2) continue;
    row ??= to.top;
    if (Math.abs(to.top - row) > from.height / 2) break;
    if (Math.abs(to.left - from.left) < distance) [best, distance] = [i, Math.abs(to.left - from.left)];
  }
  return best;
}

// ---- order, filters, search

function begin(name, data) {
  const section = document.getElementById(`responses-${name}`);
  const batch = { name, data, section, numbers: null, found: [] };
  if (!globalThis.DecompressionStream) {
    data.packed = null;
    section.querySelector(".status").textContent = "This browser is too old to show the numbers of a token.";
  }
  const near = new IntersectionObserver((entries) => {
    if (!data.packed || !entries.some((one) => one.isIntersecting)) return;
    near.disconnect();
    numbers(batch);
  }, { rootMargin: "500px" });
  near.observe(section);
  let start = 0;
  const lines = section.querySelectorAll("article > .tokens");
  batch.responses = data.responses.map(([sequence, prompt, share, advantage, tokens], i) => {
    const line = lines[i];
    const response = { batch, i, sequence, prompt, share, advantage, tokens, start, line, article: line.parentElement };
    start += tokens;
    line.response = response;
    if (data.packed) {
      line.tabIndex = 0;
      line.setAttribute("role", "group");
      line.setAttribute("aria-label", `Tokens of response ${sequence}; arrow keys move over them`);
    }
    return response;
  });
  const controls = section.querySelector(".controls");
  const prompts = controls.querySelector('[data-control="prompt"]');
  for (const [index, label] of data.prompts) prompts.append(new Option(`${index}: ${label}`, index));
  batch.control = (which) => controls.querySelector(`[data-control="${which}"]`)?.value ?? "";
  let wait = 0;
  controls.addEventListener("input", () => {
    clearTimeout(wait);
    wait = setTimeout(arrange, 100, batch);
  });
  controls.hidden = false;
  for (const [kind, act] of [["pointerover", point], ["pointerdown", point], ["focusin", focus], ["focusout", blur]])
    section.addEventListener(kind, act);
  section.addEventListener("pointerleave", point);
  section.addEventListener("toggle", (event) => fill(event.target), true);
  return batch;
}

const ORDERS = {
  size: (a, b) => a.i - b.i,
  falls: (a, b) => (a.share ?? 0) - (b.share ?? 0),
  rises: (a, b) => (b.share ?? 0) - (a.share ?? 0),
  longest: (a, b) => b.tokens - a.tokens,
  file: (a, b) => a.sequence - b.sequence,
};

function arrange(batch) {
  const [prompt, sign, sought] = ["prompt", "sign", "search"].map(batch.control);
  const needle = sought.toLowerCase();
  const chosen = batch.responses.filter((one) =>
    (prompt === "" || one.prompt === Number(prompt)) &&
    (sign === "" || (one.advantage !== null && Math.sign(one.advantage) === Number(sign))) &&
    (needle === "" || lower(one).includes(needle)));
  chosen.sort(ORDERS[batch.control("order")]);
  const set = new Set(chosen);
  for (const one of batch.responses) one.article.hidden = !set.has(one);
  const others = batch.responses.filter((one) => one.article.hidden);
  const place = (parent, responses) => parent.replaceChildren(...responses.map((one) => one.article));
  const rest = batch.section.querySelector(".rest");
  place(batch.section.querySelector(".first"), chosen.slice(0, batch.data.shown));
  place(rest.lastElementChild, [...chosen.slice(batch.data.shown), ...others]);
  rest.hidden = chosen.length <= batch.data.shown;
  rest.querySelector(".count").textContent = Math.max(chosen.length - batch.data.shown, 0).toLocaleString("en");
  for (const one of batch.found) one.ranges = forget(one);
  batch.needle = needle;
  batch.found = needle === "" ? [] : chosen;
  for (const one of batch.found) highlight(one);
  const total = batch.responses.length.toLocaleString("en");
  batch.section.querySelector(".status").textContent = `${chosen.length.toLocaleString("en")} of ${total} responses`;
}

function lower(response) {
  response.lower ??= response.line.textContent.toLowerCase();
  return response.lower;
}

const MOST_RANGES = 20000;  // marked places of a search
const marks = typeof Highlight === "function" && CSS.highlights ? new Highlight() : null;
if (marks) CSS.highlights.set("found", marks);

function forget(response) {
  for (const range of response.ranges ?? []) marks?.delete(range);
  return [];
}

// Marks what is sought in one response, whose nodes may have changed.
function highlight(response) {
  response.ranges = forget(response);
  const { needle } = response.batch;
  if (!marks || !needle || !response.batch.found.includes(response)) return;
  if (lower(response).length !== response.line.textContent.length) return;  // as of \u0130
  const walker = document.createTreeWalker(response.line, NodeFilter.SHOW_TEXT);
  let node = walker.nextNode(), start = 0;
  const reach = (offset) => {
    while (node && offset > start + node.length) {
      start += node.length;
      node = walker.nextNode();
    }
    return [node, offset - start];
  };
  for (let at = lower(response).indexOf(needle); at >= 0 && marks.size < MOST_RANGES; at = lower(response).indexOf(needle, at + needle.length)) {
    const range = new Range();
    range.setStart(...reach(at));
    range.setEnd(...reach(at + needle.length));
    marks.add(range);
    response.ranges.push(range);
  }
}

// A prompt that stands in full at another of its responses.
function fill(details) {
  const link = details.open && details.matches?.(".prompt") ? details.querySelector("a[href^='#']") : null;
  const text = link && document.getElementById(link.hash.slice(1))?.querySelector(".text");
  if (text) link.parentElement.replaceChildren(...text.cloneNode(true).childNodes);
}

// What is linked to: unfolded, and at the top also after responses above it are drawn, whose heights
// were estimates before.
function reveal() {
  const target = document.getElementById(location.hash.slice(1));
  if (!target) return;
  target.closest(".rest")?.setAttribute("open", "");
  let before = NaN, frames = 60, still = 0;
  const settle = () => {
    target.scrollIntoView();
    const top = target.getBoundingClientRect().top + window.scrollY;
    still = top === before ? still + 1 : 0;
    before = top;
    if (still < 3 && --frames) requestAnimationFrame(settle);
  };
  requestAnimationFrame(settle);
}

document.addEventListener("keydown", key);
window.addEventListener("hashchange", reveal);
reveal();
})();
