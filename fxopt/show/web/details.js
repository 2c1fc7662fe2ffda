// The panel of the selected site: why, what it costs, what else was possible, calls, source.
const COSTS = [["seconds", "time", "s"], ["weights", "weights", "bytes"], ["state", "cache", "bytes"], ["temporary", "temporary", "bytes"]];
const errorText = (error) => (error === null ? "unknown" : format(error, data.unit));

function showDetails(entry) {
  const parts = [
    siblings(entry),
    el("h3", {}, entry.key),
    el("p", { class: "what" }, el("span", { class: `mark ${MARKS[entry.mark]}` }, entry.mark), entry.what === MARKS[entry.mark] ? ` ${entry.what}` : ` ${MARKS[entry.mark]}: ${entry.what}`),
    el("p", { class: "params" }, entry.family, entry.locked ? ", locked" : "", entry.option?.parameters ? `, ${entry.option.parameters}` : ""),
  ];
  if (entry.was) {
    parts.push(el("h4", {}, "Why before"), ...reasonsOf(entry.was), el("h4", {}, "Why now"), ...reasonsOf(entry.site));
  } else {
    parts.push(el("h4", {}, "Why"), ...reasonsOf(entry));
  }
  parts.push(...costsOf(entry), ...alternativesTable(entry), ...callsOf(entry), ...sourceOf(entry));
  find("#details").replaceChildren(...parts.filter(Boolean));
  find("#details").scrollTop = 0;
}

const reasonsOf = (site) => site.reasons.map((reason) => el("p", {}, reason || "no reason given"));

// The heads of one attention op, and what else is decided at the same place.
function siblings(entry) {
  const others = [...new Set(opsOf(entry.key).flatMap((op) => byOp.get(op)))];
  if (others.length < 2) return null;
  return el("div", { class: "chips" }, ...others.map((other) =>
    el("button", { type: "button", "aria-current": String(other.index === entry.index), title: `${other.family} ${other.key}`, onclick: () => select(other.index) },
      `${other.mark} ${other.family}${siblingName(other.key)}`)));
}

// What tells a site from others of its op: its head, or its name where there are groups.
const siblingName = (key) => (key.includes("/kv=") ? key.slice(opOf(key).length) : ` ${key.split(".").pop()}`);

function costsOf(entry) {
  if (entry.option === null || entry.mark === "x") return [];
  const [before, after] = [entry.before, entry.option];
  const lines = COSTS.filter(([name]) => before?.[name] || after[name]).map(([name, label, unit]) =>
    el("tr", {}, el("th", { scope: "row" }, label), number(before ? format(before[name], unit) : "-"),
      number(format(after[name], unit)), number(before ? change(before[name], after[name]) : "")));
  const was = entry.was ? errorText(entry.was.error) : "0";
  lines.push(el("tr", {}, el("th", { scope: "row" }, "error"), number(was), number(errorText(entry.error)), number("")));
  return [el("h4", {}, "What it costs"), tableOf(["", "before", "after", "change"], lines),
    el("p", { class: "note" }, "Time over the whole workload, by the plan's own costs.")];
}

function alternativesTable(entry) {
  const others = alternativesOf(entry.site);
  if (!others.length) return [];
  const shownCosts = COSTS.filter(([name]) => name !== "temporary" && [entry.option, ...others.map((other) => other.option)].some((option) => option?.[name]));
  const rows = [];
  const add = (option, error, reason, fits, chosen) => {
    const cells = shownCosts.map(([name, , unit]) => number(format(option[name], unit)));
    const mark = chosen ? "chosen" : fits ? "fits" : "✗ does not fit";
    rows.push(el("tr", { class: `option${chosen ? " chosen" : fits ? "" : " no"}`, "data-option": nameOf(option) },
      el("th", { scope: "row" }, option.rewrite === "keep" ? "keep it" : nameOf(option).replace(`${entry.family}.`, "")), number(error === null ? "-" : format(error, "")), ...cells));
    rows.push(el("tr", { class: chosen ? "chosen" : fits ? "" : "no" }, el("td", { class: "reason", colspan: 2 + cells.length }, reason ? `${mark}: ${reason}` : mark)));
  };
  add(entry.option, entry.error, "", true, true);
  for (const other of others) add(other.option, other.error, other.reason, other.feasible, false);
  return [el("h4", {}, `What else was possible (${others.length})`),
    tableOf(["choice", "error", ...shownCosts.map(([, label]) => label)], rows)];
}

function callsOf(entry) {
  const lines = opsOf(entry.key).flatMap(linesAt);
  if (!lines.length) return [];
  return [el("h4", {}, lines.length > 1 ? "Calls before and after" : "Call"), el("pre", { class: "calls" }, ...lines.map((line) =>
    el("span", { class: line[0] === "+" ? "add" : line[0] === "-" ? "del" : "" }, `${line}\n`)))];
}

// The generated class around the site: the innermost module that has one.
function sourceOf(entry) {
  const parts = opOf(entry.key).replace(/#\d+$/, "").split(".");
  for (let end = parts.length; end >= 0; end--) {
    const at = data.sources[parts.slice(0, end).join(".")];
    if (at !== undefined) {
      return [el("details", {}, el("summary", {}, "Generated source"), el("pre", {}, text(at)))];
    }
  }
  return [];
}

const number = (value) => el("td", { class: "number" }, value);
const tableOf = (heads, rows) => el("div", { class: "wide" }, el("table", {},
  el("thead", {}, el("tr", {}, ...heads.map((head, index) => el("th", { scope: "col", class: index ? "number" : "" }, head)))), el("tbody", {}, ...rows)));
