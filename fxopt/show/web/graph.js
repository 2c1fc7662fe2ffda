// The selected block before and after, side by side on one layout, so that equal calls stay in place.
const blocks = data.blocks;
const blockOf = new Map(blocks.flatMap((block, index) => block.modules.map((module) => [module, index])));
const picture = { index: -1, module: "", whole: false, zoom: 1 };
const SIGNS = { rewritten: "~", added: "+", removed: "−", kept: "" };
const SIDES = data.mode === "diff" ? ["in the first plan", "in the second plan"] : ["before", "after"];
// The smallest letters are 11 pixels high; drawn smaller than 10 they are asked for.
const ZOOM = { least: 0.2, most: 4, readable: 10 / 11, step: 1.25 };

// The block that holds an op, and its name there.
function placeOf(op) {
  const parts = op.split(".");
  for (let end = parts.length; end >= 0; end--) {
    const module = parts.slice(0, end).join(".");
    if (blockOf.has(module)) return { index: blockOf.get(module), module, within: parts.slice(end).join(".") };
  }
  return null;
}

function linesAt(op) {
  const place = placeOf(op);
  if (place === null) return [];
  const wanted = blocks[place.index].lines.map(text).filter((line) => {
    const match = LINE.exec(line);
    return match && match[6] === "at" && (match[7] ?? "") === place.within;
  });
  return wanted;
}

function kernelsAt(op) {
  const place = placeOf(op);
  const kernels = place === null ? {} : blocks[place.index].kernels;
  return place !== null && Object.hasOwn(kernels, place.within) ? kernels[place.within] : [];
}

function buildGraph() {
  const host = find("#graph");
  if (!host) return;
  if (!blocks.length) {
    host.replaceChildren(el("p", { class: "muted" }, data.mode === "diff" ? "These plans hold no graphs." : "This plan holds no graph."));
    return;
  }
  const choose = el("select", { id: "block", onchange: (event) => drawBlock(Number(event.target.value), null) },
    ...blocks.map((block, index) => el("option", { value: index }, blockName(block))));
  const whole = el("input", { type: "checkbox", id: "whole", onchange: (event) => { picture.whole = event.target.checked; drawBlock(picture.index, picture.module, true); } });
  const signs = ["kept", "rewritten", "added", "removed"].map((name) => el("span", {}, el("i", { class: `i-${name}`, "aria-hidden": "true" }, SIGNS[name]), name === "kept" ? "unchanged" : name));
  host.replaceChildren(
    el("h2", { id: "h-graph" }, data.mode === "diff" ? "Graph in both plans" : "Graph before and after"),
    el("div", { class: "bar-line" }, el("label", {}, "Block ", choose), el("label", {}, whole, " every call"), zoomButtons(), el("span", { class: "muted", id: "block-note" })),
    el("p", { id: "picked", "aria-live": "polite" }),
    ...(host.hasAttribute("data-by-hand") ? [el("p", { class: "note" }, "Decisions were changed by hand since this graph was drawn: it shows what was solved.")] : []),
    el("p", { class: "legend" }, ...signs),
    el("div", { class: "panels" }, ...["before", "after"].map((side, index) => el("div", { class: "panel" }, el("h4", {}, SIDES[index]), canvasOf(side, SIDES[index])))));
  const changed = blocks.findIndex((block) => block.lines.some((line) => text(line)[0] !== " "));
  drawBlock(Math.max(changed, 0), null);
}

function blockName(block) {
  if (block.modules.length === 1) return block.modules[0] || "outside the layers";
  const numbers = block.modules.map((module) => module.match(/(\d+)$/)?.[1]);
  const stem = block.modules[0].replace(/\d+$/, "");
  const node = { name: "#", numbers: new Set(numbers.map(Number)) };
  return block.modules.every((module) => module.replace(/\d+$/, "") === stem) ? `${stem}${labelOf(node)}` : `${block.modules[0]} and ${block.modules.length - 1} more`;
}

function drawBlock(index, module, again = false) {
  const block = blocks[index];
  const partial = picture.layout?.total > LARGEST;
  const fresh = again || index !== picture.index || partial;
  picture.index = index;
  picture.module = module ?? block.modules[0];
  find("#block").value = String(index);
  const selected = entries[state.selected];
  const place = selected ? placeOf(opOf(selected.key)) : null;
  const equal = block.modules.length > 1 ? `${block.modules.length} equal layers; shown: ${picture.module}` : "";
  if (fresh) {
    picture.layout = layoutBlock(block, picture.whole, place?.index === index ? place.within : null);
    for (const side of ["before", "after"]) find(`#${side}`).replaceChildren(panel(picture.layout, side));
    zoomTo(Math.min(1, Math.max(fitting(), ZOOM.readable)));
  }
  const { total } = picture.layout;
  find("#block-note").textContent = total > LARGEST ? `${LARGEST} of ${total} boxes, around the selected site` : equal;
  markSelected();
}

// The two sides are scrolled and enlarged as one.
function canvasOf(side, name) {
  const canvas = el("div", { id: side, class: "canvas", tabindex: 0, role: "group", "aria-label": `Graph ${name}: + and - enlarge, 0 fits, arrows move` });
  const other = () => find(side === "before" ? "#after" : "#before");
  canvas.addEventListener("scroll", () => { other().scrollLeft = canvas.scrollLeft; other().scrollTop = canvas.scrollTop; });
  canvas.addEventListener("keydown", (event) => {
    const zoom = { "+": picture.zoom * ZOOM.step, "=": picture.zoom * ZOOM.step, "-": picture.zoom / ZOOM.step, 0: fitting() }[event.key];
    if (zoom === undefined || event.ctrlKey || event.metaKey) return;
    zoomTo(zoom);
    event.preventDefault();
  });
  canvas.addEventListener("pointerdown", (event) => drag(canvas, event));
  return canvas;
}

function drag(canvas, start) {
  if (start.button !== 0 || start.pointerType === "touch" || start.target.closest("[data-site]")) return;
  const [left, top] = [canvas.scrollLeft, canvas.scrollTop];
  const follow = (event) => { canvas.scrollLeft = left - event.clientX + start.clientX; canvas.scrollTop = top - event.clientY + start.clientY; };
  const stop = () => { removeEventListener("pointermove", follow); removeEventListener("pointerup", stop); };
  addEventListener("pointermove", follow);
  addEventListener("pointerup", stop);
}

function zoomButtons() {
  const button = (name, label, to) => el("button", { type: "button", "aria-label": label, title: label, onclick: () => zoomTo(to()) }, name);
  return el("span", { class: "zoom", role: "group", "aria-label": "Size" },
    button("−", "smaller", () => picture.zoom / ZOOM.step), el("output", { id: "zoom" }),
    button("+", "larger", () => picture.zoom * ZOOM.step), button("fit", "fit the width", fitting));
}

const fitting = () => find("#before").clientWidth / picture.layout.width;

function zoomTo(zoom) {
  const before = picture.zoom;
  picture.zoom = Math.min(ZOOM.most, Math.max(ZOOM.least, zoom));
  find("#zoom").textContent = `${Math.round(picture.zoom * 100)}%`;
  for (const canvas of document.querySelectorAll(".canvas")) {
    const root = canvas.querySelector("svg");
    root.setAttribute("width", picture.layout.width * picture.zoom);
    root.setAttribute("height", picture.layout.height * picture.zoom);
    canvas.scrollLeft *= picture.zoom / before;
    canvas.scrollTop *= picture.zoom / before;
  }
}

function panel({ boxes, edges, left, top, width, height }, side) {
  const root = draw("svg", { viewBox: `${left} ${top} ${width} ${height}`, role: "group", "aria-label": `Graph ${SIDES[side === "before" ? 0 : 1]}` });
  for (const edge of edges) if (edge.sides.has(side)) root.append(draw("path", { class: "edge", d: curve(edge.points) }), draw("path", { class: "arrow", d: arrow(edge.points) }));
  for (const box of boxes) if (box.sub[side] !== undefined) root.append(boxNode(box, side));
  return root;
}

function curve(points) {
  let path = `M${points[0].x},${points[0].y}`;
  for (let at = 1; at < points.length - 1; at++) {
    const [here, next] = [points[at], points[at + 1]];
    const end = at === points.length - 2 ? next : { x: (here.x + next.x) / 2, y: (here.y + next.y) / 2 };
    path += `Q${here.x},${here.y} ${end.x},${end.y}`;
  }
  return points.length === 2 ? `${path}L${points[1].x},${points[1].y}` : path;
}

// The head of an edge, along its last stretch.
function arrow(points) {
  const [from, tip] = points.slice(-2);
  const length = Math.hypot(tip.x - from.x, tip.y - from.y) || 1;
  const [dx, dy] = [(tip.x - from.x) / length, (tip.y - from.y) / length];
  const [x, y] = [tip.x - 7 * dx, tip.y - 7 * dy];
  return `M${tip.x},${tip.y}L${x - 3.2 * dy},${y + 3.2 * dx}L${x + 3.2 * dy},${y - 3.2 * dx}Z`;
}

function boxNode(box, side) {
  const site = box.members.length === 1 && box.members[0].site ? box.members[0].module : null;
  const sign = SIGNS[box.status];
  const name = `${box.title}, ${box.told ?? box.sub[side]}, ${box.status === "kept" ? "unchanged" : box.status}`;
  const room = box.width - 2 * NODE.side;
  const node = draw("g", {
    class: `node ${box.status}${box.port ? " port" : ""}${box.group ? " group" : ""}${site === null ? " plain" : ""}`,
    transform: `translate(${box.x - box.width / 2},${box.y - box.height / 2})`,
    "data-site": site, tabindex: site === null ? null : 0, role: site === null ? "img" : "button", "aria-label": name,
  }, draw("title", {}, name), draw("rect", { width: box.width, height: box.height, rx: box.port ? 13 : 7 }),
  draw("text", { x: NODE.side + (sign ? NODE.sign : 0), y: box.port ? 17 : 16 }, clipped(box.title, room - (sign ? NODE.sign : 0), FONTS.title)));
  if (sign) node.append(draw("text", { class: "sign", x: NODE.side - 1, y: 16 }, sign));
  if (!box.port) node.append(draw("text", { class: "sub", x: NODE.side, y: 31 }, clipped(box.sub[side], room, FONTS.sub)));
  if (site !== null) {
    const pick = () => { const entry = entryAt(site); if (entry) select(entry.index); };
    node.addEventListener("click", pick);
    node.addEventListener("keydown", (event) => {
      if (event.key !== "Enter" && event.key !== " ") return;
      event.preventDefault();
      event.stopPropagation();
      pick();
    });
  }
  return node;
}

// The site of a node in the module shown: of several heads and families, a rewritten one first.
function entryAt(within) {
  const found = byOp.get([picture.module, within].filter(Boolean).join(".")) ?? [];
  return found.find((entry) => entry.index === state.selected) ?? found.find((entry) => entry.mark === "~" || entry.mark === "!") ?? found[0];
}

function markSelected() {
  const entry = entries[state.selected];
  const places = entry ? opsOf(entry.key).map(placeOf) : [];
  for (const node of document.querySelectorAll("#graph .node")) {
    const mine = places.some((place) => place !== null && place.module === picture.module && node.dataset.site === place.within);
    node.classList.toggle("selected", mine);
  }
  find("#picked").replaceChildren(...(entry ? [el("a", { href: "#details" }, entry.key), ` ${entry.mark} ${nameIn(entry)}: ${entry.reasons[0] ?? ""}`] : []));
  const canvas = find("#after");
  const node = canvas.querySelector(".node.selected") ?? canvas.querySelector(".node.rewritten");
  if (node) bringInto(canvas, node);
}

function bringInto(canvas, node) {
  const [frame, box] = [canvas.getBoundingClientRect(), node.getBoundingClientRect()];
  if (box.left < frame.left || box.right > frame.right) canvas.scrollLeft += box.left + box.width / 2 - frame.left - frame.width / 2;
  if (box.top < frame.top || box.bottom > frame.bottom) canvas.scrollTop += box.top + box.height / 2 - frame.top - frame.height / 2;
}

function showInGraph(entry) {
  if (!find("#graph") || !blocks.length) return;
  const place = placeOf(opOf(entry.key));
  if (place !== null) drawBlock(place.index, place.module);
  else markSelected();
}
