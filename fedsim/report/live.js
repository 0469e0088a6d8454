"use strict";
// Asks the server every two seconds; sections that changed are replaced, all else (scrolling, focus, sorting) stays.
addEventListener("DOMContentLoaded", () => {
  let version = Number(document.getElementById("progress").dataset.version);
  const said = document.getElementById("live");
  const decoded = (image) => image.decode().catch(() => null);  // or the page would jump while pictures load
  const kept = (place) => [...place.querySelectorAll("details")].map((one) => one.open);

  function replace(old, fresh) {
    const open = kept(old), sideways = [...old.querySelectorAll(".scroll")].map((one) => one.scrollLeft);
    const reachable = "a, button, summary, [tabindex]", focused = [...old.querySelectorAll(reachable)].indexOf(document.activeElement);
    const sorted = [...old.querySelectorAll("table")].map((table) => {
      const at = [...table.tHead.rows[0].cells].findIndex((cell) => cell.hasAttribute("aria-sort"));
      return at < 0 ? null : [at, table.tHead.rows[0].cells[at].getAttribute("aria-sort") === "ascending" ? 1 : -1];
    });
    enhance(fresh);
    old.replaceChildren(...fresh.childNodes);
    old.querySelectorAll("details").forEach((one, at) => { one.open = open[at] ?? false; });
    old.querySelectorAll("table").forEach((table, at) => {
      if (sorted[at] && sorted[at][0] < table.tHead.rows[0].cells.length) sort(table, ...sorted[at]);
    });
    old.querySelectorAll(".scroll").forEach((one, at) => { one.scrollLeft = sideways[at] ?? 0; });
    if (focused >= 0) old.querySelectorAll(reachable)[focused]?.focus({ preventScroll: true });
  }

  let texts = new Map();
  async function load() {
    const answer = await fetch("/", { cache: "no-store" });
    if (!answer.ok) throw new Error(answer.statusText);
    const fresh = new DOMParser().parseFromString(await answer.text(), "text/html");
    await Promise.all([...fresh.images].map(decoded));
    const [x, y] = [scrollX, scrollY];
    for (const part of fresh.querySelectorAll("main > section, header > h1, header > p, header > dl")) {
      const key = part.id || `${part.tagName}`, text = part.innerHTML;
      const old = part.id ? document.getElementById(part.id) : document.querySelector(`header > ${part.tagName}`);
      if (old && part.id !== "progress" && texts.get(key) !== text) replace(old, part);
      texts.set(key, text);
    }
    document.title = fresh.title;
    scrollTo({ left: x, top: y, behavior: "instant" });
  }

  async function poll() {
    try {
      const state = await (await fetch("/state", { cache: "no-store" })).json();
      const progress = document.getElementById("runs");
      if (progress.dataset.text !== state.progress) {
        progress.innerHTML = state.progress;
        progress.dataset.text = state.progress;
      }
      if (state.version !== version) { await load(); version = state.version; }
      said.textContent = state.remark;
    } catch {
      said.textContent = "The server does not answer; this is how things stood when it last did.";
    }
    setTimeout(poll, document.hidden ? 10000 : 2000);
  }
  poll();
});
