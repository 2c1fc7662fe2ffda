// What was tried, in two rows of the budget at a time: trials, this plan, and looser budgets.
const PLOT = { width: 560, height: 300, left: 64, right: 18, top: 16, bottom: 42 };

function pointsOf(x, y) {
  const points = [];
  const valueOf = (rows, name, fields) => {
    const row = rows.find((one) => one.name === name);
    return row ? fields.map((field) => row[field]).find((value) => typeof value === "number") : undefined;
  };
  const add = (rows, fields, kind, name) => {
    const at = [valueOf(rows, x, fields), valueOf(rows, y, fields)];
    if (at.every((value) => value !== undefined)) points.push({ x: at[0], y: at[1], kind, name });
  };
  for (const looser of data.looser) add(looser.rows, ["predicted"], "looser", `with ${looser.row} up to ${format(looser.limit, unitOf(looser.row))} (predicted)`);
  data.trials.forEach((trial, index) => {
    if (!trial.taken) add(trial.rows, ["measured", "predicted"], trial.holds ? "holds" : "fails", `trial ${index + 1}${trial.holds ? "" : ", does not hold"}`);
  });
  add(data.rows, ["before"], "original", "the original");
  const taken = data.trials.find((trial) => trial.taken)?.rows ?? [];
  const mine = data.rows.concat(taken.filter((row) => !data.rows.some((one) => one.name === row.name)));
  add(mine, ["measured", "predicted"], "taken", "this plan");
  return points;
}

const allRows = () => [...data.rows, ...data.trials.flatMap((trial) => trial.rows), ...data.looser.flatMap((looser) => looser.rows)];
const unitOf = (name) => allRows().find((row) => row.name === name)?.unit ?? "";

function buildScatter() {
  const host = find("#scatter");
  if (!host) return;
  const names = [...new Set(allRows().map((row) => row.name))].filter((name) => name !== "memory" || data.rows.some((row) => row.name === name));
  const quality = names.find((name) => ["kl", "loss_increase", "relative_error", "metric_drop"].includes(name));
  const costs = names.filter((name) => name !== quality);
  const first = data.binds.find((name) => costs.includes(name)) ?? costs.find((name) => data.rows.some((row) => row.name === name && row.limit !== null)) ?? costs[0];
  if (!first || !quality) {
    host.replaceChildren(el("p", { class: "muted" }, "This plan holds no trials."));
    return;
  }
  const axis = (label, chosen) => {
    const select = el("select", {}, ...names.map((name) => el("option", { value: name }, name)));
    select.value = chosen;
    select.addEventListener("change", () => plot());
    return { label: el("label", {}, `${label} `, select), select };
  };
  const [across, up] = [axis("across", first), axis("up", quality)];
  const canvas = el("div");
  const plot = () => canvas.replaceChildren(scatterPlot(across.select.value, up.select.value));
  host.replaceChildren(el("div", { class: "axes" }, across.label, up.label), canvas, scatterLegend());
  plot();
}

function ticks(low, high, count) {
  const rough = (high - low) / count || 1;
  const power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 5, 10].map((one) => one * power).find((one) => one >= rough);
  const found = [];
  for (let value = Math.ceil(low / step) * step; value <= high + step * 1e-9; value += step) found.push(Math.abs(value) < step * 1e-9 ? 0 : value);
  return found;
}

// Ticks of bytes are round in their own unit.
function ticksOf(name, low, high, count) {
  if (unitOf(name) !== "bytes") return ticks(low, high, count);
  const scale = UNITS.bytes.find(([, least]) => high >= least)?.[1] ?? 1;
  return ticks(low / scale, high / scale, count).map((value) => value * scale);
}

function scatterPlot(x, y) {
  const points = pointsOf(x, y);
  const limit = (name) => data.rows.find((row) => row.name === name)?.limit ?? null;
  const range = (values) => {
    const [low, high] = [Math.min(...values), Math.max(...values)];
    const pad = (high - low || Math.abs(high) || 1) * 0.08;
    return [low >= 0 ? Math.max(0, low - pad) : low - pad, high + pad];
  };
  const withLimit = (name, values) => range(limit(name) === null ? values : [...values, limit(name)]);
  const [x0, x1] = withLimit(x, points.map((point) => point.x));
  const [y0, y1] = withLimit(y, points.map((point) => point.y));
  const { width, height, left, right, top, bottom } = PLOT;
  const px = (value) => left + ((value - x0) / (x1 - x0)) * (width - left - right);
  const py = (value) => height - bottom - ((value - y0) / (y1 - y0)) * (height - top - bottom);
  const root = draw("svg", { viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": `${y} against ${x}: ${points.map((point) => `${point.name} at ${format(point.x, unitOf(x))}, ${format(point.y, unitOf(y))}`).join("; ")}` });
  const [lx, ly] = [limit(x), limit(y)];
  if (lx !== null || ly !== null) {
    const edge = { right: lx === null ? width - right : px(lx), top: ly === null ? top : py(ly) };
    root.append(draw("rect", { class: "allowed", x: left, y: edge.top, width: Math.max(0, edge.right - left), height: Math.max(0, height - bottom - edge.top) }));
    if (lx !== null) root.append(draw("line", { class: "limit", x1: px(lx), x2: px(lx), y1: top, y2: height - bottom }));
    if (ly !== null) root.append(draw("line", { class: "limit", x1: left, x2: width - right, y1: py(ly), y2: py(ly) }));
    if (lx !== null) root.append(draw("text", { class: "limit-name", x: px(lx) + 5, y: top + 10 }, `${x} limit`));
    if (ly !== null) root.append(draw("text", { class: "limit-name", x: width - right, y: py(ly) - 5, "text-anchor": "end" }, `${y} limit`));
  }
  const axis = draw("g", { class: "axis" }, draw("line", { x1: left, x2: width - right, y1: height - bottom, y2: height - bottom }), draw("line", { x1: left, x2: left, y1: top, y2: height - bottom }));
  for (const value of ticksOf(x, x0, x1, 5)) axis.append(draw("text", { x: px(value), y: height - bottom + 17, "text-anchor": "middle" }, format(value, unitOf(x))));
  for (const value of ticksOf(y, y0, y1, 5)) axis.append(draw("text", { x: left - 8, y: py(value) + 4, "text-anchor": "end" }, format(value, unitOf(y)).replace(/ nats$/, "")));
  axis.append(draw("text", { x: width - right, y: height - 6, "text-anchor": "end" }, x), draw("text", { x: 4, y: 11 }, `${y}${unitOf(y) === "nats" ? " in nats" : ""}`));
  root.append(axis);
  for (const point of points) root.append(pointShape(point, px(point.x), py(point.y), x, y));
  for (const point of points.filter((one) => one.kind === "taken" || one.kind === "original")) {
    const atRight = px(point.x) > width * 0.7;
    root.append(draw("text", { class: "point-name", x: px(point.x) + (atRight ? -13 : 13), y: py(point.y) + 4, "text-anchor": atRight ? "end" : "start" }, point.name));
  }
  return root;
}

// Shapes differ, so that the points can be told apart without colour.
function pointShape({ kind, name, ...at }, x, y, across, up) {
  const label = draw("title", {}, `${name}: ${across} ${format(at.x, unitOf(across))}, ${up} ${format(at.y, unitOf(up))}`);
  const shape = { class: `point ${kind}` };
  if (kind === "taken") return draw("path", { ...shape, d: `M${x},${y - 8}L${x + 8},${y}L${x},${y + 8}L${x - 8},${y}Z` }, label);
  if (kind === "original") return draw("rect", { ...shape, x: x - 5, y: y - 5, width: 10, height: 10 }, label);
  if (kind === "fails") return draw("path", { ...shape, d: `M${x - 5},${y - 5}L${x + 5},${y + 5}M${x - 5},${y + 5}L${x + 5},${y - 5}` }, label);
  return draw("circle", { ...shape, cx: x, cy: y, r: 5 }, label);
}

function scatterLegend() {
  const kinds = [["taken", "this plan"], ["holds", "trial that holds"], ["fails", "trial that does not"], ["looser", "with a looser limit, predicted"], ["original", "the original"]];
  const used = new Set(["taken", "original", ...data.trials.filter((trial) => !trial.taken).map((trial) => (trial.holds ? "holds" : "fails")), ...(data.looser.length ? ["looser"] : [])]);
  return el("p", { class: "legend" }, ...kinds.filter(([kind]) => used.has(kind)).map(([kind, name]) => {
    const icon = draw("svg", { viewBox: "0 0 20 20", width: 16, height: 16, "aria-hidden": "true" }, pointShape({ kind, name, x: 0, y: 0 }, 10, 10, "", ""));
    icon.querySelector("title").remove();
    icon.style.cssText = "display:inline-block;width:16px;height:16px;vertical-align:-3px;margin-right:.3em";
    return el("span", {}, icon, name);
  }));
}
