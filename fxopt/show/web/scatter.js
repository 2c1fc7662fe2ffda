// What was tried, in two rows of the budget at a time: trials, this plan, and looser budgets.
const PLOT = { width: 600, height: 340, left: 66, right: 22, top: 22, bottom: 44, zero: 26 };
const WIDE = 15; // from this ratio of the largest to the smallest on, an axis is logarithmic
const APART = 18; // of points, in the units of the plot

// The rows in which solved outlooks and trials are told apart: letters and numbers, as in the tables.
const letterOf = (index) => String.fromCharCode(97 + (index % 26)) + (index >= 26 ? String(Math.floor(index / 26)) : "");

const isNumber = (value) => typeof value === "number";
const named = (rows, name) => rows.find((one) => one.name === name);

function pointsOf(x, y) {
  const points = [];
  const taken = data.trials.find((trial) => trial.taken)?.rows ?? [];
  const mine = data.rows.concat(taken.filter((row) => !data.rows.some((one) => one.name === row.name)));
  // A trial that was not measured in a row where this plan was: this plan's value, changed as the
  // prediction changes, as looser limits are told.
  const expected = (row) => {
    const [now, then] = [named(mine, row.name)?.measured, named(taken, row.name)?.predicted];
    return isNumber(now) && isNumber(then) && then !== 0 ? row.predicted * (now / then) : row.predicted;
  };
  const valueOf = (rows, name, fields) => {
    const row = named(rows, name);
    if (!row) return undefined;
    if (fields.includes("expected") && !isNumber(row.measured) && isNumber(row.predicted)) return expected(row);
    return fields.map((field) => row[field]).find(isNumber);
  };
  const add = (rows, fields, kind, name, label) => {
    const at = [valueOf(rows, x, fields), valueOf(rows, y, fields)];
    if (at.every((value) => value !== undefined)) points.push({ x: at[0], y: at[1], kind, name, label });
  };
  add(mine, ["measured", "predicted"], "taken", "this plan", "this plan");
  add(mine, ["before"], "original", "the original", "the original");
  data.trials.forEach((trial, index) => {
    if (!trial.taken) add(trial.rows, ["measured", "expected"], trial.holds ? "holds" : "fails", `trial ${index + 1}${trial.holds ? "" : ", does not hold"}`, String(index + 1));
  });
  data.looser.forEach((looser, index) => add(looser.rows, ["predicted"], "looser", `with ${looser.row} up to ${format(looser.limit, unitOf(looser.row))} (predicted)`, letterOf(index)));
  return points;
}

const allRows = () => [...data.rows, ...data.trials.flatMap((trial) => trial.rows), ...data.looser.flatMap((looser) => looser.rows)];
const unitOf = (name) => allRows().find((row) => row.name === name)?.unit ?? "";

function buildScatter() {
  const host = find("#scatter");
  if (!host) return;
  const names = [...new Set(allRows().map((row) => row.name))];
  const limited = data.rows.filter((row) => row.limit !== null).map((row) => row.name);
  // what is minimised against what stands in its way
  const first = [...data.binds, ...limited].find((name) => name !== data.objective);
  if (!first || !names.includes(data.objective) || (!data.trials.length && !data.looser.length)) {
    host.replaceChildren(el("p", { class: "muted" }, "This plan holds no trials."));
    return;
  }
  const axis = (label, chosen) => {
    const select = el("select", {}, ...names.map((name) => el("option", { value: name }, name)));
    select.value = chosen;
    select.addEventListener("change", () => plot());
    return { label: el("label", {}, `${label} `, select), select };
  };
  const [across, up] = [axis("across", first), axis("up", data.objective)];
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

// Round numbers that lie evenly on a logarithmic axis.
function logTicks(low, high) {
  const found = [];
  for (let power = Math.floor(Math.log10(low)); power <= Math.log10(high); power++) {
    for (const digit of [1, 2, 5]) if (digit * 10 ** power >= low && digit * 10 ** power <= high) found.push(digit * 10 ** power);
  }
  return found.length > 6 ? found.filter((value) => Number(value.toExponential(0)[0]) === 1) : found;
}

// A scale from values to a length: logarithmic where they are far apart, with a place for zero.
function scaleOf(name, values, limit, length) {
  const all = limit === null ? values : [...values, limit];
  const positive = all.filter((value) => value > 0);
  const [least, most] = [Math.min(...positive), Math.max(...all)];
  const log = positive.length > 1 && most / least >= WIDE && all.every((value) => value >= 0);
  if (log) {
    const start = positive.length < all.length ? PLOT.zero : 0;
    const [low, high] = [Math.log(least / 1.35), Math.log(most * 1.35)];
    const at = (value) => (value <= 0 ? 8 : start + ((Math.log(value) - low) / (high - low)) * (length - start));
    const marks = logTicks(least / 1.35, most * 1.35);
    return { at, log, gap: start, ticks: start ? [0, ...marks] : marks };
  }
  const [low, high] = [Math.min(...all), Math.max(...all)];
  const pad = (high - low || Math.abs(high) || 1) * 0.08;
  const [from, to] = [low >= 0 ? Math.max(0, low - pad) : low - pad, high + pad];
  // bytes are round in their own unit
  const unit = unitOf(name) === "bytes" ? UNITS.bytes.find(([, size]) => to >= size)?.[1] ?? 1 : 1;
  return { at: (value) => ((value - from) / (to - from)) * length, log, gap: 0, ticks: ticks(from / unit, to / unit, 5).map((value) => value * unit) };
}

function scatterPlot(x, y) {
  const points = pointsOf(x, y);
  const limit = (name) => data.rows.find((row) => row.name === name)?.limit ?? null;
  const { width, height, left, right, top, bottom } = PLOT;
  const [across, up] = [scaleOf(x, points.map((point) => point.x), limit(x), width - left - right), scaleOf(y, points.map((point) => point.y), limit(y), height - top - bottom)];
  const [px, py] = [(value) => left + across.at(value), (value) => height - bottom - up.at(value)];
  const said = points.map((point) => `${point.name} at ${format(point.x, unitOf(x))}, ${format(point.y, unitOf(y))}`).join("; ");
  const root = draw("svg", { viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": `${y} against ${x}: ${said}` });
  const taken = [];
  root.append(...limitsIn(x, y, limit, px, py), ...axesIn(x, y, across, up, px, py));
  const placed = apart(points.map((point) => ({ ...point, tx: px(point.x), ty: py(point.y) })));
  root.append(draw("path", { class: "frontier", d: frontierOf(placed) }));
  for (const point of placed) {
    if (point.px !== point.tx || point.py !== point.ty) root.append(draw("line", { class: "leader", x1: point.tx, y1: point.ty, x2: point.px, y2: point.py }));
  }
  for (const point of placed) root.append(pointShape(point, point.px, point.py, x, y));
  for (const point of placed) taken.push({ x: point.px - 9, y: point.py - 9, width: 18, height: 18 });
  for (const point of placed.filter((one) => !isCoded(one))) root.append(...labelFor(point, taken));
  root.append(...limitNames(x, y, limit, px, py, taken));
  return root;
}

function limitsIn(x, y, limit, px, py) {
  const { width, height, left, right, top, bottom } = PLOT;
  const [lx, ly] = [limit(x), limit(y)];
  if (lx === null && ly === null) return [];
  const edge = { right: lx === null ? width - right : px(lx), top: ly === null ? top : py(ly) };
  const made = [draw("rect", { class: "allowed", x: left, y: edge.top, width: Math.max(0, edge.right - left), height: Math.max(0, height - bottom - edge.top) })];
  if (lx !== null) made.push(draw("line", { class: "limit", x1: px(lx), x2: px(lx), y1: top, y2: height - bottom }));
  if (ly !== null) made.push(draw("line", { class: "limit", x1: left, x2: width - right, y1: py(ly), y2: py(ly) }));
  return made;
}

// The names of limits, along their lines where nothing else is.
function limitNames(x, y, limit, px, py, taken) {
  const { width, height, left, right, top, bottom } = PLOT;
  const [lx, ly] = [limit(x), limit(y)];
  const name = (text, places) => {
    const size = { width: text.length * 6.2, height: 12 };
    const boxes = places(size.width).map(([bx, by]) => ({ x: bx, y: by, ...size })).filter((box) => box.x >= left && box.x + box.width <= width);
    const box = boxes.find((one) => !taken.some((other) => meets(one, other))) ?? boxes[0];
    taken.push(box);
    return draw("text", { class: "limit-name", x: box.x, y: box.y + 10 }, text);
  };
  const shares = [0, 0.2, 0.4, 0.6, 0.8, 1];
  const made = [];
  if (lx !== null) made.push(name(`${x} limit`, (wide) => shares.flatMap((share) => [px(lx) + 5, px(lx) - 5 - wide].map((at) => [at, top + share * (height - top - bottom - 14)]))));
  if (ly !== null) made.push(name(`${y} limit`, (wide) => shares.flatMap((share) => [py(ly) - 15, py(ly) + 3].map((at) => [width - right - wide - share * (width - left - right - wide), at]))));
  return made;
}

const meets = (a, b) => a.x < b.x + b.width && b.x < a.x + a.width && a.y < b.y + b.height && b.y < a.y + a.height;

function axesIn(x, y, across, up, px, py) {
  const { width, height, left, right, top, bottom } = PLOT;
  const [floor, log] = [height - bottom, (scale) => (scale.log ? ", logarithmic" : "")];
  const axis = draw("g", { class: "axis" }, draw("line", { x1: left, x2: width - right, y1: floor, y2: floor }), draw("line", { x1: left, x2: left, y1: top, y2: floor }));
  let end = -Infinity;
  for (const value of across.ticks) {
    const name = format(value, unitOf(x)).replace(/ nats$/, "");
    const at = px(value);
    if (at - name.length * 3.4 < end) continue;
    end = at + name.length * 3.4 + 6;
    axis.append(draw("line", { x1: at, x2: at, y1: floor, y2: floor + 4 }), draw("text", { x: at, y: floor + 17, "text-anchor": "middle" }, name));
  }
  for (const value of up.ticks) axis.append(draw("line", { x1: left - 4, x2: left, y1: py(value), y2: py(value) }), draw("text", { x: left - 8, y: py(value) + 4, "text-anchor": "end" }, format(value, unitOf(y)).replace(/ nats$/, "")));
  axis.append(draw("text", { class: "axis-name", x: width - right, y: height - 6, "text-anchor": "end" }, `${x}${unitOf(x) === "nats" ? " in nats" : ""}${log(across)} →`), draw("text", { class: "axis-name", x: 4, y: 12 }, `↑ ${y}${unitOf(y) === "nats" ? " in nats" : ""}${log(up)}`));
  return [axis];
}

// Points that would cover each other are moved aside, each with a line to where it belongs.
function apart(points) {
  const { width, height, left, right, top, bottom } = PLOT;
  const steps = [[0, 0]];
  for (let ring = 1; ring < 7; ring++) {
    for (let turn = 0; turn < 6 * ring; turn++) {
      const angle = (turn / (6 * ring)) * 2 * Math.PI;
      steps.push([ring * APART * 1.05 * Math.cos(angle), ring * APART * 1.05 * Math.sin(angle)]);
    }
  }
  const placed = [];
  for (const point of points) {
    const [dx, dy] = steps.find(([sx, sy]) => {
      const [x, y] = [point.tx + sx, point.ty + sy];
      const inside = x >= left + 4 && x <= width - right && y >= top && y <= height - bottom - 4;
      return (inside || (sx === 0 && sy === 0)) && placed.every((other) => Math.hypot(other.px - x, other.py - y) >= APART);
    }) ?? [0, 0];
    placed.push({ ...point, px: point.tx + dx, py: point.ty + dy });
  }
  return placed;
}

// Through the points of which no other is better in both rows: less is better in each.
function frontierOf(points) {
  const best = points.filter((point) => !points.some((other) =>
    other.x <= point.x && other.y <= point.y && (other.x < point.x || other.y < point.y))).sort((a, b) => a.tx - b.tx || a.ty - b.ty);
  if (best.length < 2) return "";
  return best.map((point, index) => (index ? `H${point.tx}V${point.ty}` : `M${point.tx},${point.ty}`)).join("");
}

// Trials and looser limits have their number or letter within; the others are named beside.
const isCoded = ({ kind }) => kind !== "taken" && kind !== "original";

// The name of a point, at the first place about it where nothing else is.
function labelFor(point, taken) {
  const size = { width: point.label.length * 6.6, height: 13 };
  const places = [12, 22, 34, 48, 64].flatMap((far) => [[far, -6], [-far - size.width, -6], [-size.width / 2, -far - 9], [-size.width / 2, far - 4],
    [far * 0.7, -far], [far * 0.7, far - 9], [-far * 0.7 - size.width, -far], [-far * 0.7 - size.width, far - 9]]);
  const boxes = places.map(([dx, dy]) => ({ x: point.px + dx, y: point.py + dy, ...size }));
  const inside = (box) => box.x >= PLOT.left + 3 && box.x + box.width <= PLOT.width && box.y >= PLOT.top - 6 && box.y + box.height <= PLOT.height - PLOT.bottom - 1;
  const box = boxes.find((one) => inside(one) && !taken.some((other) => meets(one, other))) ?? boxes.find(inside) ?? boxes[0];
  taken.push(box);
  const [x, y] = [Math.min(Math.max(point.px, box.x), box.x + box.width), Math.min(Math.max(point.py, box.y), box.y + box.height)];
  const leader = Math.hypot(x - point.px, y - point.py) > 16 ? [draw("line", { class: "leader", x1: point.px, y1: point.py, x2: x, y2: y })] : [];
  return [...leader, draw("text", { class: "point-name", x: box.x, y: box.y + 10 }, point.label)];
}

// Shapes differ, so that the points can be told apart without colour.
function pointShape({ kind, name, label, ...at }, x, y, across, up) {
  const title = draw("title", {}, `${name}: ${across} ${format(at.x, unitOf(across))}, ${up} ${format(at.y, unitOf(up))}`);
  const shape = { class: `point ${kind}` };
  const code = isCoded({ kind }) ? draw("text", { class: "code", x, y: y + 3.4, "text-anchor": "middle" }, label) : null;
  const group = (...parts) => draw("g", shape, title, ...parts, code);
  if (kind === "taken") return group(draw("path", { d: `M${x},${y - 9}L${x + 9},${y}L${x},${y + 9}L${x - 9},${y}Z` }));
  if (kind === "original") return group(draw("path", { d: `M${x - 6},${y - 6}H${x + 6}V${y + 6}H${x - 6}Z` }));
  if (kind === "looser") return group(draw("circle", { cx: x, cy: y, r: 7.5 }));
  const square = draw("rect", { x: x - 7, y: y - 7, width: 14, height: 14, rx: 2 });
  return kind === "holds" ? group(square) : group(square, draw("path", { class: "strike", d: `M${x - 7},${y + 7}L${x + 7},${y - 7}` }));
}

function scatterLegend() {
  const kinds = [["taken", "this plan"], ["holds", "trial that holds"], ["fails", "trial that does not hold"], ["looser", "with a looser limit, predicted"], ["original", "the original"]];
  const used = new Set(["taken", "original", ...data.trials.filter((trial) => !trial.taken).map((trial) => (trial.holds ? "holds" : "fails")), ...(data.looser.some((one) => one.rows.length) ? ["looser"] : [])]);
  const icon = (child) => {
    const made = draw("svg", { viewBox: "0 0 20 20", width: 16, height: 16, "aria-hidden": "true", class: "icon" }, child);
    made.querySelector("title")?.remove();
    return made;
  };
  return el("p", { class: "legend" }, ...kinds.filter(([kind]) => used.has(kind)).map(([kind, name]) => el("span", {}, icon(pointShape({ kind, name, label: "", x: 0, y: 0 }, 10, 10, "", "")), name)),
    el("span", {}, icon(draw("path", { class: "frontier", d: "M1,4V14H19" })), "frontier: nothing here is better in both"));
}
