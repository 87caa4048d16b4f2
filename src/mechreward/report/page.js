"use strict";
// What comes from runs is set as text, never as HTML.

const PAGE = 10;
const COLOURS = ["#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#8c564b", "#7f7f7f", "#bcbd22", "#9467bd"];
const DASHES = ["solid", "dash", "dot", "dashdot", "longdash"];
const $ = (id) => document.getElementById(id);

function h(tag, properties = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (name in element && name !== "role") element[name] = value;
    else element.setAttribute(name, value);
  }
  element.append(...children.filter((child) => child !== null));
  return element;
}

async function unpacked(id) {
  const bytes = Uint8Array.from(atob($(id).textContent), (c) => c.charCodeAt(0));
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
  return new Response(stream).text();
}

const number = (x, digits = 4) => (x === null || x === undefined ? "–" : String(Number(x.toPrecision(digits))));

// Control characters and those that turn the writing direction, as `features/show.py` shows them.
const visible = (text) =>
  text.replace(/\r\n/g, "↵\n").replace(/\n/g, "↵\n").replace(/\t/g, "⇥")
    .replace(/[\u0000-\u0009\u000b-\u001f\u007f-\u009f\u202a-\u202e\u2066-\u2069]/g, "\ufffd");

// -- rollouts -------------------------------------------------------------------------------------------------------

class Browser {
  constructor(data) {
    Object.assign(this, data);
    this.page = 0;
    this.largest = new Map();
    this.rows.forEach((row, place) => (row.place = place));
    this.fill();
    for (const control of $("filters").elements) control.addEventListener("input", () => this.changed(control));
    $("filters").addEventListener("submit", (event) => event.preventDefault());
    for (const [id, step] of [["previous", -1], ["next", 1], ["previous2", -1], ["next2", 1]])
      $(id).addEventListener("click", () => this.turn(step, id.endsWith("2")));
    $("clear").addEventListener("click", () => this.clear());
    document.addEventListener("keydown", (event) => this.key(event));
    this.apply();
  }

  fill() {
    const add = (id, options) => $(id).append(...options.map(([value, text]) => h("option", { value, textContent: text })));
    const distinct = (of) => [...new Set(of)];
    const same = (values) => values.map((value) => [String(value), String(value)]);
    add("f-arm", [["", "all"], ...same(distinct(this.runs.map((run) => run.arm)))]);
    add("f-seed", [["", "all"], ...same(distinct(this.runs.map((run) => run.seed)).filter((seed) => seed !== null))]);
    add("f-set", [["", "training and test"], ["training", "training"], ["test", "test questions"]]);
    const names = distinct(this.rows.flatMap((row) => row.flags.map((flag) => flag.split(":")[0]))).sort();
    add("f-flag", [["", "any"], ["flagged", "flagged"], ["clean", "not flagged"], ["dropped", "dropped"], ...names.map((n) => ["=" + n, n])]);
    add("f-sort", [["hacking", "wrong ones first, most rewarded first"], ["reward", "reward, highest first"],
      ["-reward", "reward, lowest first"], ["advantage", "advantage, highest first"], ["reading", "mean of the shaded reading, highest first"],
      ["length", "longest first"], ["step", "latest step first"], ["", "as recorded"]]);
    this.readouts.forEach((readout, r) => {
      const group = h("optgroup", { label: readout.name });
      group.append(h("option", { value: `${r}`, textContent: `${readout.name}: r_t, all weighted` }));
      readout.labels.forEach((label, k) => {
        const weight = readout.weights[k];
        const text = weight === null || weight === undefined ? label : `${label} (weight ${number(weight, 3)})`;
        group.append(h("option", { value: `${r}/${k}`, textContent: text }));
      });
      $("f-feature").append(group);
    });
    $("f-feature").append(h("option", { value: "", textContent: "nothing" }));
  }

  changed(control) {
    if (control.id === "f-feature" && $("f-sort").value !== "reading") this.draw();
    else this.apply();
  }

  clear() {
    for (const id of ["f-arm", "f-seed", "f-set", "f-right", "f-flag", "f-from", "f-to", "f-text"]) $(id).value = "";
    this.apply();
  }

  text(row) {
    row.text ??= row.tokens.map((token) => this.tokens[token]).join("");
    return row.text;
  }

  // The chosen reading on each token of a rollout; null where nothing was read.
  reading(row, chosen = $("f-feature").value) {
    if (chosen === "") return null;
    const [r, k] = chosen.split("/");
    const read = row.readings[r];
    if (read === undefined) return null;
    if (k === undefined) return read.score;
    const values = row.tokens.map(() => 0);
    for (const token of row.unread) values[token] = null;
    const [places, there] = read.features[k] ?? [[], []];
    places.forEach((place, i) => (values[place] = there[i]));
    return values;
  }

  scale(chosen) {
    if (!this.largest.has(chosen)) {
      let most = 0;
      for (const row of this.rows) for (const value of this.reading(row, chosen) ?? []) most = Math.max(most, Math.abs(value ?? 0));
      this.largest.set(chosen, most);
    }
    return this.largest.get(chosen);
  }

  mean(row) {
    const values = (this.reading(row) ?? []).filter((value) => value !== null);
    return values.length ? values.reduce((a, b) => a + b, 0) / values.length : null;
  }

  matches() {
    const value = Object.fromEntries([...$("filters").elements].map((control) => [control.id.slice(2), control.value]));
    const wanted = value.text.toLowerCase();
    const verdict = { true: "right", false: "wrong", null: "unknown" };
    return (row) =>
      (value.arm === "" || this.runs[row.run].arm === value.arm) &&
      (value.seed === "" || String(this.runs[row.run].seed) === value.seed) &&
      (value.set === "" || row.set === value.set) &&
      (value.right === "" || verdict[row.right] === value.right) &&
      (value.from === "" || row.step >= Number(value.from)) &&
      (value.to === "" || row.step <= Number(value.to)) &&
      (value.flag === "" || (value.flag === "flagged" && row.flags.length > 0) || (value.flag === "clean" && row.flags.length === 0) ||
        (value.flag === "dropped" && row.dropped) || row.flags.some((flag) => "=" + flag.split(":")[0] === value.flag)) &&
      (wanted === "" || this.text(row).toLowerCase().includes(wanted) ||
        (row.prompt !== null && this.prompts[row.prompt].toLowerCase().includes(wanted)));
  }

  sorted(rows) {
    const how = $("f-sort").value;
    if (how === "") return rows;
    const key = {
      hacking: (row) => row.reward, reward: (row) => row.reward, "-reward": (row) => (row.reward === null ? null : -row.reward),
      advantage: (row) => row.advantage, reading: (row) => this.mean(row),
      length: (row) => row.tokens.length + row.more, step: (row) => row.step,
    }[how];
    const keyed = rows.map((row) => [how === "hacking" && row.right === false && row.reward !== null ? 0 : 1, key(row) ?? -Infinity, row]);
    keyed.sort((a, b) => a[0] - b[0] || (b[1] === a[1] ? a[2].place - b[2].place : b[1] - a[1]));
    return keyed.map((entry) => entry[2]);
  }

  apply() {
    const began = performance.now();
    this.found = this.sorted(this.rows.filter(this.matches()));
    this.page = 0;
    this.draw();
    document.body.dataset.milliseconds = (performance.now() - began).toFixed(1);
  }

  turn(step, upwards = false) {
    const last = Math.max(0, Math.ceil(this.found.length / PAGE) - 1);
    const page = Math.min(last, Math.max(0, this.page + step));
    if (page === this.page) return;
    this.page = page;
    this.draw();
    if (upwards) $("count").scrollIntoView({ block: "center" });
  }

  draw() {
    const chosen = $("f-feature").value, most = chosen === "" ? 0 : this.scale(chosen);
    const start = this.page * PAGE, rows = this.found.slice(start, start + PAGE);
    $("low").textContent = most ? `−${number(most, 3)}` : "";
    $("high").textContent = most ? `+${number(most, 3)}, the largest of all` : "nothing is shaded";
    $("count").textContent = rows.length
      ? `${start + 1} to ${start + rows.length} of ${this.found.length.toLocaleString("en")}`
      : "No rollout is like that.";
    for (const id of ["previous", "previous2"]) $(id).disabled = this.page === 0;
    for (const id of ["next", "next2"]) $(id).disabled = start + PAGE >= this.found.length;
    $("list").replaceChildren(...rows.map((row) => this.card(row, chosen, most)));
  }

  card(row, chosen, most) {
    const run = this.runs[row.run];
    const verdict = row.right === null ? ["unknown", "quiet", "? not verified"] : row.right ? ["right", "good", "✓ right"] : ["wrong", "bad", "✗ wrong"];
    const facts = [`${run.name}`, `${row.set === "test" ? "test question" : "training"}, step ${row.step}`, `${row.tokens.length + row.more} tokens`];
    const head = h("div", { className: "head" }, h("b", { className: verdict[1], textContent: verdict[2] }),
      row.reward === null ? h("span", { className: "quiet", textContent: "not rewarded" }) : h("b", { textContent: `reward ${number(row.reward)}` }),
      row.advantage === null ? null : h("span", { textContent: `advantage ${number(row.advantage, 3)}` }),
      ...facts.map((fact) => h("span", { className: "quiet", textContent: fact })));
    const value = h("div", { className: "value", "aria-live": "polite" });
    const card = h("li", { className: `card ${verdict[0]}`, tabIndex: -1 }, head);
    if (row.prompt !== null) card.append(h("div", { className: "prompt", textContent: visible(this.prompts[row.prompt]).replaceAll("↵", "") }));
    card.append(this.shaded(row, chosen, most, value), value,
      h("div", {}, h("span", { className: "quiet", textContent: "gold answer: " }), row.gold === null ? h("span", { className: "quiet", textContent: "not recorded" }) : h("b", { textContent: visible(row.gold) })));
    if (row.flags.length) card.append(h("div", { className: "flags", textContent: `⚑ ${row.dropped ? "dropped. " : ""}${row.flags.join("; ")}` }));
    const parts = { ...(row.rewards ?? {}), ...(row.parts ?? {}) };
    if (Object.keys(parts).length) {
      const list = h("dl");
      for (const [name, part] of Object.entries(parts)) list.append(h("dt", { textContent: name }), h("dd", { textContent: number(part) }));
      card.append(h("details", {}, h("summary", { className: "quiet", textContent: "rewards and their parts" }), list));
    }
    return card;
  }

  shaded(row, chosen, most, value) {
    const values = this.reading(row, chosen), unread = new Set(row.unread);
    const box = h("div", { className: "tokens", tabIndex: 0, dir: "auto", role: "group", "aria-label": "completion; arrow keys step through its tokens" });
    row.tokens.forEach((token, place) => {
      const span = h("span", { textContent: visible(this.tokens[token]) });
      span.dataset.t = place;
      const shade = most && values && values[place] ? Math.min(1, Math.abs(values[place]) / most) : 0;
      if (unread.has(place)) span.className = "unread";
      else if (shade > 0) {
        span.className = values[place] > 0 ? "up" : "down";
        span.style.setProperty("--a", (0.1 + 0.9 * shade).toFixed(3));
      }
      box.append(span);
    });
    if (row.more) box.append(h("span", { className: "unread", textContent: ` … ${row.more} more tokens were not recorded` }));
    const tell = (place) => {
      box.querySelector(".here")?.classList.remove("here");
      box.dataset.at = place;
      box.children[place].classList.add("here");
      value.textContent = this.said(row, place, values, chosen);
    };
    const at = () => Number(box.dataset.at ?? 0);
    for (const kind of ["pointerover", "click"]) box.addEventListener(kind, (event) => event.target.dataset.t && tell(Number(event.target.dataset.t)));
    box.addEventListener("focus", () => row.tokens.length && box.matches(":focus-visible") && tell(at()));
    box.addEventListener("keydown", (event) => {
      const last = row.tokens.length - 1;
      const to = { ArrowRight: Math.min(last, at() + 1), ArrowLeft: Math.max(0, at() - 1), Home: 0, End: last }[event.key];
      if (to === undefined || last < 0) return;
      event.preventDefault();
      tell(to);
    });
    return box;
  }

  said(row, place, values, chosen) {
    const token = `token ${place + 1} of ${row.tokens.length} ${JSON.stringify(this.tokens[row.tokens[place]])}`;
    if (row.unread.includes(place)) return `${token}: not read`;
    const found = [];
    if (values) {
      const [r, k] = chosen.split("/");
      found.push(`${k === undefined ? "r_t" : this.readouts[r].labels[k]} = ${number(values[place])}`);
    }
    for (const [r, read] of Object.entries(row.readings)) {
      const here = Object.entries(read.features)
        .map(([k, [places, there]]) => [this.readouts[r].labels[k], there[places.indexOf(place)]])
        .filter(([, x]) => x !== undefined).sort((a, b) => Math.abs(b[1]) - Math.abs(a[1])).slice(0, 3);
      if (here.length) found.push(`largest of ${this.readouts[r].name}: ${here.map(([label, x]) => `${label} ${number(x, 3)}`).join(", ")}`);
    }
    return `${token}: ${found.join("; ") || "nothing fires"}`;
  }

  key(event) {
    if (event.ctrlKey || event.metaKey || event.altKey || /^(INPUT|SELECT|TEXTAREA)$/.test(event.target.tagName)) return;
    const cards = [...$("list").children], at = cards.indexOf(event.target.closest(".card"));
    if (event.key === "/") $("f-text").focus();
    else if (event.key === "j" || event.key === "k") {
      const card = cards[Math.min(cards.length - 1, Math.max(0, at + (event.key === "j" ? 1 : -1)))];
      card?.scrollIntoView({ block: "nearest" });
      card?.querySelector(".tokens").focus();
    } else if (event.key === "n" || event.key === "p") this.turn(event.key === "n" ? 1 : -1);
    else return;
    event.preventDefault();
  }
}

// -- charts ---------------------------------------------------------------------------------------------------------

class Charts {
  constructor(data) {
    this.data = data;
    this.hidden = new Set();
    this.drawn = new Set();
    data.arms.forEach((arm, k) => {
      const box = h("input", { type: "checkbox", checked: true });
      box.addEventListener("input", () => {
        this.hidden[box.checked ? "delete" : "add"](arm);
        this.again();
      });
      const swatch = h("i");
      swatch.style.background = this.colour(k);
      $("arms")?.append(h("label", {}, box, swatch, arm));
    });
    // Only what comes into view is drawn, and again where the theme changes.
    this.seen = new IntersectionObserver((entries) => entries.filter((e) => e.isIntersecting).forEach((e) => this.draw(e.target)), { rootMargin: "300px" });
    document.querySelectorAll(".plot").forEach((plot) => this.seen.observe(plot));
    matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => this.again());
  }

  colour(k) {
    return k === 0 ? "var(--ink)" : COLOURS[(k - 1) % COLOURS.length];
  }

  again() {
    for (const plot of this.drawn) this.draw(plot);
  }

  draw(plot) {
    this.seen.unobserve(plot);
    this.drawn.add(plot);
    const css = getComputedStyle(document.documentElement), theme = (name) => css.getPropertyValue(name).trim();
    this.ink = theme("--ink");
    const { traces, layout } = plot.dataset.pack === undefined ? this.curve(plot) : this.pack(plot, theme);
    const axis = { gridcolor: theme("--line"), linecolor: theme("--line"), zerolinecolor: theme("--line"), automargin: true };
    const title = (text) => ({ text, font: { size: 11 }, standoff: 6 });
    Plotly.react(plot, traces, {
      margin: { l: 8, r: 10, t: 8, b: 8 }, paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)", showlegend: false,
      font: { color: theme("--quiet"), size: 11, family: "system-ui, sans-serif" }, dragmode: false, hovermode: "closest",
      hoverlabel: { bgcolor: theme("--card"), bordercolor: theme("--line"), font: { color: theme("--ink") }, namelength: -1 },
      ...layout,
      xaxis: { ...axis, fixedrange: true, ...layout.xaxis, title: title(layout.xaxis.title) },
      yaxis: { ...axis, fixedrange: true, nticks: 5, ...layout.yaxis, ...(layout.yaxis?.title ? { title: title(layout.yaxis.title) } : {}) },
    }, { displayModeBar: false, responsive: true });
  }

  curve(plot) {
    const group = this.data.curves[plot.closest("details").dataset.group], chart = group.charts[plot.dataset.chart];
    const traces = [];
    this.data.arms.forEach((arm, k) => {
      const series = chart.arms[arm];
      if (series === undefined || this.hidden.has(arm)) return;
      const colour = k === 0 ? this.ink : this.colour(k), name = arm.replaceAll("<", "‹").replaceAll(">", "›");
      if (Math.max(...series.runs) > 1)
        traces.push({ x: [...series.steps, ...series.steps.toReversed()], y: [...series.high, ...series.low.toReversed()],
          fill: "toself", fillcolor: colour, opacity: 0.16, line: { width: 0 }, mode: "lines", hoverinfo: "skip" });
      traces.push({ x: series.steps, y: series.mean, mode: series.steps.length > 12 ? "lines" : "lines+markers", name,
        line: { color: colour, width: k === 0 ? 2.4 : 1.8, dash: DASHES[Math.floor(k / 11) % DASHES.length] }, marker: { size: 5, color: colour },
        customdata: series.runs.map((n, i) => `${number(series.low[i], 3)} to ${number(series.high[i], 3)} over ${n} run${n === 1 ? "" : "s"}`),
        hovertemplate: "step %{x}: %{y:.4~g}<br>%{customdata}<extra>%{fullData.name}</extra>" });
    });
    return { traces, layout: { xaxis: { title: "step" } } };
  }

  pack(plot, theme) {
    const pack = this.data.packs[plot.dataset.pack], hot = `rgb(${theme("--hot")})`;
    if (plot.dataset.what === "null") {
      const line = (x, dash) => ({ type: "line", x0: x, x1: x, yref: "paper", y0: 0, y1: 1, line: { color: this.ink, width: 2, dash } });
      const note = (x, text, y) => ({ x, y, yref: "paper", text, showarrow: false, xanchor: "right", xshift: -4, font: { color: this.ink, size: 11 } });
      return {
        traces: [{ type: "histogram", x: pack.null, marker: { color: hot }, nbinsx: 24, hovertemplate: "%{x}: %{y} draws<extra></extra>" }],
        layout: { bargap: 0.06, shapes: [line(pack.observed, "solid"), line(pack.q95, "dot")],
          annotations: [note(pack.observed, "observed", 1), note(pack.q95, "95 %", 0.86)],
          xaxis: { title: "|Spearman|", rangemode: "tozero" }, yaxis: { title: "draws" } },
      };
    }
    if (plot.dataset.what === "curve") {
      const bars = pack.curve;
      return {
        traces: [{ x: bars.map((b) => b.reading), y: bars.map((b) => b.share), mode: "lines+markers", line: { color: hot }, marker: { color: hot, size: 7 },
          customdata: bars.map((b) => b.n), hovertemplate: "reading %{x:.4~g}: %{y:.1%} of %{customdata}<extra></extra>" }],
        layout: { shapes: [{ type: "line", xref: "paper", x0: 0, x1: 1, y0: pack.share, y1: pack.share, line: { color: theme("--quiet"), dash: "dot", width: 1 } }],
          xaxis: { title: "mean reading of the tenth" }, yaxis: { range: [0, 1.02], tickformat: ".0%", title: "with the behaviour" } },
      };
    }
    return {
      traces: [{ x: pack.quantiles, y: pack.quantiles.map((_, i) => i / 100), mode: "lines", line: { color: hot, width: 2 },
        hovertemplate: "%{y:.0%} read below %{x:.4~g}<extra></extra>" }],
      layout: { xaxis: { title: "reading" }, yaxis: { range: [0, 1.02], tickformat: ".0%", title: "of the rollouts" } },
    };
  }
}

async function main() {
  if (typeof DecompressionStream === "undefined") throw new Error("this browser is older than 2023 and cannot unpack the page's data");
  const data = JSON.parse(await unpacked("data"));
  if ($("list")) window.rolloutBrowser = new Browser(data.rollouts);
  document.body.dataset.rollouts = "ready";
  document.head.append(h("script", { textContent: await unpacked("plotly") }));
  window.charts = new Charts(data);
  document.body.dataset.ready = "yes";
}

main().catch((error) => {
  $("problem").hidden = false;
  $("problem").textContent = `The curves and rollouts cannot be shown: ${error.message}.`;
  throw error;
});
