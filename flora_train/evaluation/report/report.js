// Search, sort and hints of wide tables. Without it the page shows the same figures, in the order of the run.
const number = text => {
  const digits = text.replace(/[\u2212]/g, "-").replace(/,(?=\d{3})/g, "").match(/[-+]?\d+(\.\d+)?/);
  return digits ? Number(digits[0]) : NaN;
};

for (const table of document.querySelectorAll("table")) {
  if (table.tBodies.length !== 1 || table.tBodies[0].rows.length < 3 || !table.tHead) continue;
  const body = table.tBodies[0], headings = [...table.tHead.rows].at(-1).cells;
  [...headings].forEach((heading, column) => {
    if (!heading.textContent.trim() || heading.querySelector(".spoken")) return;
    const button = document.createElement("button");
    button.append(...heading.childNodes);
    heading.append(button);
    button.addEventListener("click", () => {
      const up = heading.getAttribute("aria-sort") !== "ascending";
      for (const other of headings) other.removeAttribute("aria-sort");
      heading.setAttribute("aria-sort", up ? "ascending" : "descending");
      const key = row => (row.cells[column].querySelector(".value") ?? row.cells[column]).textContent.trim();
      const order = (a, b) => {
        const [x, y] = [number(key(a)), number(key(b))];
        if (column === 0 || (isNaN(x) && isNaN(y))) return key(a).localeCompare(key(b), undefined, { numeric: true });
        return isNaN(x) ? 1 : isNaN(y) ? -1 : x - y;
      };
      body.append(...[...body.rows].sort((a, b) => (up ? 1 : -1) * order(a, b)));
    });
  });
}

// A hint in the caption of each table that is wider than its place, also after a fold opens or the window changes.
const widths = new ResizeObserver(changes => {
  for (const { target } of changes) target.classList.toggle("more", target.scrollWidth > target.clientWidth + 1);
});
for (const scroll of document.querySelectorAll(".scroll")) widths.observe(scroll);

const find = document.getElementById("find");
if (find) {
  const parts = [];
  for (const table of document.querySelectorAll("table:not([data-whole])")) {
    const grouped = table.tBodies.length > 1;
    for (const part of grouped ? table.tBodies : table.tBodies[0]?.rows ?? []) {
      const name = part.querySelector("th");
      if (name) parts.push([part, name.textContent.toLowerCase()]);
    }
  }
  for (const figure of document.querySelectorAll(".panels > figure")) {
    parts.push([figure, figure.querySelector("figcaption").textContent.toLowerCase()]);
  }
  const input = find.querySelector("input"), status = find.querySelector("output");
  const search = () => {
    const words = input.value.toLowerCase().split(/\s+/).filter(Boolean);
    const shown = new Set();
    for (const [part, name] of parts) {
      part.hidden = !words.every(word => name.includes(word));
      if (!part.hidden) shown.add(name);
    }
    if (words.length) for (const fold of document.querySelectorAll("details.fold")) fold.open = true;
    status.textContent = words.length ? (shown.size ? "" : "no matches") : "";
  };
  input.addEventListener("input", search);
  find.hidden = false;
}
