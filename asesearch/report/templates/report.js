"use strict";
// Sorts and downloads tables, and makes the front one can choose points on. Without it the page
// shows the same tables and the figures as drawn. All text goes in as text, never as HTML.
(function () {
  const byId = (id) => document.getElementById(id);
  const say = (text) => { byId("live").textContent = text; };

  function make(tag, attributes, ...children) {
    const svg = ["svg", "rect", "text", "title", "line", "path"].includes(tag);
    const node = svg ? document.createElementNS("http://www.w3.org/2000/svg", tag)
      : document.createElement(tag);
    for (const [key, value] of Object.entries(attributes || {})) node.setAttribute(key, value);
    for (const child of children) node.append(child);
    return node;
  }

  // -- tables -------------------------------------------------------------------------------

  const NUMBER = /^[+−-]?\d+(\.\d+)?(e[+-]?\d+)?(\s*[±…].*)?\s*[×%]?$/;

  function valueOf(text) {
    const plain = text.trim().replace(/\u00a0/g, " ");
    return NUMBER.test(plain) ? parseFloat(plain.replace("−", "-")) : NaN;
  }

  function sortBy(table, header, column) {
    const up = header.getAttribute("aria-sort") !== "ascending";
    const body = table.tBodies[0];
    const rows = [...body.rows].map((row) => {
      const text = row.cells[column].textContent;
      return { row, text, value: valueOf(text) };
    });
    const numeric = rows.some((r) => !Number.isNaN(r.value));
    rows.sort((a, b) => {
      if (numeric) {
        if (Number.isNaN(a.value) || Number.isNaN(b.value)) {
          return Number.isNaN(a.value) - Number.isNaN(b.value); // what has no number goes last
        }
        return up ? a.value - b.value : b.value - a.value;
      }
      const order = a.text.localeCompare(b.text, "en", { numeric: true });
      return up ? order : -order;
    });
    body.append(...rows.map((r) => r.row));
    for (const other of table.tHead.rows[0].cells) other.setAttribute("aria-sort", "none");
    header.setAttribute("aria-sort", up ? "ascending" : "descending");
    say(`Sorted by ${header.textContent.trim()}, ${up ? "ascending" : "descending"}`);
  }

  function csvOf(table) {
    const quote = (text) => (/[",\n]/.test(text) ? `"${text.replace(/"/g, '""')}"` : text);
    return [...table.rows].map((row) => [...row.cells]
      .map((cell) => quote(cell.textContent.trim().replace(/\u00a0/g, " "))).join(",")).join("\n") + "\n";
  }

  function download(name, text) {
    const url = URL.createObjectURL(new Blob([text], { type: "text/csv;charset=utf-8" }));
    const link = make("a", { href: url, download: name });
    link.click();
    setTimeout(() => URL.revokeObjectURL(url), 1000);
    say(`${name} downloaded`);
  }

  function enhance(region) {
    const table = region.querySelector("table");
    if (!table.tBodies[0].rows.length) return;
    if (!region.classList.contains("text")) {
      [...table.tHead.rows[0].cells].forEach((header, column) => {
        const button = make("button", { type: "button", class: "sort" }, header.textContent);
        header.replaceChildren(button);
        header.setAttribute("aria-sort", "none");
        button.addEventListener("click", () => sortBy(table, header, column));
      });
    }
    const label = region.getAttribute("aria-label");
    const name = label.toLowerCase().replace(/[^a-z0-9]+/g, "-") + ".csv";
    const button = make("button", { type: "button", "aria-label": `Download as CSV: ${label}` },
      "Download as CSV");
    button.addEventListener("click", () => download(name, csvOf(table)));
    region.after(make("p", { class: "tools" }, button));
  }

  // -- words --------------------------------------------------------------------------------

  // an axis's title, which Plotly does not break: as high as the chart at most
  const lines = (text) => text.match(/.{1,40}(?= |$)|.{1,40}/g)
    .map((line) => escaped(line.trim())).join("<br>");
  const minus = (text) => text.replace("-", "−");

  function digits(value, error) {
    if (value === null) return "–";
    if (!error) return minus(Number(value.toPrecision(4)).toString());
    return minus(value.toFixed(Math.max(0, 1 - Math.floor(Math.log10(error)))));
  }

  const plusMinus = (value, error) => (error ? `${digits(value, error)} ± ${digits(error, error)}`
    : digits(value));
  const relative = (frac) => (frac === null ? "–" : `${frac.toFixed(2)}×`);
  // a measured time that block calls can't explain is no speed-up
  const both = (p, kind) => `${relative(p.time)} the ${kind.unit}`
    + (kind.unit !== "time" ? "" : `, ${speedUp(p)}`);
  const speedUp = (p) => (p.credited === p.time ? "" : "better than its block calls can explain: at best ")
    + `${(1 / p.credited).toFixed(2)}× as fast`;

  // -- the front ----------------------------------------------------------------------------

  const SYMBOLS = ["circle", "triangle-up", "square", "diamond", "cross", "star", "triangle-down",
    "x", "pentagon", "triangle-left", "triangle-right", "hexagram", "bowtie", "hourglass"];

  class Explorer {
    constructor(data) {
      this.data = data;
      this.kind = Object.keys(data.kinds)[0];
      this.number = data.chosen;
      this.samplers = [...new Set(Object.values(data.trials).map((t) => t.sampler))];
      this.chart = byId("chart");
      byId("explorer").hidden = false;
      this.makeKinds();
      byId("point").addEventListener("change", (e) => this.choose(Number(e.target.value)));
      byId("faster").addEventListener("click", () => this.move(-1, true));
      byId("slower").addEventListener("click", () => this.move(1, true));
      byId("copy").addEventListener("click", () => this.copy());
      this.chart.addEventListener("keydown", (e) => this.key(e));
      matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => this.draw());
      this.show();
      this.chart.on("plotly_click", (event) => {
        const number = event.points[0].customdata;
        if (number !== undefined && number !== null) this.choose(number);
      });
    }

    get points() { return this.data.kinds[this.kind].points; }

    get front() { return this.points.filter((p) => p.front); }

    get point() { return this.points.find((p) => p.number === this.number); }

    makeKinds() {
      const names = Object.keys(this.data.kinds);
      byId("kinds").hidden = names.length < 2;
      for (const name of names) {
        const input = make("input", { type: "radio", name: "kind", value: name });
        input.checked = name === this.kind;
        input.addEventListener("change", () => { this.kind = name; this.show(); });
        byId("kinds").append(make("label", {}, input, ` ${this.data.kinds[name].title}`));
      }
    }

    // Everything anew: another kind of scores.
    show() {
      if (!this.point) this.number = (this.front[0] || this.points[0]).number;
      const select = byId("point");
      const group = (label, points) => {
        const node = make("optgroup", { label });
        for (const p of points) {
          node.append(make("option", { value: p.number }, this.line(p)));
        }
        return node;
      };
      const rest = this.points.filter((p) => !p.front);
      select.replaceChildren(group("Front, fastest first", this.front));
      if (rest.length) select.append(group("Off the front", rest));
      this.draw();
      this.detail();
    }

    line(p) {
      const trial = this.data.trials[p.number];
      return `${trial.label}: ${plusMinus(p.quality, p.error)} at ${relative(p.time)}`;
    }

    choose(number) {
      this.number = number;
      this.draw();
      this.detail();
      const p = this.point;
      say(`${this.data.trials[p.number].label}: ${plusMinus(p.quality, p.error)} at ${both(p, this.data.kinds[this.kind])}; against the full network: ${p.verdict}`);
    }

    move(step, frontOnly) {
      const among = frontOnly ? this.front : this.points;
      const now = this.point.credited;
      const place = among.findIndex((p) => p.number === this.number);
      let next = place + step;
      if (place < 0) { // off the front: to its neighbour there
        const after = among.findIndex((p) => p.credited > now);
        next = step > 0 ? after : (after < 0 ? among.length : after) - 1;
      }
      if (next >= 0 && next < among.length) this.choose(among[next].number);
    }

    key(event) {
      const step = { ArrowRight: 1, ArrowUp: 1, ArrowLeft: -1, ArrowDown: -1 }[event.key];
      const ends = { Home: 0, End: this.front.length - 1 }[event.key];
      if (step === undefined && ends === undefined) return;
      event.preventDefault();
      if (step !== undefined) this.move(step, !event.shiftKey);
      else this.choose(this.front[ends].number);
    }

    // Points that can't be told apart from the chosen one: the interval of the difference, repeat
    // by repeat, holds 0. Nothing is known from one repeat.
    alike() {
      const { factor } = this.data.kinds[this.kind];
      if (!factor) return null;
      const own = this.point.values;
      return this.points.filter((p) => {
        if (p.number === this.number) return false;
        const d = p.values.map((v, i) => v - own[i]);
        const mean = d.reduce((a, b) => a + b, 0) / d.length;
        const square = d.reduce((a, b) => a + (b - mean) ** 2, 0);
        return Math.abs(mean) <= factor * Math.sqrt(square / (d.length - 1) / d.length);
      });
    }

    hover(p) {
      const trial = this.data.trials[p.number];
      const depths = trial.depths.join(" ");
      return [`<b>${escaped(trial.label)}</b>`,
        `${escaped(this.data.kinds[this.kind].metric)} ${plusMinus(p.quality, p.error)}`,
        both(p, this.data.kinds[this.kind]),
        `blocks, data to noise: ${depths.length > 44 ? depths.slice(0, 42) + "…" : depths}`,
        escaped(trial.sampler)].join("<br>");
    }

    marks(points, name, marker, more) {
      return {
        type: "scatter",
        mode: "markers",
        name,
        x: points.map((p) => p.time),
        y: points.map((p) => p.quality),
        customdata: points.map((p) => p.number),
        text: points.map((p) => this.hover(p)),
        hovertemplate: "%{text}<extra></extra>",
        marker: {
          symbol: points.map((p) => SYMBOLS[
            this.samplers.indexOf(this.data.trials[p.number].sampler) % SYMBOLS.length]),
          ...marker,
        },
        ...more,
      };
    }

    draw() {
      const style = getComputedStyle(document.documentElement);
      const colour = (name) => style.getPropertyValue(`--${name}`).trim();
      const kind = this.data.kinds[this.kind];
      const isFull = (p) => p.number === this.data.full;
      const rest = this.points.filter((p) => !p.front && !isFull(p));
      const line = { shape: "hv", color: colour("accent"), width: 2 };
      const traces = [{
        type: "scatter", mode: "lines", name: "front line", showlegend: false, hoverinfo: "skip",
        x: this.front.map((p) => p.credited), y: this.front.map((p) => p.quality), line,
      }];
      for (const level of ["best", "worst"].filter((name) => kind.attained[name])) {
        const corners = kind.attained[level];
        traces.push({
          type: "scatter", mode: "lines", name: "best and worst repeat", hoverinfo: "skip",
          x: corners[0], y: corners[1], legendgroup: "repeats", showlegend: level === "best",
          line: { shape: "hv", color: colour("soft"), width: 1, dash: "dot" },
        });
      }
      const bars = (points) => ({
        error_y: { array: points.map((p) => p.error || 0), thickness: 1, width: 3 },
        error_x: { array: points.map((p) => p.spread || 0), thickness: 1, width: 3 },
      });
      const onFront = this.front.filter((p) => !isFull(p));
      const full = this.points.filter(isFull);
      if (rest.length) {
        traces.push(this.marks(rest, "off the front", { color: colour("soft"), size: 7, opacity: 0.6 }));
      }
      traces.push(this.marks(onFront, "front", { color: colour("accent"), size: 10 }, bars(onFront)));
      traces.push(this.marks(full, "full network", { color: colour("full"), size: 11 }, bars(full)));
      const alike = this.alike();
      const ring = (points, name, c, size) => this.marks(points, name, {
        color: colour(c), size, line: { color: colour(c), width: 2 }, symbol: "circle-open",
      }, { hoverinfo: "skip", hovertemplate: undefined, text: undefined });
      if (alike) traces.push(ring(alike, "not told apart from it", "same", 16));
      traces.push(ring([this.point], "chosen", "text", 22));
      const axis = { gridcolor: colour("line"), zerolinecolor: colour("line"), automargin: true };
      const all = this.points.map((p) => p.quality);
      const log = Math.min(...all) > 0 && Math.max(...all) > 4 * Math.min(...all);
      Plotly.react(this.chart, traces, {
        paper_bgcolor: "rgba(0,0,0,0)",
        plot_bgcolor: "rgba(0,0,0,0)",
        font: { color: colour("text"), family: getComputedStyle(document.body).fontFamily, size: 13 },
        margin: { l: 10, r: 14, t: 10, b: 10 },
        xaxis: { ...axis, ticksuffix: "×", title: { text: `relative ${kind.cost.replace("Sampling", "sampling")}` } },
        yaxis: { ...axis, type: log ? "log" : "linear", title: { text: lines(`${kind.metric} (lower is better)`) } },
        legend: { orientation: "h", yref: "container", y: 0, yanchor: "bottom", font: { size: 12 } },
        hoverlabel: { align: "left", bgcolor: colour("card"), bordercolor: colour("accent"), font: { color: colour("text") } },
        hovermode: "closest",
        uirevision: this.kind, // zoom and legend stay as they are
        dragmode: matchMedia("(pointer: coarse)").matches ? false : "zoom",
      }, { responsive: true, displaylogo: false, displayModeBar: false });
    }

    // -- the chosen point ----------------------------------------------------------------------

    detail() {
      const p = this.point;
      const trial = this.data.trials[p.number];
      const kind = this.data.kinds[this.kind];
      byId("point").value = String(p.number);
      byId("faster").disabled = !this.front.some((q) => q.credited < p.credited);
      byId("slower").disabled = !this.front.some((q) => q.credited > p.credited);
      byId("detail-title").textContent = trial.label;
      const facts = [
        [kind.metric, `${plusMinus(p.quality, p.error)} (${kind.title.toLowerCase()})`],
        [kind.cost, both(p, kind)],
        ["Against the full network", p.difference === null ? p.verdict
          : `${p.verdict} (${p.difference > 0 ? "+" : ""}${plusMinus(p.difference, p.margin)})`],
        ["Not told apart from", this.aliases()],
        ["Sampler", trial.sampler],
        ["Blocks, data to noise", trial.schedule],
      ];
      byId("facts").replaceChildren(...facts.flatMap(([term, text]) => [
        make("dt", {}, term), make("dd", {}, text)]));
      byId("schedule-drawn").replaceChildren(this.schedule(trial));
      this.bound(p, trial);
      this.samples(p, trial);
      byId("command").textContent = trial.command;
      byId("copy").hidden = !trial.kept;
      byId("command-note").textContent = trial.kept ? ""
        : "Its weights are not kept: they were off the front. "
          + "A search with keep_weights = \"all\" keeps them.";
    }

    aliases() {
      const alike = this.alike();
      if (!alike) return "unknown (one repeat)";
      const name = (p) => this.data.trials[p.number].label;
      const front = alike.filter((p) => p.front).map(name);
      const rest = alike.length - front.length;
      const parts = [];
      if (front.length) parts.push(front.join("; "));
      if (rest) parts.push(`${rest} off the front`);
      return parts.join(" and ") || "none: it differs from every other point";
    }

    schedule(trial) {
      const [width, height, left] = [360, 132, 26];
      const { depths, edges } = trial;
      const end = edges[edges.length - 1];
      const words = depths.map((d, i) => `${d} from ${edges[i]} to ${edges[i + 1]}`).join(", ");
      const svg = make("svg", {
        viewBox: `0 0 ${width} ${height}`, role: "img",
        "aria-label": `Blocks run of ${trial.depth} at each timestep: ${words}`,
      });
      const x = (t) => left + (t / end) * (width - left - 4);
      const y = (d) => 8 + (1 - d / trial.depth) * 92;
      svg.append(make("rect", { class: "all", x: x(0), y: y(trial.depth), width: x(end) - x(0), height: y(0) - y(trial.depth) }));
      depths.forEach((d, i) => {
        const [a, b] = [x(edges[i]), x(edges[i + 1])];
        svg.append(make("rect", { class: "run", x: a + 0.5, y: y(d), width: Math.max(0.5, b - a - 1), height: y(0) - y(d) }));
        if (b - a >= 15) svg.append(make("text", { class: "on", x: (a + b) / 2, y: y(0) - 5, "text-anchor": "middle" }, d));
      });
      const label = (text, at, line, anchor) => svg.append(make("text", { x: at, y: line, "text-anchor": anchor }, text));
      label(trial.depth, left - 5, y(trial.depth) + 9, "end");
      label("0", left - 5, y(0), "end");
      label("0 = data", x(0), 116, "start");
      label(`${end} = noise`, x(end), 116, "end");
      label("timestep", (x(0) + x(end)) / 2, 128, "middle");
      return svg;
    }

    bound(p, trial) {
      const rows = [["block calls (the bound)", trial.blocks], ["time, predicted", trial.predicted]];
      if (this.kind === "confirmed") rows.push(["time, measured", p.time, p.credited !== p.time]);
      const most = Math.max(1, ...rows.map((row) => row[1] || 0));
      byId("bound").replaceChildren(...rows.map(([name, frac, unexplained]) => {
        const bar = make("span", { class: "bar", "aria-hidden": "true" });
        const fill = make("span", {});
        fill.style.width = `${(100 * (frac || 0)) / most}%`;
        bar.append(fill);
        const gain = frac === null || unexplained ? "" : ` (${(1 / frac).toFixed(2)}×)`;
        return make("li", {}, make("span", { class: "what" }, name), bar,
          make("span", { class: "value" }, `${relative(frac)}${gain}`));
      }));
      const clock = this.kind === "confirmed" ? p.time : trial.predicted;
      const promised = trial.blocks === null ? 0 : 1 - trial.blocks;
      const saved = 1 - clock > 0 ? `${Math.round((100 * (1 - clock)) / promised)} %` : "nothing";
      const what = this.kind === "confirmed" ? "clock" : "prediction";
      const beyond = p.credited !== p.time
        ? ` That is more than they can explain (the spread of the measured time is ±${(p.spread || 0).toFixed(3)}×): claim the bound.` : "";
      byId("bound-note").textContent = promised > 0 && clock
        ? `Of the time that fewer blocks promise to save the ${what} saves ${saved}.${beyond}` : "";
    }

    samples(p, trial) {
      const { strips, count } = this.data.images;
      const own = strips[p.number];
      const full = strips[this.data.full];
      const box = byId("strips");
      byId("samples-chosen").hidden = !Object.keys(strips).length;
      if (!own) {
        box.replaceChildren(make("p", {}, "The page holds no samples of this point: they are embedded for the front first."));
        return;
      }
      const picture = (strip, alt) => make("img", { src: strip.src, alt, class: "strip" });
      const row = (name, ...nodes) => make("figure", { class: "row" }, make("figcaption", {}, name), ...nodes);
      const rows = [row(trial.label, picture(own, `${count} samples of ${trial.label}`))];
      if (full && p.number !== this.data.full) {
        rows.push(row("full network, the same seeds", picture(full, `${count} samples of the full network for the same seeds`)));
        const mean = own.difference === null ? "" : `: ${(100 * own.difference).toFixed(1)} % of the range on average`;
        rows.push(row(`difference, brightened 3 times${mean}`, make("div", {
          class: "difference", role: "img",
          "aria-label": `Difference between the two rows${mean}`,
        }, picture(own, ""), picture(full, ""))));
      }
      box.replaceChildren(...rows);
    }

    async copy() {
      const text = byId("command").textContent;
      try {
        await navigator.clipboard.writeText(text);
      } catch {
        getSelection().selectAllChildren(byId("command"));
        document.execCommand("copy");
      }
      say("Command copied");
      byId("copy").textContent = "Copied";
      setTimeout(() => { byId("copy").textContent = "Copy"; }, 2000);
    }
  }

  const escaped = (text) => String(text).replace(/[&<>]/g, (c) => ({ "&": "&amp;", "<": "&lt;", ">": "&gt;" }[c]));

  document.documentElement.classList.add("js");
  document.querySelectorAll(".scroll").forEach(enhance);
  const source = byId("report-data");
  if (source && window.Plotly) window.explorer = new Explorer(JSON.parse(source.textContent));
}());
