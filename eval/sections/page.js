"use strict";
// Everything can be read without this file: it adds the light/dark button, filters, enlarged pictures and, for paper,
// opened details. What sections write for it is listed at the top of page.css.
const all = (selector, inside = document) => [...inside.querySelectorAll(selector)];

// ---- light, dark, or as the system has it

const themes = ["", "light", "dark"];
const themeButton = document.querySelector("#theme");
themeButton.hidden = false;
themeButton.addEventListener("click", () => {
  const now = document.documentElement.dataset.theme || "";
  const next = themes[(themes.indexOf(now) + 1) % themes.length];
  if (next) document.documentElement.dataset.theme = next;
  else delete document.documentElement.dataset.theme;
  themeButton.querySelector(".now").textContent = next || "auto";
});

// ---- which section is in sight

const nav = document.querySelector("nav");
const links = new Map(all("a", nav).map((link) => [link.hash.slice(1), link]));
const seen = new Set();
const watch = new IntersectionObserver((entries) => {
  for (const entry of entries) seen[entry.isIntersecting ? "add" : "delete"](entry.target.id);
  const current = [...links.keys()].find((id) => seen.has(id));
  for (const [id, link] of links) {
    if (id === current) link.setAttribute("aria-current", "true");
    else link.removeAttribute("aria-current");
  }
  const link = links.get(current);
  if (!link) return;
  const [bar, box] = [nav.getBoundingClientRect(), link.getBoundingClientRect()];
  if (box.left < bar.left || box.right > bar.right) nav.scrollLeft += box.left - bar.left - (bar.width - box.width) / 2;
}, { rootMargin: "-20% 0px -60%" });
all("main > section").forEach((section) => watch.observe(section));

// ---- a region that has nothing to scroll is no stop of the Tab key

const regions = all(".scroll");
const measure = () => {
  for (const region of regions) {
    if (region.scrollWidth > region.clientWidth) region.tabIndex = 0;
    else region.removeAttribute("tabindex");
  }
};
new ResizeObserver(measure).observe(document.body);
all("details").forEach((one) => one.addEventListener("toggle", measure));
all(".switch input").forEach((one) => one.addEventListener("change", measure));

// ---- filters

function show(filter, value) {
  const list = document.querySelector(filter.dataset.items);
  const items = all("[data-kind]", list);
  for (const item of items) item.hidden = Boolean(value) && item.dataset.kind !== value;
  for (const group of all("[data-group]", list)) {
    group.hidden = !all("[data-kind]", group).some((item) => !item.hidden);
  }
  for (const button of all("button", filter)) button.setAttribute("aria-pressed", button.dataset.value === value);
  const told = filter.querySelector(".filter-told");
  if (told) told.textContent = `${items.filter((item) => !item.hidden).length} of ${items.length} shown`;
}
for (const filter of all(".filter")) {
  filter.hidden = false;
  for (const button of all("button", filter)) {
    button.addEventListener("click", () => show(filter, button.dataset.value));
  }
}
function reveal() { // what an address names is shown, whatever is filtered
  const named = document.getElementById(decodeURIComponent(location.hash.slice(1)));
  const hidden = named && named.closest("[hidden]");
  if (!hidden) return;
  all(".filter").filter((one) => document.querySelector(one.dataset.items).contains(named)).forEach((one) => show(one, ""));
  named.scrollIntoView();
}
addEventListener("hashchange", reveal);

// ---- pictures, enlarged by whole numbers

const dialog = document.querySelector("dialog.zoom");
const picture = dialog.querySelector("img");
let series = [];
let place = 0;


function fit() {
  const stage = dialog.querySelector(".stage");
  const room = Math.min(stage.clientWidth / picture.naturalWidth, stage.clientHeight / picture.naturalHeight);
  const times = room >= 1 ? Math.floor(room) : room;
  picture.width = Math.max(1, Math.floor(picture.naturalWidth * times));
  picture.height = Math.max(1, Math.floor(picture.naturalHeight * times));
}
function turn(to) {
  place = (to + series.length) % series.length;
  const shown = series[place].querySelector("img");
  picture.alt = shown.alt;
  dialog.querySelector("p").textContent = picture.alt;
  dialog.querySelector(".tools span").textContent = `${place + 1} of ${series.length}`;
  all("button[data-step]", dialog).forEach((button) => { button.hidden = series.length < 2; });
  picture.src = shown.src;
}
picture.addEventListener("load", fit);
addEventListener("resize", () => dialog.open && fit());
document.addEventListener("click", (event) => {
  const button = event.target.closest("button.zoom");
  if (!button) return;
  const group = button.closest("[data-zoom-group]") || button.closest("section");
  series = all("button.zoom", group).filter((one) => one.checkVisibility());
  dialog.showModal();
  turn(series.indexOf(button));
});
all("button[data-step]", dialog).forEach((button) => {
  button.addEventListener("click", () => turn(place + Number(button.dataset.step)));
});
dialog.querySelector("button[data-close]").addEventListener("click", () => dialog.close());
dialog.addEventListener("keydown", (event) => {
  const step = { ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1 }[event.key];
  if (!step) return;
  event.preventDefault();
  turn(place + step);
});
dialog.addEventListener("close", () => series[place]?.focus()); // of the picture that was seen last

// ---- paper has nothing to click on

let closed = [];
addEventListener("beforeprint", () => {
  closed = all("details:not([open])");
  closed.forEach((one) => { one.open = true; });
});
addEventListener("afterprint", () => closed.forEach((one) => { one.open = false; }));
