"use strict";
/* The page's script. Everything it shows is in this page, as compressed JSON; text goes in by textContent, and through
   plain() where plotly would read it as markup. */
(async () => {
  document.documentElement.dataset.theme = matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light";
  if (!self.DecompressionStream) {
    document.getElementById("readout").textContent = "The figures need a browser of 2023 or later.";
    return;
  }
  const packed = atob(document.getElementById("data").textContent), bytes = new Uint8Array(packed.length);
  for (let i = 0; i < packed.length; i++) bytes[i] = packed.charCodeAt(i);
  const DATA = await new Response(new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"))).json();
  for (const chart of DATA.charts) { // rows come by columns, each text once
    const columns = chart.packed.map((c) => c.of ? c.at.map((i) => c.of[i]) : c.values);
    chart.rows = columns.length ? columns[0].map((_, i) => columns.map((c) => c[i])) : [];
  }
  const COLOURS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#8a8f98"];
  const MOST = 8; // curves in a figure before the reader chooses
  const DASHES = ["solid", "dash", "dot", "dashdot", "longdash"];
  const MARKERS = ["circle", "square", "triangle-up", "diamond", "triangle-down", "cross", "x"];
  const state = { pair: "", data: "", stage: "", group: "", view: "values", x: "depth" };
  const WHOLE = new Intl.NumberFormat("en"); // made once: for each number it takes longer than all else
  const drawn = new Map(), figures = new Map();
  let cursor = null; // relative depth, 0..1

  const plain = (text) => String(text).replace(/&/g, "&amp;").replace(/</g, "&lt;").replace(/>/g, "&gt;");
  const make = (tag, more = {}, ...children) => {
    const node = document.createElement(tag);
    for (const [key, value] of Object.entries(more)) {
      if (key === "text") node.textContent = value;
      else if (key === "on") for (const [event, call] of Object.entries(value)) node.addEventListener(event, call);
      else node.setAttribute(key, value);
    }
    node.append(...children);
    return node;
  };
  const css = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
  const column = (chart, name) => chart.columns.indexOf(name);
  const shown = (value) => value === null || value === undefined ? "" : typeof value === "number"
    ? (Number.isInteger(value) ? WHOLE.format(value) : String(Number(value.toPrecision(4)))) : String(value);

  /* -- which rows a chart shows ------------------------------------------------------------------------------- */
  function chosen(chart) {
    const test = ["pair", "data", "stage"].map((key) => [column(chart, key), state[key]])
      .filter(([at, value]) => at >= 0 && value !== "");
    const kept = chart.rows.filter((row) => test.every(([at, value]) => row[at] === value || row[at] === "" || row[at] === null));
    return kept.length ? kept : chart.rows;
  }
  function differs(rows, at) { return at >= 0 && new Set(rows.map((r) => r[at])).size > 1; }

  /* -- drawing ------------------------------------------------------------------------------------------------- */
  function depthTraces(chart) {
    let rows = chosen(chart);
    const at = Object.fromEntries(chart.columns.map((name, i) => [name, i]));
    const differences = rows.filter((r) => r[at.side] === "difference");
    const own = rows.filter((r) => r[at.side] !== "difference");
    rows = (state.view === "difference" && differences.length) || !own.length ? differences : own;
    if (chart.groups.length > 1) {
      const group = chart.groups.includes(state.group) ? state.group : chart.groups[0];
      rows = rows.filter((r) => r[at.group] === group);
    }
    const parts = ["pair", "data", "stage"].filter((key) => differs(rows, at[key]));
    const sides = differs(rows, at.side);
    const curves = new Map();
    for (const row of rows) {
      const who = parts.map((key) => row[at[key]]).filter(Boolean).join(", ");
      const name = [who, sides ? row[at.side] : ""].filter(Boolean).join(": ") || row[at.side];
      if (!curves.has(name)) curves.set(name, { who, side: row[at.side], rows: [] });
      curves.get(name).rows.push(row);
    }
    const whos = [...new Set([...curves.values()].map((c) => c.who))];
    const kinds = [...new Set([...curves.values()].map((c) => c.side))];
    const traces = [];
    let number = 0;
    for (const [name, curve] of curves) {
      curve.rows.sort((a, b) => a[at.layer] - b[at.layer]);
      const x = curve.rows.map((r) => state.x === "depth" ? r[at.layer] / Math.max(1, chart.last) : r[at.layer]);
      const index = whos.length > 1 ? whos.indexOf(curve.who) : kinds.indexOf(curve.side);
      const colour = COLOURS[index % COLOURS.length];
      const banded = curve.rows.filter((r) => r[at.low] !== null && r[at.high] !== null);
      if (banded.length > 1) {
        const bx = banded.map((r) => state.x === "depth" ? r[at.layer] / Math.max(1, chart.last) : r[at.layer]);
        traces.push({ x: [...bx, ...bx.slice().reverse()], y: [...banded.map((r) => r[at.high]),
          ...banded.map((r) => r[at.low]).reverse()], fill: "toself", fillcolor: colour + "33", line: { width: 0 },
          mode: "lines", hoverinfo: "skip", showlegend: false, type: "scatter" });
      }
      traces.push({ x, y: curve.rows.map((r) => r[at.value]), name: plain(name), mode: "lines+markers", type: "scatter",
        connectgaps: false, line: { color: colour, width: 2, dash: DASHES[kinds.indexOf(curve.side) % DASHES.length] },
        marker: { size: 5, color: colour, symbol: MARKERS[number++ % MARKERS.length] },
        customdata: curve.rows.map((r) => [r[at.layer], shown(r[at.low]), shown(r[at.high]), shown(r[at.n])]),
        hovertemplate: "%{fullData.name}<br>" + chart.at + " %{customdata[0]}: %{y:.4g} [%{customdata[1]}, %{customdata[2]}], " +
          "n = %{customdata[3]}<extra></extra>" });
    }
    return traces;
  }
  function barTraces(chart) {
    const rows = chosen(chart).filter((r) => r[column(chart, "value")] !== null);
    const label = chart.bars || "mask";
    const at = Object.fromEntries(chart.columns.map((name, i) => [name, i]));
    const parts = ["pair", "data", "stage", "what"].filter((key) => differs(rows, column(chart, key)));
    const series = new Map();
    for (const row of rows) {
      const name = parts.map((key) => row[at[key]]).filter(Boolean).join(", ");
      if (!series.has(name)) series.set(name, []);
      series.get(name).push(row);
    }
    let number = 0;
    const least = chart.baseline;
    return [...series].map(([name, list]) => {
      const colour = COLOURS[number++ % COLOURS.length];
      const clear = list.map((r) => least === null || least === undefined || r[at.low] === null || r[at.low] > least || r[at.high] < least);
      return { type: "bar", name: plain(name || chart.title), x: list.map((r) => plain(r[at[label]])), y: list.map((r) => r[at.value]),
        marker: { color: clear.map((yes) => yes ? colour : colour + "55"), line: { color: colour, width: 1.5 } },
        error_y: { type: "data", symmetric: false, array: list.map((r) => r[at.high] === null ? 0 : r[at.high] - r[at.value]),
          arrayminus: list.map((r) => r[at.low] === null ? 0 : r[at.value] - r[at.low]), color: css("--ink"), thickness: 1.2, width: 3 },
        customdata: list.map((r) => [shown(r[at.low]), shown(r[at.high]), shown(r[at.n])]),
        hovertemplate: "%{x}: %{y:.4g} [%{customdata[0]}, %{customdata[1]}], n = %{customdata[2]}<extra>%{fullData.name}</extra>" };
    });
  }
  function heatTraces(chart) {
    const [ax, ay] = [column(chart, chart.x), column(chart, chart.y)];
    const at = column(chart, chart.text);
    const av = chart.columns.findIndex((name, i) => i !== ax && i !== ay && i !== at && name !== "n");
    const xs = [...new Set(chart.rows.map((r) => r[ax]))], ys = [...new Set(chart.rows.map((r) => r[ay]))];
    const grid = ys.map(() => xs.map(() => null));
    const texts = at < 0 ? null : ys.map(() => xs.map(() => ""));
    for (const row of chart.rows) {
      grid[ys.indexOf(row[ay])][xs.indexOf(row[ax])] = row[av];
      if (texts) texts[ys.indexOf(row[ay])][xs.indexOf(row[ax])] = plain(row[at]);
    }
    const words = (list) => list.map((v) => typeof v === "number" ? v : plain(v));
    return [{ type: "heatmap", x: words(xs), y: words(ys), z: grid, hoverongaps: false, colorscale: chart.signed ? "RdBu" : "Viridis",
      ...(chart.signed ? { zmin: -1, zmax: 1 } : {}), colorbar: { thickness: 12, tickfont: { size: 11 } },
      ...(texts ? { text: texts, texttemplate: xs.length <= 40 ? "%{text}" : "", textfont: { size: 10 }, showscale: false,
        colorscale: [[0, css("--panel")], [1, "#9fd0ea"]], xgap: 1, ygap: 1 } : {}),
      hovertemplate: plain(chart.x) + " %{x}, " + plain(chart.y) + " %{y}: " + (texts ? "%{text}" : "%{z:.4g}") + "<extra></extra>" }];
  }
  function scatterTraces(chart) {
    const at = Object.fromEntries(chart.columns.map((name, i) => [name, i]));
    return chart.rows.map((row, i) => ({ type: "scatter", mode: "markers+text", name: plain(row[0]), text: [plain(row[0])],
      textposition: "top center", x: [row[at[chart.x]]], y: [row[at[chart.y]]], showlegend: false, textfont: { size: 11 },
      marker: { size: 10, color: COLOURS[i % COLOURS.length], symbol: MARKERS[i % MARKERS.length] },
      hovertemplate: "%{text}: %{x:.4g}, %{y:.4g}<extra></extra>" }));
  }
  function lineTraces(chart) {
    return [{ type: "scatter", mode: "lines", name: plain(chart.y), x: chart.rows.map((r) => r[0]), y: chart.rows.map((r) => r[1]),
      line: { color: COLOURS[0], width: 2 } }];
  }
  const TRACES = { depth: depthTraces, bars: barTraces, heatmap: heatTraces, scatter: scatterTraces, lines: lineTraces };

  function layout(chart, traces) {
    const ink = css("--ink"), line = css("--line");
    const named = chart.kind === "heatmap" && typeof chart.rows[0][column(chart, chart.x)] === "string"
      ? new Set(chart.rows.map((row) => row[column(chart, chart.x)])).size : 0;
    const many = named > 64; // names would cover the figure: they show under the pointer
    const all = named > 12 ? { dtick: 1, tickfont: { size: 10 } } : {};
    const axis = { gridcolor: line, linecolor: line, zerolinecolor: line, automargin: true, tickfont: { size: 11 } };
    const depth = chart.kind === "depth";
    const shapes = [];
    if (depth) {
      const end = state.x === "depth" ? 1 : chart.last;
      for (const [a, b] of [[0, 0.2], [0.8, 1]]) shapes.push({ type: "rect", xref: "x", yref: "paper", x0: a * end, x1: b * end,
        y0: 0, y1: 1, fillcolor: css("--zone"), line: { width: 0 }, layer: "below" });
      if (chart.unchanged !== undefined && chart.unchanged !== null) shapes.push({ type: "line", xref: "paper", yref: "y", x0: 0,
        x1: 1, y0: chart.unchanged, y1: chart.unchanged, line: { color: css("--soft"), width: 1, dash: "dot" } });
    }
    if (chart.kind === "bars" && chart.baseline !== null && chart.baseline !== undefined) shapes.push({ type: "line", xref: "paper",
      yref: "y", x0: 0, x1: 1, y0: chart.baseline, y1: chart.baseline, line: { color: css("--soft"), width: 1.5, dash: "dot" } });
    const titles = { depth: state.x === "depth" ? "relative depth" : chart.at, bars: chart.bars || "mask", heatmap: chart.x,
      scatter: chart.x_axis, lines: chart.x };
    return { paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)", font: { color: ink, size: 12, family: "inherit" },
      margin: { l: 56, r: 12, t: 12, b: 40 }, hovermode: "closest", shapes, bargap: 0.25,
      showlegend: traces.filter((t) => t.showlegend !== false).length > 1,
      legend: { orientation: "h", y: 1.02, yanchor: "bottom", x: 0, font: { size: 11 } },
      xaxis: { ...axis, title: { text: plain(titles[chart.kind] || ""), font: { size: 12 } }, ...(chart.kind === "bars" || chart.x === "arm" ? { type: "category" } : {}), ...all, ...(named > 12 ? { tickangle: -90 } : {}), showticklabels: !many },
      yaxis: { ...axis, title: { text: chart.kind === "heatmap" ? plain(chart.y) : plain(chart.axis), font: { size: 12 } },
        ...(chart.kind === "heatmap" ? { autorange: "reversed" } : {}), ...all, showticklabels: !many,
        ...(chart.log && state.view === "values" ? { type: "log" } : {}) },
      hoverlabel: { bgcolor: css("--panel"), bordercolor: line, font: { color: ink } } };
  }
  function draw(chart, plot) {
    const traces = TRACES[chart.kind](chart);
    Plotly.react(plot, traces, layout(chart, traces), { displayModeBar: false, responsive: true });
    if (!drawn.has(plot)) {
      drawn.set(plot, chart);
      if (chart.kind === "depth") {
        // one way for mouse, pen and finger; a finger that drags over a figure moves the cursor, the page scrolls upright
        const point = (event) => {
          const axis = plot._fullLayout && plot._fullLayout.xaxis;
          if (!axis) return;
          const value = axis.p2d(event.clientX - plot.getBoundingClientRect().left - axis._offset);
          const layer = Math.round(state.x === "depth" ? value * chart.last : value);
          moveCursor(layer / Math.max(1, chart.last), chart);
        };
        plot.style.touchAction = "pan-y";
        plot.on("plotly_afterplot", () => placeCursor(plot, chart)); // a window of another size
        plot.addEventListener("pointermove", point);
        plot.addEventListener("pointerdown", point);
      }
    }
    placeCursor(plot, chart);
  }
  function redraw() {
    for (const [node, chart] of figures) node.hidden = ["pair", "data"].some((key) => chart[key] && state[key] && chart[key] !== state[key]);
    for (const [plot, chart] of drawn) if (!plot.closest("figure").hidden) draw(chart, plot);
  }

  /* -- one cursor over all depth figures ------------------------------------------------------------------------ */
  function placeCursor(plot, chart) {
    const mark = plot.parentElement.querySelector(".cursor");
    if (!mark || chart.kind !== "depth" || !plot._fullLayout) return;
    const inside = cursor !== null;
    mark.style.display = inside ? "block" : "none";
    if (!inside) return;
    const axis = plot._fullLayout.xaxis, height = plot._fullLayout.yaxis;
    const value = state.x === "depth" ? cursor : cursor * chart.last;
    mark.style.left = axis._offset + axis.d2p(value) - 1 + "px";
    mark.style.top = height._offset + "px";
    mark.style.height = height._length + "px";
  }
  function moveCursor(depth, chart) {
    cursor = Math.min(1, Math.max(0, depth));
    for (const [plot, other] of drawn) placeCursor(plot, other);
    const layer = Math.round(cursor * chart.last);
    const values = depthTraces(chart).filter((t) => t.customdata).map((t) => {
      const i = t.customdata.findIndex((c) => c[0] === layer);
      return i < 0 || t.y[i] === null ? "" : t.name + " " + shown(t.y[i]);
    }).filter(Boolean);
    document.getElementById("readout").textContent = `Depth ${cursor.toFixed(2)} (${chart.at} ${layer}), ${chart.title}: ` +
      values.join("; ").replace(/&lt;/g, "<").replace(/&gt;/g, ">").replace(/&amp;/g, "&");
  }

  /* -- figures, tables, downloads -------------------------------------------------------------------------------- */
  function figure(chart, suffix = "") {
    const id = chart.id + suffix;
    const caption = make("figcaption", { text: chart.title, id: id + "-title" });
    const size = chart.n.length ? `n = ${chart.n[0] === chart.n[1] ? shown(chart.n[0]) : shown(chart.n[0]) + " to " + shown(chart.n[1])}. ` : "";
    const about = make("p", { class: "about", id: id + "-about", text: size + (chart.about || "") });
    const node = make("figure", { id, "aria-labelledby": id + "-title", "aria-describedby": id + "-about",
      class: chart.kind === "heatmap" || chart.kind === "table" ? "wide" : "" }, caption, about);
    figures.set(node, chart);
    if (chart.kind !== "table") {
      const plot = make("div", { class: "plot-area" });
      const lines = chart.kind === "heatmap" ? new Set(chart.rows.map((row) => row[column(chart, chart.y)])).size : 0;
      const frame = make("div", { class: lines > 40 ? "plot tallest" : lines ? "plot tall" : "plot", role: "img",
        "aria-label": `${chart.title}; its values are in the data table below.` }, plot, make("div", { class: "cursor" }));
      plot.style.height = "100%";
      node.append(frame);
      later(plot, () => draw(chart, plot));
      if (chart.kind === "depth") {
        node.tabIndex = 0;
        node.addEventListener("keydown", (event) => {
          const step = { ArrowLeft: -1, ArrowRight: 1, Home: -Infinity, End: Infinity }[event.key];
          if (step === undefined || event.target !== node) return;
          event.preventDefault();
          const layer = Math.round((cursor === null ? 0 : cursor) * chart.last) + step;
          moveCursor(Math.min(chart.last, Math.max(0, layer)) / Math.max(1, chart.last), chart);
        });
      }
      const tools = make("div", { class: "tools" });
      for (const format of ["svg", "png"]) tools.append(make("button", { type: "button", text: format.toUpperCase(),
        "aria-label": `Download ${chart.title} as ${format.toUpperCase()}`, on: { click: () => save(plot, chart, format) } }));
      tools.append(make("button", { type: "button", text: "CSV", "aria-label": `Download the data of ${chart.title} as CSV`,
        on: { click: () => download(csv(chart), "text/csv", `${name(chart)}.csv`) } }));
      node.append(tools);
    }
    if (chart.formula || chart.source || (chart.variants || []).length) {
      const lines = [chart.formula && make("p", {}, make("code", { text: chart.formula })), chart.source && make("p", { text: "Source: " + chart.source }),
        ...(chart.variants || []).map((v) => make("p", { text: v }))].filter(Boolean);
      node.append(make("details", {}, make("summary", { text: "Definition" }), ...lines));
    }
    const details = make("details", chart.kind === "table" ? { open: "" } : {}, make("summary", { text: `Data table (${shown(chart.rows.length)} rows)` }));
    const fill = () => { if (details.open && !details.querySelector("table")) details.append(table(chart)); };
    details.addEventListener("toggle", () => { if (!pending.has(details)) fill(); }); // one that is made open toggles too
    node.append(details);
    if (details.open) later(details, fill);
    return node;
  }
  function table(chart) {
    const body = make("tbody");
    const fill = (rows) => body.replaceChildren(...rows.map((row) => make("tr", {}, ...row.map((v) => make("td", typeof v === "number"
      ? { text: shown(v), class: "number" } : { text: shown(v) })))));
    const heads = chart.columns.map((title, at) => {
      const head = make("th", { scope: "col", "aria-sort": "none" });
      head.append(make("button", { type: "button", text: title, on: { click: () => {
        const up = head.getAttribute("aria-sort") !== "ascending";
        heads.forEach((h) => h.setAttribute("aria-sort", "none"));
        head.setAttribute("aria-sort", up ? "ascending" : "descending");
        const key = (v) => v === null ? -Infinity : v;
        fill(chart.rows.slice().sort((a, b) => (typeof a[at] === "number" || typeof b[at] === "number"
          ? key(a[at]) - key(b[at]) : String(a[at]).localeCompare(String(b[at]))) * (up ? 1 : -1)));
      } } }));
      return head;
    });
    fill(chart.rows);
    return make("div", { class: "scroll", tabindex: "0", role: "region", "aria-label": `Data of ${chart.title}` },
      make("table", {}, make("thead", {}, make("tr", {}, ...heads)), body));
  }
  const name = (chart) => chart.title.toLowerCase().replace(/[^a-z0-9]+/g, "-").replace(/^-|-$/g, "").slice(0, 60) || chart.id;
  const csv = (chart) => [chart.columns, ...chart.rows].map((row) => row.map((v) => v === null ? "" : /[",\n]/.test(String(v))
    ? `"${String(v).replace(/"/g, '""')}"` : String(v)).join(",")).join("\n") + "\n";
  function download(content, type, file) {
    const url = content.startsWith("data:") ? content : URL.createObjectURL(new Blob([content], { type }));
    make("a", { href: url, download: file }).click();
    if (url.startsWith("blob:")) setTimeout(() => URL.revokeObjectURL(url), 1000);
  }
  async function save(plot, chart, format) {
    download(await Plotly.toImage(plot, { format, width: 900, height: 500, scale: format === "png" ? 2 : 1 }), "", `${name(chart)}.${format}`);
  }

  /* -- the page --------------------------------------------------------------------------------------------------- */
  const pending = new Map(); // element -> what makes its content, once it comes near
  const waiting = new IntersectionObserver((entries) => {
    for (const entry of entries) if (entry.isIntersecting) now(entry.target);
  }, { rootMargin: "400px" });
  function later(node, call) { pending.set(node, call); waiting.observe(node); }
  function now(node) {
    const call = pending.get(node);
    pending.delete(node);
    waiting.unobserve(node);
    if (call) call();
  }

  function values(key) {
    const found = new Set();
    for (const chart of DATA.charts) {
      const at = column(chart, key);
      if (chart[key]) found.add(chart[key]);
      if (at >= 0) for (const row of chart.rows) if (row[at]) found.add(row[at]);
    }
    return [...found];
  }
  function choice(key, label, options) {
    const select = make("select", { id: "choose-" + key, on: { change: () => { state[key] = select.value; redraw(); } } },
      ...options.map(([value, text]) => make("option", { value, text })));
    select.value = state[key];
    document.getElementById("controls").append(make("span", { class: "choice" }, make("label", { for: "choose-" + key, text: label }), select));
  }
  const together = () => Math.max(0, ...DATA.charts.filter((c) => c.kind === "depth").map((chart) =>
    new Set(chosen(chart).map((row) => ["pair", "data", "stage"].map((key) => row[column(chart, key)]).join("\n"))).size));
  for (const [key, label] of [["pair", "Pair"], ["data", "Data"], ["stage", "Stage"]]) {
    const found = values(key);
    if (found.length > 1 && together() > MOST) state[key] = found[0]; // more curves in one figure say nothing
    if (found.length > 1) choice(key, label, [["", "all"], ...found.map((v) => [v, v])]);
  }
  const groups = [...new Set(DATA.charts.flatMap((c) => c.groups && c.groups.length > 1 ? c.groups : []))];
  if (groups.length) {
    state.group = groups[0];
    choice("group", "Part", groups.map((g) => [g, g || "whole"]));
  }
  choice("view", "Show", [["values", "base and tuned"], ["difference", "difference"]]);
  choice("x", "Across", [["depth", "relative depth"], ["layer", "layer"]]);

  const home = document.getElementById("sections"), contents = document.getElementById("contents");
  for (const [key, title] of Object.entries(DATA.sections)) {
    const charts = DATA.charts.filter((c) => c.section === key);
    if (!charts.length) continue;
    const heading = make("h2", { id: "section-" + key, text: title });
    home.append(make("section", { "aria-labelledby": "section-" + key }, heading, make("div", { class: "grid" }, ...charts.map((c) => figure(c)))));
    contents.append(make("a", { href: "#section-" + key, text: title }));
  }
  const key = document.getElementById("key");
  for (const id of DATA.findings.key) key.append(figure(DATA.charts.find((c) => c.id === id), "-key"));

  const theme = document.getElementById("theme");
  const paint = (dark) => {
    document.documentElement.dataset.theme = dark ? "dark" : "light";
    theme.setAttribute("aria-pressed", String(dark));
    theme.textContent = dark ? "Light" : "Dark";
    redraw();
  };
  theme.addEventListener("click", () => paint(document.documentElement.dataset.theme !== "dark"));
  paint(document.documentElement.dataset.theme === "dark");
  document.getElementById("copy").addEventListener("click", async (event) => {
    try { await navigator.clipboard.writeText(document.getElementById("command").textContent); event.target.textContent = "Copied"; }
    catch { getSelection().selectAllChildren(document.getElementById("command")); }
  });
  addEventListener("beforeprint", () => { 
    for (const node of [...pending.keys()]) if (!node.closest("figure").hidden) now(node);
  });
})();
