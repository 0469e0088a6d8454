"use strict";
// The page without this script is whole; it adds the choice of light or dark, sorting, and names for keyboard users.
const root = document.documentElement;
const stored = { get: () => { try { return localStorage.getItem("fedsim-theme"); } catch { return null; } },
                 set: (value) => { try { localStorage.setItem("fedsim-theme", value); } catch { /* private window */ } } };
if (stored.get()) root.dataset.theme = stored.get();

function dark() {
  return root.dataset.theme ? root.dataset.theme === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
}

function toggle() {
  const button = document.createElement("button");
  const name = () => { button.textContent = dark() ? "Light" : "Dark"; button.title = `Switch to ${dark() ? "light" : "dark"} colours`; };
  button.type = "button";
  button.id = "theme";
  button.addEventListener("click", () => { root.dataset.theme = dark() ? "light" : "dark"; stored.set(root.dataset.theme); name(); });
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", name);
  name();
  document.querySelector("nav").append(button);
}

function number(text) {
  const found = text.replace(/,/g, "").match(/-?\d+(\.\d+)?(e[-+]?\d+)?/i);
  return found ? Number(found[0]) : NaN;
}

function sort(table, column, order) {
  const body = table.tBodies[0], text = (row) => row.cells[column].textContent.trim();
  const numeric = table.tHead.rows[0].cells[column].classList.contains("number");
  const compare = numeric
    ? (a, b) => { const [x, y] = [number(text(a)), number(text(b))];  // what is no number comes last, either way
                  return isNaN(x) || isNaN(y) ? isNaN(x) - isNaN(y) : order * (x - y); }
    : (a, b) => order * text(a).localeCompare(text(b), undefined, { numeric: true });
  body.append(...[...body.rows].sort(compare));
  [...table.tHead.rows[0].cells].forEach((cell, at) =>
    at === column ? cell.setAttribute("aria-sort", order > 0 ? "ascending" : "descending") : cell.removeAttribute("aria-sort"));
}

function enhance(place) {
  for (const region of place.querySelectorAll(".scroll[tabindex]")) {
    const heading = region.closest("section")?.querySelector("h2")?.textContent ?? "Table";
    region.setAttribute("role", "region");
    region.setAttribute("aria-label", `${heading}, table`);
    const table = region.querySelector("table");
    if (!table?.tHead || region.classList.contains("keys") || table.tBodies[0].rows.length < 2) continue;
    [...table.tHead.rows[0].cells].forEach((cell, column) => {
      const button = document.createElement("button");
      button.type = "button";
      button.className = "sort";
      button.append(...cell.childNodes);
      button.addEventListener("click", () => sort(table, column, cell.getAttribute("aria-sort") === "ascending" ? -1 : 1));
      cell.append(button);
    });
  }
}

addEventListener("DOMContentLoaded", () => { toggle(); enhance(document); });
