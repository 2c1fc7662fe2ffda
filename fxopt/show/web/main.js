// Puts the page together: theme, keys, links to a site (#family:key).
function buildTheme() {
  const button = find("#theme");
  const system = matchMedia("(prefers-color-scheme: dark)");
  const isDark = () => (document.documentElement.dataset.theme ?? (system.matches ? "dark" : "light")) === "dark";
  const label = () => { button.querySelector("span").textContent = isDark() ? "light" : "dark"; };
  button.addEventListener("click", () => { document.documentElement.dataset.theme = isDark() ? "light" : "dark"; label(); });
  system.addEventListener("change", label);
  label();
}

const STEPS = { ArrowDown: 1, j: 1, ArrowUp: -1, k: -1, PageDown: 12, PageUp: -12, Home: -Infinity, End: Infinity };

function onKey(event) {
  if (event.ctrlKey || event.metaKey || event.altKey) return;
  const typing = event.target.matches("input, select, textarea");
  const filter = find("#filter");
  if (event.key === "Escape") {
    if (event.target === filter && filter.value) { filter.value = ""; state.words = ""; refresh(); } else scroller.focus();
  } else if (typing) {
    if (event.target !== filter || event.key !== "Enter") return;
    scroller.focus();
    if (!shown.some((entry) => entry.index === state.selected)) move(1);
  } else if (event.key === "/") {
    filter.focus();
    filter.select();
  } else if (event.key in STEPS && (event.target === scroller || "jk".includes(event.key) || event.target === document.body && event.key.startsWith("Arrow"))) {
    if (event.target !== scroller) scroller.focus({ preventScroll: false });
    move(STEPS[event.key]);
  } else if (event.key === "Enter" && event.target === scroller) {
    if (state.selected < 0) move(1);
    find("#details").focus();
  } else return;
  event.preventDefault();
}

function fromAddress() {
  let wanted = "";
  try { wanted = decodeURIComponent(location.hash.slice(1)); } catch { return undefined; }
  // what is decided together is found by either family
  return entries.find((entry) => [entry.family, ...entry.family.split(" + ")].some((family) => `${family}:${entry.key}` === wanted));
}

// The first site is shown without being put into the address.
function openAt(entry) {
  const address = location.href.split("#")[0];
  select(entry.index);
  history.replaceState(null, "", address);
}

listeners.select.push(showDetails, showInGraph, (entry) => {
  history.replaceState(null, "", `#${encodeURIComponent(`${entry.family}:${entry.key}`)}`);
});
buildTheme();
buildTable();
buildTree();
if (data.mode === "plan") buildScatter();
buildGraph();
for (const wide of document.querySelectorAll(".wide.hinted")) {
  const hint = () => wide.classList.toggle("scrolls", wide.scrollWidth > wide.clientWidth + 1);
  addEventListener("resize", hint);
  hint();
}
const linked = fromAddress();
const opening = linked ?? shown[0];
if (opening) {
  if (linked) select(opening.index);
  else openAt(opening);
} else find("#details").replaceChildren(el("p", { class: "muted" }, "No site is decided here."));
document.addEventListener("keydown", onKey);
addEventListener("hashchange", () => { const entry = fromAddress(); if (entry) select(entry.index); });
document.documentElement.dataset.ready = "";
