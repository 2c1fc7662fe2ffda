// The plan as compact.py wrote it, decoded: `sites` are objects, options are shared.
const data = JSON.parse(document.getElementById("data").textContent);
const text = (index) => data.texts[index];

// JSON has no infinity: it comes as a text.
const numeric = (value) => (typeof value === "string" ? Number(value.replace("inf", "Infinity")) : value);

const options = data.options.map(([rewrite, label, parameters, kernel, seconds, weights, state, temporary, calls, timed]) => ({
  rewrite: text(rewrite), label: text(label), parameters: text(parameters), kernel: text(kernel),
  seconds: numeric(seconds), weights, state, temporary, bytes: weights + state + (data.training ? temporary : 0),
  calls: calls.map((one, index) => ({ ...data.calls[index], seconds: one, timed: ((timed >> index) & 1) === 1 })),
}));
const optionAt = (index) => (index < 0 ? null : options[index]);
const withoutFamily = (name, family) => family.split(" + ").reduce((rest, one) => rest.replaceAll(`${one}.`, ""), name);
const nameOf = (option) => (option.rewrite === "keep" ? "kept" : `${option.rewrite} ${option.label}`.trim());

const MARKS = { "~": data.mode === "diff" ? "changed" : "rewritten", "=": "kept", "!": "locked", "x": "refused", "+": "added", "-": "removed" };
// How an error is known, from the flags of a site or an alternative.
const knownBy = (flags) => ((flags & 2) === 0 ? "" : (flags & 4) !== 0 ? "measured" : "predicted");

function decodeSites() {
  const [marks = [], families, keys, reasons, chosen, errors, kept, lists, flags] = data.sites;
  return marks.map((mark, index) => ({
    mark, family: families[index], key: text(keys[index]), reasons: reasons[index].map(text),
    option: optionAt(chosen[index]), error: numeric(errors[index]), kept: optionAt(kept[index]),
    list: lists[index], locked: (flags[index] & 1) === 1, errorBy: knownBy(flags[index]),
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
  for (let at = 0; at < flat.length; at += 5) {
    const [option, error, template, quantities, flags] = flat.slice(at, at + 5);
    const amounts = text(quantities).split("|");
    let next = 0;
    const reason = text(template).replaceAll("\u0000", () => amounts[next++] ?? "");
    found.push({ option: options[option], error: numeric(error), reason, feasible: (flags & 1) === 1, errorBy: knownBy(flags) });
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

// What most names begin with, up to their first number: left out where a name is read at a glance.
const shared = (() => {
  const counts = new Map();
  for (const { key } of entries) {
    const parts = key.split(".");
    for (let end = 1; end < parts.length && !/^\d+$/.test(parts[end - 1]); end++) {
      const prefix = `${parts.slice(0, end).join(".")}.`;
      counts.set(prefix, (counts.get(prefix) ?? 0) + 1);
    }
  }
  const common = [...counts].filter(([, count]) => count > 1 && count >= 0.6 * entries.length);
  return common.reduce((longest, [prefix]) => (prefix.length > longest.length ? prefix : longest), "");
})();
const shortOf = (key) => (shared && key.startsWith(shared) ? `…${key.slice(shared.length)}` : key);

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
const markOf = (mark) => el("span", { class: `mark ${MARKS[mark]}`, role: "img", "aria-label": MARKS[mark] }, mark);

// Text that fits a width in pixels, by the font that it is drawn with.
const ruler = document.createElement("canvas").getContext("2d");
function widthOf(value, font) {
  ruler.font = font;
  return ruler.measureText(value).width;
}
function clipped(value, width, font) {
  if (widthOf(value, font) <= width) return value;
  let [fits, over] = [0, value.length];
  while (over - fits > 1) {
    const middle = (fits + over) >> 1;
    if (widthOf(`${value.slice(0, middle)}…`, font) <= width) fits = middle; else over = middle;
  }
  return `${value.slice(0, fits)}…`;
}
