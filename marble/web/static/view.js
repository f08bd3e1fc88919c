// Words and pictures: pure functions of what the node said, and the drawing of one chart. No request is made here.

export const el = (name, attributes = {}, ...children) => {
  const made = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) {
    if (value === null || value === undefined || value === false) continue;
    made.setAttribute(key, value);
  }
  // Text goes in as text: what a node says is never markup.
  made.append(...children.filter((child) => child !== null && child !== undefined));
  return made;
};

const svg = (name, attributes = {}) => {
  const made = document.createElementNS("http://www.w3.org/2000/svg", name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  return made;
};

export const count = (n) => {
  if (n >= 1e9) return `${trim(n / 1e9)} G`;
  if (n >= 1e6) return `${trim(n / 1e6)} M`;
  if (n >= 1e4) return `${trim(n / 1e3)} k`;
  return n >= 100 || Number.isInteger(n) ? Math.round(n).toLocaleString("en") : trim(n);
};

export const bytes = (n) => {
  for (const unit of ["B", "KiB", "MiB", "GiB"]) {
    if (n < 1024) return `${unit === "B" ? Math.round(n) : trim(n)} ${unit}`;
    n /= 1024;
  }
  return `${trim(n)} TiB`;
};

export const seconds = (s) => {
  if (s <= 0) return "–";
  if (s < 1e-3) return `${trim(s * 1e6)} µs`;
  if (s < 1) return `${trim(s * 1e3)} ms`;
  return `${trim(s)} s`;
};

export const duration = (s) => {
  if (s < 60) return `${Math.floor(s)} s`;
  if (s < 3600) return `${Math.floor(s / 60)} min`;
  if (s < 172800) return `${Math.floor(s / 3600)} h ${Math.floor((s % 3600) / 60)} min`;
  return `${Math.floor(s / 86400)} days`;
};

const trim = (n) => {
  const digits = n >= 100 ? 0 : n >= 10 ? 1 : 2;
  return String(Number(n.toFixed(digits)));
};

// A round number at or above n: the top of an axis.
const roof = (n) => {
  const decade = 10 ** Math.floor(Math.log10(n));
  return [1, 2, 2.5, 5, 10].map((step) => step * decade).find((step) => step >= n * 0.999);
};

export const headline = (node) => {
  if (!node.term && node.term !== 0) return "The engine has not answered yet";
  if (!node.leader_id) return "No leader";
  const alone = node.leader_id === node.node_id && node.members?.length === 1 && !node.learners?.length;
  return alone ? "Alone, and leading" : `Node ${node.leader_id} leads`;
};

export const subline = (node, peers) => {
  if (node.term === undefined) return "";
  const votes = (node.members ?? []).length;
  const learners = (node.learners ?? []).length;
  const parts = [`term ${node.term.toLocaleString("en")}`];
  if (node.joint) parts.push("members are changing");
  if (votes > 1 || learners) parts.push(`${votes} ${votes === 1 ? "vote" : "votes"}${learners ? `, ${learners} without` : ""}`);
  if (peers.length > 1) parts.push(node.role === "leader" ? "you are looking at it" : `seen from node ${node.node_id}, a ${node.role}`);
  return parts.join("  ·  ");
};

export const says = (peer, leads) => {
  if (peer.leads) return [peer.here ? "writes go here" : "leads", ""];
  if (peer.lag === null) return ["", peer.here ? "this node" : peer.connected ? "connected" : peer.connected === false ? "not reached" : "not known"];
  if (peer.state === "snapshot") return ["a snapshot", "is on its way"];
  if (peer.lag === 0) return ["up to date", ""];
  return [`${count(peer.lag)} ${peer.lag === 1 ? "entry" : "entries"}`, leads ? "behind" : "to apply"];
};

// How much of the bar is filled: whole when next to nothing is missing, less with each digit of what is.
export const filled = (lag) => Math.max(0.04, 1 - Math.log10(1 + lag / 20) / 6);

const PAD = { left: 2, right: 2, top: 16, bottom: 18 };
const GAP_S = 3.5;

// One chart in one figure. `lines`: [{key, name}], the first of which is filled; `format` makes words of numbers. With `empty`, a
// zero means that there was nothing to measure, and these words say so where there is nothing else.
export class Chart {
  constructor(title, unit, lines, format, empty = null) {
    Object.assign(this, { unit, lines, format, empty, hover: null, known: lines.map(() => true) });
    this.value = el("p", { class: "now" }, "–");
    this.svg = svg("svg", { role: "img", "aria-label": title });
    this.keys = lines.length > 1 ? lines.map((line, i) => el("span", { class: i ? "two" : "one" }, line.name)) : [];
    this.root = el("figure", { class: "card chart" }, el("h3", {}, title, el("span", { class: "key" }, ...this.keys)), this.value, this.svg);
    this.svg.addEventListener("pointermove", (event) => this.point(event.offsetX));
    this.svg.addEventListener("pointerleave", () => this.point(null));
  }

  point(x) {
    this.hover = x;
    if (this.last) this.draw(...this.last);
  }

  draw(moments, now, span) {
    this.last = [moments, now, span];
    // A node that is young fills the picture all the same.
    span = Math.min(span, Math.max(60, now - (moments.at[0] ?? now)));
    const width = this.svg.clientWidth || 300;
    const height = this.svg.clientHeight || 120;
    const inner = { w: width - PAD.left - PAD.right, h: height - PAD.top - PAD.bottom };
    const from = moments.at.findIndex((at) => at >= now - span);
    const times = from < 0 ? [] : moments.at.slice(from);
    const series = this.lines.map((line, i) => (from < 0 || !this.known[i] ? [] : moments[line.key].slice(from)));
    this.keys.forEach((key, i) => (key.hidden = !this.known[i]));
    const top = roof(Math.max(...series.flat(), this.lines[0].floor ?? 1e-9));
    const x = (at) => PAD.left + inner.w * (1 - (now - at) / span);
    const y = (value) => PAD.top + inner.h * (1 - value / top);
    const base = PAD.top + inner.h;
    const drawn = [];
    for (const level of [0, 0.5, 1]) {
      drawn.push(svg("line", { class: "grid", x1: PAD.left, x2: width - PAD.right, y1: Math.round(y(level * top)) + 0.5, y2: Math.round(y(level * top)) + 0.5 }));
    }
    drawn.push(label(PAD.left, PAD.top - 5, this.format(top), "start"));
    drawn.push(label(PAD.left, height - 3, `${duration(Math.round(span))} ago`, "start"));
    drawn.push(label(width - PAD.right, height - 3, "now", "end"));
    series.forEach((values, i) => {
      if (!values.length) return;
      for (const run of runs(times, this.empty ? values : null)) {
        const points = run.map((k) => `${x(times[k]).toFixed(1)},${y(values[k]).toFixed(1)}`);
        if (i === 0) {
          const area = `M${x(times[run[0]]).toFixed(1)},${base}L${points.join("L")}L${x(times[run.at(-1)]).toFixed(1)},${base}Z`;
          drawn.push(svg("path", { class: "fill", d: area }));
        }
        drawn.push(svg("path", { class: `stroke ${i ? "two" : "one"}`, d: `M${points.join("L")}${run.length === 1 ? "h0.1" : ""}` }));
      }
    });
    const at = this.hover === null ? times.length - 1 : nearest(times, now - span * (1 - (this.hover - PAD.left) / inner.w));
    if (this.hover !== null && at >= 0) {
      drawn.push(svg("line", { class: "cursor", x1: x(times[at]), x2: x(times[at]), y1: PAD.top, y2: base }));
      series.forEach((values, i) => values.length && drawn.push(svg("circle", { class: `point ${i ? "two" : "one"}`, cx: x(times[at]), cy: y(values[at]), r: 4 })));
    }
    const nothing = this.empty !== null && !series.flat().some((value) => value > 0);
    if (nothing) drawn.push(label(width / 2, PAD.top + inner.h / 2 + 4, this.empty, "middle"));
    this.svg.replaceChildren(...drawn);
    const fresh = at >= 0 && (this.hover !== null || now - times[at] < GAP_S);
    const words = fresh && !nothing ? series.filter((values) => values.length).map((values) => this.format(values[at])) : ["–"];
    const when = this.hover !== null && at >= 0 ? ` ${duration(Math.max(0, now - times[at]))} ago` : "";
    this.value.replaceChildren(words.join(" / "), el("small", {}, ` ${this.unit}${when}`));
  }
}

const label = (x, y, words, anchor) => {
  const made = svg("text", { x, y, "text-anchor": anchor });
  made.textContent = words;
  return made;
};

// Places in `times` that belong together: where the node was not looked at, or there was nothing to measure, the line breaks.
const runs = (times, measured) => {
  const found = [];
  let last = -Infinity;
  times.forEach((at, k) => {
    if (measured !== null && !measured[k]) return;
    if (at - last <= GAP_S) found.at(-1).push(k);
    else found.push([k]);
    last = at;
  });
  return found;
};

const nearest = (times, at) => {
  let best = -1;
  times.forEach((each, k) => {
    if (best < 0 || Math.abs(each - at) < Math.abs(times[best] - at)) best = k;
  });
  return best;
};
