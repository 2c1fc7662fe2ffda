// Modules with repeated layers folded: numbers of equal places become one range.
function buildTree() {
  const root = { name: "", children: new Map(), numbers: new Set(), entries: [] };
  for (const entry of entries) {
    let node = root;
    node.entries.push(entry);
    for (const part of entry.key.replace(/\/kv=\d+$/, "").split(".")) {
      const name = /^\d+$/.test(part) ? "#" : part;
      if (!node.children.has(name)) node.children.set(name, { name, children: new Map(), numbers: new Set(), entries: [] });
      node = node.children.get(name);
      if (name === "#") node.numbers.add(Number(part));
      node.entries.push(entry);
    }
  }
  const all = treeButton({ ...root, name: "all modules", children: new Map() }, null);
  find("#tree").replaceChildren(el("ul", {}, el("li", {}, all), ...[...root.children.values()].map((child) => treeItem(child, 0))));
  all.setAttribute("aria-current", "true");
}

function treeItem(node, depth) {
  let name = labelOf(node);
  while (node.children.size === 1) {
    const [child] = node.children.values();
    if (child.entries.length !== node.entries.length) break;
    node = child;
    name += `.${labelOf(node)}`;
  }
  const below = el("ul", { hidden: depth > 2 });
  below.append(...[...node.children.values()].map((child) => treeItem(child, depth + 1)));
  const button = treeButton({ ...node, name }, below);
  return el("li", {}, button, ...(node.children.size ? [below] : []));
}

function labelOf(node) {
  if (node.name !== "#") return node.name;
  const numbers = [...node.numbers].sort((a, b) => a - b);
  const runs = [];
  for (const number of numbers) {
    if (runs.length && number === runs.at(-1)[1] + 1) runs.at(-1)[1] = number;
    else runs.push([number, number]);
  }
  const ranges = runs.map(([first, last]) => (first === last ? `${first}` : `${first}..${last}`));
  return numbers.length === 1 ? ranges[0] : `{${ranges.join(",")}}`;
}

function treeButton(node, below) {
  const marks = new Map();
  for (const entry of node.entries) marks.set(entry.mark, (marks.get(entry.mark) ?? 0) + 1);
  const tally = [...marks].map(([mark, count]) => `${mark}${count}`).join(" ");
  const folds = node.children.size > 0;
  const button = el("button", { type: "button", "aria-expanded": folds ? String(!below.hidden) : null, title: `show these ${node.entries.length} sites` },
    el("span", { class: "twist", "aria-hidden": "true" }, folds ? (below.hidden ? "▸" : "▾") : ""),
    el("span", { class: "name" }, node.name), el("span", { class: "tally" }, tally));
  const toggle = (open) => {
    if (!folds) return;
    below.hidden = !open;
    button.setAttribute("aria-expanded", String(open));
    button.firstChild.textContent = open ? "▾" : "▸";
  };
  button.addEventListener("click", () => {
    const mine = button.getAttribute("aria-current") === "true";
    if (mine) toggle(below?.hidden);
    for (const other of document.querySelectorAll("#tree [aria-current]")) other.removeAttribute("aria-current");
    button.setAttribute("aria-current", "true");
    if (!mine) toggle(true);
    state.prefix = node.entries.length === entries.length ? null : new Set(node.entries.map((entry) => entry.index));
    refresh();
  });
  button.addEventListener("keydown", (event) => {
    if (event.key === "ArrowRight") toggle(true);
    else if (event.key === "ArrowLeft") toggle(false);
    else if (event.key === "ArrowDown" || event.key === "ArrowUp") {
      const buttons = [...document.querySelectorAll("#tree button")].filter((one) => one.offsetParent !== null);
      buttons[buttons.indexOf(button) + (event.key === "ArrowDown" ? 1 : -1)]?.focus();
    } else return;
    event.preventDefault();
    event.stopPropagation();
  });
  return button;
}
