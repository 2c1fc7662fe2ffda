// The plan as compact.py wrote it, decoded: `sites` are objects, options are shared.
const data = JSON.parse(document.getElementById("data").textContent);
const text = (index) => data.texts[index];

// JSON has no infinity: it comes as a text.
const numeric = (value) => (typeof value === "string" ? Number(value.replace("inf", "Infinity")) : value);

const options = data.options.map(([rewrite, label, parameters, seconds, weights, state, temporary]) => ({
  rewrite: text(rewrite), label: text(label), parameters: text(parameters),
  seconds: numeric(seconds), weights, state, temporary, bytes: weights + state,
}));
const optionAt = (index) => (index < 0 ? null : options[index]);
const nameOf = (option) => (option.rewrite === "keep" ? "kept" : `${option.rewrite} ${option.label}`.trim());

const MARKS = { "~": data.mode === "diff" ? "changed" : "rewritten", "=": "kept", "!": "locked", "x": "refused", "+": "added", "-": "removed" };

function decodeSites() {
  const [marks = [], families, keys, reasons, chosen, errors, kept, lists, locked] = data.sites;
  return marks.map((mark, index) => ({
    mark, family: families[index], key: text(keys[index]), reasons: reasons[index].map(text),
    option: optionAt(chosen[index]), error: numeric(errors[index]), kept: optionAt(kept[index]),
    list: lists[index], locked: locked[index] === 1,
    what: mark === "x" || chosen[index] < 0 ? "refused" : nameOf(options[chosen[index]]),
  }));
}

// What the table lists: each site with what stood there before, an option or another decision.
function decodeEntries() {
  const sites = decodeSites();
  if (data.mode === "plan") return sites.map((site) => ({ ...site, site, before: site.kept, was: null }));
  return data.pairs.map(([old, now]) => {
    const was = sites[old] ?? null;
    const site = sites[now] ?? was;
    const mark = was === null ? "+" : now < 0 ? "-" : "~";
    const what = was === null || now < 0 ? site.what : `${was.what} → ${site.what}`;
    return { ...site, site, was, mark, what, before: was?.option ?? null };
  });
}

const entries = decodeEntries().map((entry, index) => ({
  ...entry, index,
  searched: [entry.key, entry.what, MARKS[entry.mark], entry.family, ...entry.reasons].join(" ").toLowerCase(),
}));

function alternativesOf(site) {
  const flat = site.list < 0 ? [] : data.alternatives[site.list];
  const found = [];
  for (let at = 0; at < flat.length; at += 4) {
    const [option, written, reason, feasible] = flat.slice(at, at + 4);
    const error = numeric(written);
    const why = text(reason).replace("\u0001", () => exponent(error)).replace("\u0002", () => exponent(site.error));
    found.push({ option: options[option], error, reason: why, feasible: feasible === 1 });
  }
  return found;
}

// Sites by the op that they are heads of, which is how graphs name them.
// A group of linear layers, "mlp.gate_proj+up_proj", stands for several.
function opsOf(key) {
  const [first, ...others] = key.replace(/\/kv=\d+$/, "").split("+");
  const prefix = first.includes(".") ? first.slice(0, first.lastIndexOf(".") + 1) : "";
  return [first, ...others.map((other) => (other.includes(".") ? other : prefix + other))];
}
const opOf = (key) => opsOf(key)[0];
const byOp = new Map();
for (const entry of entries) {
  for (const op of opsOf(entry.key)) {
    if (!byOp.has(op)) byOp.set(op, []);
    byOp.get(op).push(entry);
  }
}

// Elements: every text goes through textContent, never through markup.
const SVG = "http://www.w3.org/2000/svg";
const find = (selector) => document.querySelector(selector);

function fill(node, attributes, children) {
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
    else if (value !== null && value !== undefined && value !== false) node.setAttribute(name, value === true ? "" : value);
  }
  node.append(...children.filter((child) => child !== null && child !== undefined));
  return node;
}
const el = (tag, attributes = {}, ...children) => fill(document.createElement(tag), attributes, children);
const draw = (tag, attributes = {}, ...children) => fill(document.createElementNS(SVG, tag), attributes, children);
