// What is on paper alone: every alternative of the sites that changed.
const PRINTED = 400;

function buildAppendix() {
  const host = find("#appendix");
  if (!host || host.childElementCount) return;
  const changed = entries.filter((entry) => entry.mark !== "=" && entry.mark !== "x");
  const rest = changed.length > PRINTED ? [el("p", {}, `and ${changed.length - PRINTED} more sites; the page has them all.`)] : [];
  host.replaceChildren(el("h2", {}, "Appendix: what else was possible at each site that changed"),
    ...changed.slice(0, PRINTED).map((entry) => el("section", {}, el("h3", {}, markOf(entry.mark), ` ${entry.key} `, el("span", { class: "muted" }, `${entry.family}, ${entry.what}`)),
      ...reasonsOf(entry), ...alternativesTable(entry).slice(1))), ...rest);
}

matchMedia("print").addEventListener("change", (event) => { if (event.matches) buildAppendix(); });
addEventListener("beforeprint", () => {
  buildAppendix();
  for (const part of document.querySelectorAll("details.lines")) part.open = true;
});
