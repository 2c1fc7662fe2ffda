// Blocks as graphs: lines of calls parsed, plain calls of a module folded, both sides laid out as one.
const LINE = /^(.)%(\w+) = ([\w.]+)\((.*)\) -> (.*) (at|in)(?: (.*))?$/s;
const LARGEST = 300; // boxes that are drawn at once; of larger blocks those around the selected site
const NODE = { least: 72, most: 200, height: 38, port: 26, side: 9, sign: 15 };
const FONTS = (() => {
  const family = getComputedStyle(document.body).fontFamily;
  return { title: `12px ${family}`, sub: `11px ${family}` };
})();

function parseBlock(block) {
  const nodes = new Map();
  for (const index of block.lines) {
    const line = text(index);
    const match = LINE.exec(line);
    if (!match) continue;
    const [, mark, name, op, args, kind, word, module = ""] = match;
    const node = nodes.get(name) ?? { name, sides: {}, inputs: new Set(), module, site: false };
    if (word === "at") node.site = true;
    if (word === "at") node.module = module;
    for (const side of mark === " " ? ["before", "after"] : mark === "-" ? ["before"] : ["after"]) {
      node.sides[side] = { op: op.replace(/^aten\.|^fxopt\./, ""), args, kind, inputs: [...args.matchAll(/%(\w+)/g)].map((found) => found[1]) };
      for (const input of node.sides[side].inputs) node.inputs.add(input);
    }
    node.status = mark === " " ? "kept" : node.sides.before && node.sides.after ? "rewritten" : mark === "-" ? "removed" : "added";
    nodes.set(name, node);
  }
  return nodes;
}

// Plain calls of one module between the same sites become one node. `depth` keeps it free of cycles.
function foldBlock(nodes, whole) {
  const important = [...nodes.values()].filter((node) => node.site || node.status !== "kept");
  const bit = new Map(important.map((node, index) => [node.name, 1n << BigInt(index)]));
  const above = new Map();
  const depth = new Map();
  const groups = new Map();
  const home = new Map();
  for (const node of nodes.values()) {
    let reached = 0n;
    for (const input of node.inputs) reached |= (above.get(input) ?? 0n) | (bit.get(input) ?? 0n);
    above.set(node.name, reached);
    let level = 0;
    for (const input of node.inputs) {
      const other = nodes.get(input);
      if (!other || bit.has(input) || above.get(input) !== reached) continue;
      level = Math.max(level, depth.get(input) + (other.module === node.module ? 0 : 1));
    }
    depth.set(node.name, level);
    const key = whole || bit.has(node.name) ? `=${node.name}` : `${level} ${reached} ${node.module}`;
    if (!groups.has(key)) groups.set(key, []);
    groups.get(key).push(node);
    home.set(node.name, key);
  }
  return { groups, home };
}

function layoutBlock(block, whole, focus) {
  const nodes = parseBlock(block);
  const { groups, home } = foldBlock(nodes, whole);
  const total = groups.size;
  if (total > LARGEST) {
    const order = [...groups];
    const at = order.findIndex(([, members]) => members.some((node) => (focus === null ? node.status !== "kept" : node.site && node.module === focus)));
    const first = Math.min(Math.max(0, at - LARGEST / 2), total - LARGEST);
    for (const [key] of [...order.slice(0, first), ...order.slice(first + LARGEST)]) groups.delete(key);
  }
  const boxes = new Map();
  for (const [key, members] of groups) boxes.set(key, { key, members, status: members[0].status, ...labels(members, whole) });
  const ports = streamsOf(nodes);
  for (const name of ports) boxes.set(`>${name}`, { key: `>${name}`, members: [], status: "kept", port: name, title: name, sub: { before: "from outside", after: "from outside" }, told: "from outside" });
  const edges = new Map();
  for (const node of nodes.values()) {
    for (const side of ["before", "after"]) {
      for (const input of node.sides[side]?.inputs ?? []) {
        const from = home.get(input) ?? (ports.has(input) ? `>${input}` : null);
        const to = home.get(node.name);
        if (from === null || from === to || !boxes.has(from) || !boxes.has(to)) continue;
        const edge = edges.get(`${from} ${to}`) ?? { from, to, sides: new Set() };
        edge.sides.add(side);
        edges.set(`${from} ${to}`, edge);
      }
    }
  }
  const graph = new dagre.graphlib.Graph().setGraph({ rankdir: "TB", nodesep: 10, ranksep: 19, marginx: 6, marginy: 6 }).setDefaultEdgeLabel(() => ({}));
  for (const box of boxes.values()) graph.setNode(box.key, { width: widthFor(box), height: box.port ? NODE.port : NODE.height });
  for (const edge of edges.values()) graph.setEdge(edge.from, edge.to);
  dagre.layout(graph);
  for (const box of boxes.values()) Object.assign(box, graph.node(box.key));
  for (const edge of edges.values()) edge.points = graph.edge(edge.from, edge.to).points;
  return { boxes: [...boxes.values()], edges: [...edges.values()], total, ...boundsOf([...boxes.values()], [...edges.values()]) };
}

// A box as wide as what is written in it on either side, within bounds.
function widthFor(box) {
  const title = widthOf(box.title, FONTS.title) + (box.status === "kept" ? 0 : NODE.sign);
  const subs = box.port ? [] : Object.values(box.sub).map((sub) => widthOf(sub, FONTS.sub));
  return Math.min(NODE.most, Math.max(NODE.least, Math.ceil(Math.max(title, ...subs)) + 2 * NODE.side + 1));
}

// Long edges go round the boxes, and further than dagre counts.
function boundsOf(boxes, edges) {
  const corners = boxes.flatMap((box) => [{ x: box.x - box.width / 2, y: box.y - box.height / 2 }, { x: box.x + box.width / 2, y: box.y + box.height / 2 }]);
  const points = [...corners, ...edges.flatMap((edge) => edge.points)];
  const [xs, ys] = [points.map((point) => point.x), points.map((point) => point.y)];
  const [left, top] = [Math.min(...xs) - 4, Math.min(...ys) - 4];
  return { left, top, width: Math.max(...xs) + 4 - left, height: Math.max(...ys) + 4 - top };
}

// What enters from outside and is worked on: not masks, tables and positions.
function streamsOf(nodes) {
  const found = new Set();
  for (const node of nodes.values()) {
    const first = Object.values(node.sides)[0].inputs[0];
    if (first !== undefined && !nodes.has(first) && (first.startsWith("input") || node.site)) found.add(first);
  }
  return found;
}

function labels(members, whole) {
  const [first] = members;
  if (members.length > 1) {
    const ops = [...new Set(members.map((node) => node.sides.after.op))].join(" ");
    const count = `${members.length} calls`;
    return { title: leaf(first.module) || "between", sub: { before: count, after: count }, told: `${count}: ${ops}`, group: true };
  }
  const linear = first.site && Object.values(first.sides).some(({ op }) => op.endsWith("linear"));
  const sub = {};
  for (const [side, call] of Object.entries(first.sides)) sub[side] = linear ? sized(call) : said(call, first);
  // where every call is drawn, its op says more than its number
  const plain = !first.site && whole ? Object.values(first.sides)[0].op : first.name;
  return { title: linear ? leaf(first.module) || first.name : plain, sub, group: false };
}

// A layer with the shapes of its parameters: low_rank 64×256 256×64.
function sized({ op, args }) {
  const shapes = [...args.matchAll(/[a-z]+\d*\[([\d, ]+)\]/g)].map((found) => found[1].replaceAll(", ", "×"));
  return [op.replace(/_linear$/, ""), ...shapes].join(" ");
}

// Another call: what a rewrite asked of it, or its op, and the module that it lies in.
function said({ op, args }, node) {
  const asked = [...args.matchAll(/\b(layout|window)=('[^']*'|\([^)]*\))/g)].map((found) => `${found[1]} ${found[2].replaceAll("'", "")}`);
  if (asked.length) return asked.join(" ");
  return [op === node.name ? "" : op, leaf(node.module) && `in ${leaf(node.module)}`].filter(Boolean).join(" ");
}

const leaf = (module) => module.split(".").pop();
