"use strict";
const value = (row, column) => {
  const cell = row.cells[column];
  if (cell.dataset.order === undefined) return cell.textContent;
  return cell.dataset.order === "" ? null : Number(cell.dataset.order);
};
const order = (x, y) => (typeof x === "number" ? x - y : x.localeCompare(y, "en", { numeric: true }));
for (const head of document.querySelectorAll("th")) {
  head.addEventListener("click", () => {
    const sign = head.ariaSort === "ascending" ? -1 : 1;
    for (const other of head.parentNode.cells) other.removeAttribute("aria-sort");
    head.setAttribute("aria-sort", sign > 0 ? "ascending" : "descending");
    const body = head.closest("table").tBodies[0];
    const rows = [...body.rows].sort((a, b) => {
      const [x, y] = [a, b].map((row) => value(row, head.cellIndex));
      return x === null || y === null ? (x === null) - (y === null) : sign * order(x, y);
    });
    body.append(...rows);
  });
}
for (const button of document.querySelectorAll("button.series")) {
  button.addEventListener("click", () => {
    const hide = button.getAttribute("aria-pressed") === "true";
    button.setAttribute("aria-pressed", String(!hide));
    const parts = `figure [id*="-series${button.dataset.series}-"]`;
    for (const part of button.closest("section").querySelectorAll(parts)) part.style.display = hide ? "none" : "";
  });
}
for (const tab of document.querySelectorAll("button.tab")) {
  tab.addEventListener("click", () => {
    const section = tab.closest("section");
    for (const other of section.querySelectorAll("button.tab")) other.setAttribute("aria-pressed", String(other === tab));
    for (const panel of section.querySelectorAll(".panel")) panel.hidden = panel.id !== tab.dataset.tab;
  });
}
