// The selected block before and after, side by side on one layout, so that equal calls stay in place.
const blocks = data.blocks;
const blockOf = new Map(blocks.flatMap((block, index) => block.modules.map((module) => [module, index])));
const picture = { index: -1, module: "", whole: false, byBox: new Map() };
const SIGNS = { rewritten: "~", added: "+", removed: "−", kept: "" };

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

function buildGraph() {
  const host = find("#graph");
  if (!host) return;
  if (!blocks.length) {
    host.replaceChildren(el("p", { class: "muted" }, "This plan holds no graph."));
    return;
  }
  const choose = el("select", { id: "block", onchange: (event) => drawBlock(Number(event.target.value), null) },
    ...blocks.map((block, index) => el("option", { value: index }, blockName(block))));
  const whole = el("input", { type: "checkbox", id: "whole", onchange: (event) => { picture.whole = event.target.checked; drawBlock(picture.index, picture.module, true); } });
  const signs = ["kept", "rewritten", "added", "removed"].map((name) => el("span", {}, el("i", { class: `i-${name}`, "aria-hidden": "true" }, SIGNS[name]), name === "kept" ? "unchanged" : name));
  host.replaceChildren(
    el("h3", { id: "h-graph" }, "Graph before and after"),
    el("div", { class: "bar-line" }, el("label", {}, "Block ", choose), el("label", {}, whole, " every call"), el("span", { class: "muted", id: "block-note" })),
    ...(host.hasAttribute("data-by-hand") ? [el("p", { class: "note" }, "Decisions were changed by hand since this graph was drawn: it shows what was solved.")] : []),
    el("p", { class: "legend" }, ...signs),
    el("div", { class: "panels" }, ...["before", "after"].map((side) => el("div", { class: "panel" }, el("h4", {}, side), el("div", { id: side })))));
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
  }
  const { total } = picture.layout;
  find("#block-note").textContent = total > LARGEST ? `${LARGEST} of ${total} boxes, around the selected site` : equal;
  markSelected();
}

function panel({ boxes, edges, left, top, width, height }, side) {
  const root = draw("svg", { viewBox: `${left} ${top} ${width} ${height}`, role: "group", "aria-label": `Graph ${side}` });
  root.style.maxWidth = `${width}px`;
  for (const edge of edges) if (edge.sides.has(side)) root.append(draw("path", { class: "edge", d: curve(edge.points) }));
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

function boxNode(box, side) {
  const site = box.members.length === 1 && box.members[0].site ? box.members[0].module : null;
  const sign = SIGNS[box.status];
  const clip = (value, size) => (value.length > size ? `${value.slice(0, size - 1)}…` : value);
  const name = `${box.title}, ${box.sub[side]}, ${box.status === "kept" ? "unchanged" : box.status}`;
  const node = draw("g", {
    class: `node ${box.status}${box.port ? " port" : ""}${box.group ? " group" : ""}${site === null ? " plain" : ""}`,
    transform: `translate(${box.x - box.width / 2},${box.y - box.height / 2})`,
    "data-site": site, tabindex: site === null ? null : 0, role: site === null ? "img" : "button", "aria-label": name,
  }, draw("title", {}, name), draw("rect", { width: box.width, height: box.height, rx: box.port ? 14 : 7 }),
  draw("text", { x: sign ? 24 : 11, y: box.port ? 18 : 17 }, clip(box.title, sign ? 17 : 19)));
  if (sign) node.append(draw("text", { class: "sign", x: 9, y: 17 }, sign));
  if (!box.port) node.append(draw("text", { class: "sub", x: 11, y: 32 }, clip(box.sub[side], 21)));
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
}

function showInGraph(entry) {
  if (!find("#graph") || !blocks.length) return;
  const place = placeOf(opOf(entry.key));
  if (place !== null) drawBlock(place.index, place.module);
}
