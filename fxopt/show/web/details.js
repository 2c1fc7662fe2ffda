// The panel of the selected site: why, what it costs, what else was possible, calls, source.
const COSTS = [["seconds", "time", "s"], ["weights", "weights", "bytes"], ["state", "cache", "bytes"], ["temporary", data.training ? "saved for backward" : "temporary", "bytes"]];
const OBJECTIVES = { latency: (one) => one.option.seconds, memory: (one) => one.option.bytes };
const errorText = (error) => (error === null ? "unknown" : format(error, data.unit));

function showDetails(entry) {
  const parts = [
    siblings(entry),
    el("h3", {}, entry.key),
    el("p", { class: "what" }, markOf(entry.mark), entry.what === MARKS[entry.mark] ? ` ${entry.what}` : ` ${MARKS[entry.mark]}: ${entry.what}`),
    el("p", { class: "params" }, entry.family, entry.locked ? ", locked" : "", entry.option?.parameters ? `, ${entry.option.parameters}` : ""),
  ];
  if (entry.was) {
    parts.push(el("h4", {}, "Why before"), ...reasonsOf(entry.was), el("h4", {}, "Why now"), ...reasonsOf(entry.site));
  } else {
    parts.push(el("h4", {}, "Why"), ...reasonsOf(entry));
  }
  parts.push(...costsOf(entry), ...alternativesTable(entry), ...callsOf(entry), ...sourceOf(entry), ...kernelsOf(entry));
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
  const line = (label, old, now, unit, by, kind = "") => el("tr", { class: kind },
    el("th", { scope: "row" }, label), number(old === undefined ? "-" : format(old, unit)), number(format(now, unit)),
    number(old === undefined ? "" : change(old, now)), el("td", {}, by));
  const lines = COSTS.filter(([name]) => before?.[name] || after[name]).flatMap(([name, label, unit]) => [
    line(label, before?.[name], after[name], unit, ""),
    ...(name === "seconds" ? after.calls.map((call, index) => line(
      `${call.name}, ${call.repeats} ×`, before?.calls[index]?.seconds, call.seconds, "s", timedBy(call, before?.calls[index]), "call")) : []),
  ]);
  const [was, now] = [entry.was ? errorText(entry.was.error) : "0", errorText(entry.error)];
  lines.push(el("tr", {}, el("th", { scope: "row" }, "error"), number(was), number(now), number(""), el("td", {}, entry.errorBy && (entry.mark === "=" ? "" : `${entry.errorBy}, alone`))));
  const notes = [
    after.calls.length ? "Time is that of the whole workload: its calls at this site, added up." : "Time is over the whole workload, by the plan's own costs.",
    entry.family.includes(" + ") ? " Attention and cache of a head are chosen as one: time, bytes and error are those of both." : "",
    !data.training && (before?.temporary || after.temporary) ? " Temporary bytes are alive only while a call runs." : "",
    data.relative ? " Relative errors of sites add up as squares." : "",
  ];
  return [el("h4", {}, "What it costs"), tableOf(["", "before", "after", "change", "known by"], lines, 4), el("p", { class: "note" }, ...notes)];
}

const timedBy = (call, before) => (call.timed && (before === undefined || before.timed) ? "measured" : call.timed ? "measured, before: roofline" : before?.timed ? "roofline, before: measured" : "roofline");

// The chosen option among the others, the best for what is minimised first.
function alternativesTable(entry) {
  const others = alternativesOf(entry.site);
  if (!others.length) return [];
  const chosen = { option: entry.option, error: entry.error, errorBy: entry.errorBy, reason: "chosen", feasible: true, chosen: true };
  const worth = OBJECTIVES[data.objective] ?? ((one) => one.error ?? 0);
  const rows = [chosen, ...others].sort((a, b) => worth(a) - worth(b) || (a.error ?? 0) - (b.error ?? 0));
  const costs = COSTS.filter(([name]) => name !== "temporary" && rows.some(({ option }) => option?.[name]));
  const lines = rows.map((one) => el("tr", { class: `option${one.chosen ? " chosen" : one.feasible ? "" : " no"}`, "data-option": nameOf(one.option) },
    el("th", { scope: "row" }, one.chosen ? el("span", { class: "sign", "aria-hidden": "true" }, "▸ ") : null, one.option.rewrite === "keep" ? "keep it" : withoutFamily(nameOf(one.option), entry.family)),
    ...costs.map(([name, , unit]) => number(format(one.option[name], unit))),
    number(one.error === null ? "-" : `${format(one.error, "")}${one.errorBy === "predicted" ? " ?" : ""}`),
    el("td", { class: "reason" }, one.chosen ? el("b", {}, "chosen") : one.feasible ? one.reason : `✗ never fits: ${one.reason || "beyond the budget"}`)));
  const guessed = rows.some((one) => one.errorBy === "predicted");
  return [el("h4", {}, `What else was possible (${others.length}), by ${data.objective ?? "error"}`),
    tableOf(["choice", ...costs.map(([, label]) => label), data.unit ? `error, ${data.unit}` : "error", "why not"], lines, costs.length + 2, "alternatives"),
    ...(guessed ? [el("p", { class: "note" }, "?: predicted; the other errors were measured with this site alone changed.")] : [])];
}

function callsOf(entry) {
  const lines = opsOf(entry.key).flatMap(linesAt);
  if (!lines.length) return [];
  return [el("h4", {}, lines.length > 1 ? `Calls ${SIDES.join(" and ")}` : "Call"), el("pre", { class: "calls" }, ...lines.map((line) =>
    el("span", { class: line[0] === "+" ? "add" : line[0] === "-" ? "del" : "" }, `${line}\n`)))];
}

// The generated class around the site: the innermost module that has one.
function sourceOf(entry) {
  const parts = opOf(entry.key).replace(/#\d+$/, "").split(".");
  for (let end = parts.length; end >= 0; end--) {
    const at = data.sources[parts.slice(0, end).join(".")];
    if (at !== undefined) {
      return [el("details", { class: "source" }, el("summary", {}, "Generated module"), el("pre", {}, text(at)))];
    }
  }
  return [];
}

// The kernels that the rewritten call runs, with the sizes that the plan pins.
function kernelsOf(entry) {
  if (entry.mark === "=" || entry.mark === "x") return [];
  const folders = [...new Set(opsOf(entry.key).flatMap(kernelsAt))];
  if (!folders.length) return [];
  const pinned = entry.option?.kernel ? `pinned: ${entry.option.kernel}` : "no configuration pinned: sizes of tiles are chosen at launch";
  const where = data.cpu ? "; this plan's device is a CPU, which runs reference.py beside it" : "";
  return folders.map((folder) => el("details", { class: "kernel" }, el("summary", {}, `Kernel: ${folder}`),
    el("p", { class: "note" }, `kernels/${folder}/triton.py of this fxopt; ${pinned}${where}.`), el("pre", {}, text(data.kernels[folder]))));
}

const number = (value) => el("td", { class: "number" }, value);
// The first `numbers` columns after the first stand to the right.
const tableOf = (heads, rows, numbers = heads.length, kind = "") => el("div", { class: `wide ${kind}` }, el("table", {},
  el("thead", {}, el("tr", {}, ...heads.map((head, index) => el("th", { scope: "col", class: index && index < numbers ? "number" : "" }, head)))), el("tbody", {}, ...rows)));
