"use strict";
// Figures and tables are packed (JSON, gzip, base64) in <script type="text/plain" id="data-…">, and unpacked when they are needed.
const JOIN = "\x1f", ROWS = 25, PRINTED = 2000;
const unpacked = new Map();

function bytes(base64) {
  if (Uint8Array.fromBase64) return Uint8Array.fromBase64(base64);
  const text = atob(base64), found = new Uint8Array(text.length);
  for (let i = 0; i < text.length; i++) found[i] = text.charCodeAt(i);
  return found;
}

function unpack(id) {
  if (!unpacked.has(id)) {
    const stream = new Blob([bytes(document.getElementById("data-" + id).textContent)]).stream().pipeThrough(new DecompressionStream("gzip"));
    unpacked.set(id, new Response(stream).json());
  }
  return unpacked.get(id);
}

// ---- figures ----------------------------------------------------------------------------------------------------------------

const CONFIG = {
  displaylogo: false, responsive: true, toImageButtonOptions: { format: "svg" },
  modeBarButtonsToRemove: ["select2d", "lasso2d", "autoScale2d"],
};

async function draw(figure) {
  const figures = await unpack(figure.dataset.group), plot = figure.querySelector(".plot"), caption = figure.querySelector("figcaption");
  const key = [...figure.querySelectorAll("select")].map((select) => select.value).join(JOIN);
  const chosen = figures[key];
  if (!chosen) {
    plot.replaceChildren();
    plot.className = "plot";
    caption.textContent = "Not measured here. Choose something else from the menus.";
    plot.style.height = "auto";
    plot.setAttribute("aria-label", caption.textContent);
    figure.dataset.drawn = key;
    return;
  }
  const layout = { ...structuredClone(chosen.layout), template: (await unpack("template")), autosize: true };
  layout.title = { ...layout.title, automargin: false };
  plot.style.height = layout.height + "px";
  plot.setAttribute("aria-label", layout.meta.alt);
  caption.textContent = layout.meta.alt;
  await Plotly.react(plot, structuredClone(chosen.data), layout, CONFIG);
  figure.dataset.drawn = key;
}

// What comes into view is drawn at once, the rest when there is time, so that printing or saving the page finds all of it.
const LATER = [["figure[data-group]", draw], [".table:not([hidden])", table]];

function begin(element, make) {
  if (!element.dataset.begun) { element.dataset.begun = "yes"; return make(element); }
}

function watch() {
  for (const [which, make] of LATER) {
    const seen = new IntersectionObserver((entries) => {
      for (const entry of entries) if (entry.isIntersecting) { seen.unobserve(entry.target); begin(entry.target, make); }
    }, { rootMargin: "200px" });
    for (const element of document.querySelectorAll(which)) seen.observe(element);
  }
  for (const figure of document.querySelectorAll("figure[data-group]")) {
    for (const select of figure.querySelectorAll("select")) select.addEventListener("change", () => draw(figure));
  }
}

async function remaining() {
  for (const [which, make] of LATER) {
    for (const element of document.querySelectorAll(which)) {
      await new Promise((resolve) => (window.requestIdleCallback || setTimeout)(resolve));
      await begin(element, make);
    }
  }
  document.body.dataset.ready = "yes";
}

// ---- tables -----------------------------------------------------------------------------------------------------------------

const SHOWN = {
  whole: (v) => (v === null ? "–" : String(v)),
  fine: (v) => (v === null ? "–" : typeof v === "string" ? v : String(v)),
  text: (v) => (v === null ? "" : String(v)),
  count: (v) => (v === null ? "–" : v.toLocaleString("en-US")),
  number: (v) => (v === null ? "–" : typeof v === "string" ? v : v === 0 ? "0" : short(v)),
  percent: (v) => (v === null ? "–" : short(v) + " %"),
  share: (v) => (v === null ? "–" : v === 0 || v === 1 ? v * 100 + " %" : (v * 100).toFixed(digits(v)) + " %"),
};

// As many as show three significant digits of what is there and of what is missing.
function digits(share) {
  return Math.min(10, Math.max(2, 2 - Math.floor(Math.log10(Math.min(Math.abs(share), Math.abs(1 - share)) * 100))));
}

function short(v) {
  const size = Math.abs(v);
  return size !== 0 && (size < 1e-3 || size >= 1e6) ? v.toExponential(2) : String(Number(v.toPrecision(size >= 1000 ? 6 : 4)));
}

async function table(box) {
  const data = await unpack(box.id), columns = data.columns, length = columns.length ? columns[0].values.length : 0;
  const state = { sort: null, down: false, page: 0, found: null };
  const search = box.querySelector("input"), status = box.querySelector("[role=status]"), head = box.querySelector("thead tr");
  const [before, after] = box.querySelectorAll(".pager button");
  const lower = columns.map((c) => (c.kind === "text" ? c.values.map((v) => (v === null ? "" : String(v).toLowerCase())) : null));
  head.replaceChildren(...columns.map((column, index) => {
    const th = document.createElement("th"), button = document.createElement("button");
    th.scope = "col"; th.className = column.kind === "text" ? "text" : ""; button.type = "button"; button.textContent = column.label;
    if (column.title) button.title = column.title;
    button.addEventListener("click", () => {
      state.down = state.sort === index ? !state.down : column.kind !== "text";
      state.sort = index; state.page = 0; order(); show();
    });
    th.append(button);
    return th;
  }));

  function find() {
    const words = search.value.toLowerCase().split(/\s+/).filter(Boolean);
    const found = [];
    for (let row = 0; row < length; row++) {
      if (words.every((word) => lower.some((values) => values && values[row].includes(word)))) found.push(row);
    }
    state.found = found; state.page = 0;
  }

  function order() {
    if (state.sort === null) return;
    const values = columns[state.sort].values, way = state.down ? -1 : 1, text = columns[state.sort].kind === "text";
    const compare = text ? (a, b) => way * String(a).localeCompare(String(b), "en", { numeric: true }) : (a, b) => way * (a - b);
    const missing = (v) => v === null || (!text && typeof v === "string"); // last, whichever way
    state.found.sort((a, b) => (missing(values[a]) - missing(values[b])) || (missing(values[a]) ? a - b : compare(values[a], values[b]) || a - b));
    [...head.children].forEach((th, index) => {
      if (index === state.sort) th.setAttribute("aria-sort", state.down ? "descending" : "ascending"); else th.removeAttribute("aria-sort");
    });
  }

  function show(most = ROWS) {
    const first = most === ROWS ? state.page * ROWS : 0, rows = state.found.slice(first, first + most);
    box.querySelector("tbody").replaceChildren(...rows.map((row) => {
      const tr = document.createElement("tr");
      for (const column of columns) {
        const td = document.createElement("td");
        td.textContent = SHOWN[column.kind](column.values[row]);
        if (column.kind === "text") { td.className = "text"; td.title = td.textContent; }
        tr.append(td);
      }
      return tr;
    }));
    const count = state.found.length.toLocaleString("en-US"), of = length.toLocaleString("en-US");
    status.textContent = state.found.length ? `${first + 1}–${first + rows.length} of ${count}` + (count !== of ? ` found among ${of}` : "") : `None of ${of} found`;
    before.disabled = state.page === 0; after.disabled = first + ROWS >= state.found.length;
  }

  let wait;
  search.addEventListener("input", () => { clearTimeout(wait); wait = setTimeout(() => { find(); order(); show(); }, 80); });
  before.addEventListener("click", () => { state.page--; show(); });
  after.addEventListener("click", () => { state.page++; show(); });
  // On paper there is no next page of a table: it is printed whole, or as far as it says.
  addEventListener("beforeprint", () => show(PRINTED));
  addEventListener("afterprint", () => show());
  find(); show();
}

// The table of another run takes the place of this one's.
function switching() {
  for (const select of document.querySelectorAll("select[data-tables]")) {
    const swap = () => {
      for (const box of document.querySelectorAll(`[data-set="${select.dataset.tables}"]`)) {
        box.hidden = box.dataset.run !== select.value;
        if (!box.hidden) begin(box, table);
      }
    };
    select.addEventListener("change", swap);
  }
}

document.addEventListener("DOMContentLoaded", () => {
  watch();
  switching();
  (window.requestIdleCallback || setTimeout)(remaining);
});
