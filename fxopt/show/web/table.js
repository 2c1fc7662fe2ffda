// The table of decisions: sorted and filtered in memory; only the rows in sight are elements.
const state = { selected: -1, sort: "order", descending: false, words: "", family: "", prefix: null, hidden: new Set() };
const listeners = { select: [], filter: [] };
let shown = entries;
let grid, scroller, header;
let rowHeight = 30; // of every row: that of the longest, so that nothing is cut off

const RANKS = { "~": 0, "!": 0, "+": 1, "-": 2, "=": 3, "x": 4 };
const ratio = (entry, name) => (entry.before?.[name] ? (entry.option?.[name] ?? 0) / entry.before[name] : 1);
const COLUMNS = [
  { name: "site", order: "key", by: (a, b) => compareKeys(a.key, b.key) },
  { name: "decision", order: "what", by: (a, b) => compareKeys(a.what, b.what) },
  { name: "error", order: "error", number: true, by: (a, b) => Number(a.error ?? 0) - Number(b.error ?? 0) },
  { name: "time", order: "time", number: true, by: (a, b) => ratio(a, "seconds") - ratio(b, "seconds") },
  { name: "bytes", order: "bytes", number: true, by: (a, b) => ratio(a, "bytes") - ratio(b, "bytes") },
];
const collator = new Intl.Collator("en", { numeric: true });
const compareKeys = (a, b) => collator.compare(a, b);
// Before any column is asked for: what changed, then what was kept, then what was refused.
const inOrder = { by: (a, b) => RANKS[a.mark] - RANKS[b.mark] };

function refresh() {
  const words = state.words.toLowerCase().split(/\s+/).filter(Boolean);
  shown = entries.filter((entry) =>
    words.every((word) => entry.searched.includes(word)) &&
    (!state.family || entry.family === state.family) &&
    !state.hidden.has(entry.mark) &&
    (state.prefix === null || state.prefix.has(entry.index)));
  const column = COLUMNS.find((one) => one.order === state.sort) ?? inOrder;
  shown.sort((a, b) => (state.descending ? -1 : 1) * column.by(a, b) || a.index - b.index);
  for (const cell of header.children) {
    const mine = cell.dataset.order === state.sort;
    cell.setAttribute("aria-sort", mine ? (state.descending ? "descending" : "ascending") : "none");
  }
  find("#count").textContent = `${shown.length === entries.length ? "" : `${shown.length} of `}${entries.length} site${entries.length === 1 ? "" : "s"}`;
  scroller.setAttribute("aria-rowcount", shown.length);
  renderRows(true);
  grid.style.setProperty("--bar", `${scroller.offsetWidth - scroller.clientWidth}px`);
}

function renderRows(afresh) {
  const printing = matchMedia("print").matches;
  const first = printing ? 0 : Math.max(0, Math.floor(scroller.scrollTop / rowHeight) - 8);
  const last = printing ? shown.length : Math.min(shown.length, first + Math.ceil(scroller.clientHeight / rowHeight) + 16);
  if (!afresh && scroller.dataset.range === `${first}-${last}`) return;
  scroller.dataset.range = `${first}-${last}`;
  const rows = shown.slice(first, last).map((entry, offset) => rowOf(entry, first + offset));
  const spacer = el("div", { class: "spacer", role: "presentation" });
  spacer.style.height = `${shown.length * rowHeight}px`;
  scroller.replaceChildren(spacer, ...rows);
  if (!shown.length) scroller.append(el("p", { class: "empty" }, "No site matches the filter."));
  scroller.setAttribute("aria-activedescendant", state.selected < 0 ? "" : `site-${state.selected}`);
}

// The height that the longest names and decisions take at this width.
function measureRows() {
  const longest = (of) => [...new Map(entries.map((entry) => [of(entry), entry])).entries()]
    .sort((a, b) => b[0].length - a[0].length).slice(0, 6).map(([, entry]) => entry);
  const amounts = (entry) => `${amountsOf(entry, "seconds", "s")}${amountsOf(entry, "bytes", "bytes")}`;
  const names = (entry) => shortOf(entry.key);
  const probes = [...new Set([names, nameIn, amounts].flatMap(longest))]
    .map((entry) => rowOf(entry, 0, "probe"));
  scroller.replaceChildren(...probes);
  rowHeight = Math.max(30, ...probes.map((probe) => probe.offsetHeight));
  scroller.replaceChildren();
  grid.style.setProperty("--row", `${rowHeight}px`);
  scroller.style.height = `${Math.min(entries.length * rowHeight, Math.max(420, 10 * rowHeight)) + 2}px`;
}

const nameIn = (entry) => withoutFamily(entry.what, entry.family);
const amountsOf = (entry, name, unit) => [entry.before?.[name], entry.option?.[name]].map((value) => format(value, unit)).join(" ");

function rowOf(entry, position, kind = "body") {
  const cells = [
    el("span", { role: "gridcell", class: "key", title: entry.key, "aria-label": `${MARKS[entry.mark]} ${entry.family} ${entry.key}` },
      markOf(entry.mark), el("span", {}, el("code", {}, shortOf(entry.key)), el("span", { class: "same family" }, entry.family))),
    el("span", { role: "gridcell", class: "decision" }, nameIn(entry)),
    el("span", { role: "gridcell", class: "n error" }, entry.error === null || entry.mark === "x" ? "-" : format(entry.error, "")),
    costCell(entry, "seconds", "s"),
    costCell(entry, "bytes", "bytes"),
  ];
  const row = el("div", {
    role: "row", class: `row ${kind}`, id: kind === "body" ? `site-${entry.index}` : null, "aria-rowindex": position + 1,
    "aria-selected": String(entry.index === state.selected), onclick: () => select(entry.index),
  }, ...cells);
  row.style.top = `${position * rowHeight}px`;
  return row;
}

function costCell(entry, name, unit) {
  const [before, after] = [entry.before?.[name], entry.option?.[name]];
  const cell = el("span", { role: "gridcell", class: `n ${name}` });
  if (!before && !after) cell.append("-");
  else if (before === after || before === undefined) cell.append(el("span", { class: "same" }, format(after ?? before, unit)));
  else cell.append(el("span", { class: "was" }, `${format(before, unit)} →`), " ", el("span", {}, format(after, unit)));
  return cell;
}

function select(index, { reveal = true } = {}) {
  state.selected = index;
  const position = shown.findIndex((entry) => entry.index === index);
  if (reveal && position >= 0) {
    const top = position * rowHeight;
    if (top < scroller.scrollTop) scroller.scrollTop = top;
    else if (top + rowHeight > scroller.scrollTop + scroller.clientHeight) scroller.scrollTop = top + rowHeight - scroller.clientHeight;
  }
  renderRows(true);
  for (const listener of listeners.select) listener(entries[index]);
}

function move(step) {
  if (!shown.length) return;
  const at = shown.findIndex((entry) => entry.index === state.selected);
  const next = at < 0 ? (step > 0 ? 0 : shown.length - 1) : Math.min(shown.length - 1, Math.max(0, at + step));
  select(shown[next].index);
}

function buildTable() {
  header = el("div", { class: "row head", role: "row" }, ...COLUMNS.map((column) =>
    el("span", { role: "columnheader", class: column.number ? "n" : "", "data-order": column.order },
      el("button", { type: "button", onclick: () => sortBy(column.order) }, column.name))));
  scroller = el("div", { class: "scroll", role: "grid", tabindex: 0, "aria-label": "Decisions", onscroll: () => renderRows(false) });
  grid = el("div", { class: "grid" }, header, scroller);
  find("#table").replaceChildren(grid);
  if (shared) find("#shared").replaceChildren("… is ", el("code", {}, shared), "; ");
  const families = [...new Set(entries.map((entry) => entry.family))];
  find("#family").replaceChildren(el("option", { value: "" }, "all"), ...families.map((name) => el("option", { value: name }, name)));
  find("#family").addEventListener("change", (event) => { state.family = event.target.value; refresh(); });
  find("#filter").addEventListener("input", (event) => { state.words = event.target.value; refresh(); });
  const counts = new Map();
  for (const entry of entries) counts.set(entry.mark, (counts.get(entry.mark) ?? 0) + 1);
  find("#states").replaceChildren(...[...counts].map(([mark, count]) => stateButton(mark, count)));
  matchMedia("print").addEventListener("change", () => renderRows(true));
  addEventListener("beforeprint", () => renderRows(true));
  addEventListener("resize", () => { measureRows(); renderRows(true); });
  measureRows();
  refresh();
}

function stateButton(mark, count) {
  return el("button", { type: "button", "aria-pressed": "true", onclick: (event) => {
    const hide = !state.hidden.has(mark);
    if (hide) state.hidden.add(mark); else state.hidden.delete(mark);
    event.currentTarget.setAttribute("aria-pressed", String(!hide));
    refresh();
  } }, el("span", { class: `mark ${MARKS[mark]}`, "aria-hidden": "true" }, mark), ` ${MARKS[mark]} ${count}`);
}

function sortBy(order) {
  state.descending = state.sort === order && !state.descending;
  state.sort = order;
  scroller.scrollTop = 0;
  refresh();
}
