// Asks the node once a second, remembers the last minutes, and draws. Nothing comes from anywhere but this port.

import { Chart, bytes, count, duration, el, filled, headline, says, seconds, subline } from "/view.js";

const ASK_MS = 1000;
const PATIENCE_MS = 4000;
const KEEP_S = 15 * 60;

const $ = (id) => document.getElementById(id);
const charts = [
  new Chart("Committed", "entries/s", [{ key: "entries", name: "entries", floor: 10 }], count),
  new Chart("A write takes", "", [{ key: "write_p50", name: "median", floor: 1e-3 }, { key: "write_p99", name: "99 %" }], seconds, "nothing is written through this node"),
  new Chart("The log's sync takes", "", [{ key: "sync_p50", name: "median", floor: 1e-3 }, { key: "sync_p99", name: "99 %" }], seconds, "nothing is written to the log"),
  new Chart("Behind", "entries", [{ key: "peer_lag", name: "slowest node", floor: 10 }, { key: "lag", name: "to apply here" }], count),
];
const state = { moments: null, span: 5 * 60, uptime: 0, heard: 0, token: sessionStorage.getItem("marble-token") };

const show = (name, words) => {
  document.body.dataset.state = name;
  $("link-text").textContent = words;
};

const notice = (words) => {
  $("notice").hidden = !words;
  $("notice").textContent = words ?? "";
};

const remember = (fresh, uptime) => {
  const keys = Object.keys(fresh);
  // A node that was started anew counts its seconds from zero again.
  if (state.moments === null || uptime < state.uptime) state.moments = Object.fromEntries(keys.map((key) => [key, []]));
  state.uptime = uptime;
  const old = state.moments;
  const last = old.at.at(-1) ?? -1;
  fresh.at.forEach((at, k) => {
    if (at > last) for (const key of keys) old[key].push(fresh[key][k]);
  });
  const gone = Math.max(0, old.at.findIndex((at) => at > uptime - KEEP_S));
  if (gone) for (const key of keys) old[key].splice(0, gone);
};

const draw = () => {
  if (state.moments === null) return;
  // How far the others are, only a leader knows.
  charts[3].known = state.moments.role.at(-1) === "leader" ? [true, true] : [false, true];
  const now = state.uptime + (performance.now() - state.heard) / 1000;
  const shown = document.body.dataset.state === "lost" ? now : state.uptime;
  for (const chart of charts) chart.draw(state.moments, shown, state.span);
};

const drawVerdict = (health) => {
  const ailing = Object.entries(health.components).filter(([name, part]) => !part.healthy && !name.includes("/"));
  const lines = ailing.slice(0, 4).map(([name, part]) => el("p", {}, el("i", { class: "dot bad" }), el("span", {}, el("b", {}, name), ` ${part.detail}`)));
  if (!ailing.length) lines.push(el("p", {}, el("i", { class: "dot good" }), "All is well"));
  $("verdict").replaceChildren(...lines);
};

const drawNodes = (node, peers) => {
  const leads = node.role === "leader";
  $("nodes-note").textContent = leads || peers.length < 2 ? "" : "How far the others are, the leader knows.";
  const items = peers.map((peer) => {
    const ok = peer.here ? true : peer.connected;
    const name = peer.page && !peer.here ? el("a", { href: peer.page }, `Node ${peer.node}`) : el("b", {}, `Node ${peer.node}`);
    const badge = peer.leads ? "leader" : peer.part !== "voter" ? peer.part : peer.here ? "you are here" : "";
    const lag = peer.lag ?? (peer.here ? Math.max(0, node.commit_index - node.applied_index) : null);
    const bar = el("i");
    if (lag !== null) bar.style.width = `${(100 * filled(lag)).toFixed(1)}%`;
    const track = el("div", { class: `track${lag === null ? " unknown" : lag > 1000 ? " behind" : ""}` }, lag === null ? null : bar);
    const [strong, weak] = says({ ...peer, lag }, peer.lag !== null);
    const more = [];
    if (peer.match_index !== null) more.push(`at ${peer.match_index.toLocaleString("en")}`);
    if (peer.inflight_messages) more.push(`${peer.inflight_messages} under way`);
    if (peer.connected && peer.round_trip_s) more.push(`${seconds(peer.round_trip_s)} away`);
    const match = more.length ? el("div", {}, more.join(", ")) : null;
    return el("li", { "data-node": peer.node },
      el("div", { class: "who" }, el("i", { class: `dot ${ok ? "good" : ok === false ? "bad" : ""}` }),
        el("div", {}, name, badge ? el("span", { class: "badge" }, badge) : null, el("span", { class: "place" }, peer.endpoint))),
      track,
      el("div", { class: "say" }, el("b", {}, strong), ` ${weak}`, match));
  });
  $("nodes").replaceChildren(...items);
};

const drawParts = (node, health, uptime) => {
  const parts = Object.entries(health.components).filter(([name]) => !name.includes("/")).map(([name, part]) =>
    el("li", { class: part.healthy ? null : "wide", title: part.detail },
      el("i", { class: `dot ${part.healthy ? "good" : "bad"}` }), part.healthy ? name : `${name}: ${part.detail}`));
  $("parts").replaceChildren(...parts);
  if (node.term === undefined) return;
  const last = state.moments.at.length - 1;
  const latest = (key) => (last < 0 ? 0 : state.moments[key][last]);
  const facts = [
    ["commit index", node.commit_index.toLocaleString("en")],
    ["applied", node.applied_index.toLocaleString("en")],
    ["snapshot at", node.snapshot_index ? node.snapshot_index.toLocaleString("en") : "none yet"],
    ["log", bytes(node.log_bytes)],
    ["tables in memory", bytes(node.memory_bytes)],
    ["writes here", `${bytes(latest("write_bytes"))}/s`],
    ["reads here", `${count(latest("reads"))}/s`],
    ["messages out", `${count(latest("messages_sent"))}/s`],
    ["messages in", `${count(latest("messages_received"))}/s`],
    ["up for", duration(uptime)],
  ];
  $("facts").replaceChildren(...facts.map(([name, value]) => el("div", {}, el("dt", {}, name), el("dd", {}, value))));
};

const take = (said) => {
  state.heard = performance.now();
  remember(said.moments, said.uptime_s);
  const { node, peers, health } = said;
  $("cluster").textContent = node.cluster_id ?? "marble";
  $("here").textContent = `node ${node.node_id}`;
  $("headline").textContent = headline(node);
  const leader = peers.find((peer) => peer.leads && !peer.here && peer.page);
  $("subline").replaceChildren(subline(node, peers), leader ? "  ·  " : "", leader ? el("a", { href: leader.page }, "the leader's page") : "");
  document.title = `${headline(node)} · ${node.cluster_id ?? "marble"}`;
  show("live", health.ready ? "live" : "live, not ready");
  notice(null);
  drawVerdict(health);
  draw();
  drawNodes(node, peers);
  drawParts(node, health, said.uptime_s);
};

const ask = async () => {
  const after = state.moments?.at.at(-1) ?? -1;
  const headers = state.token ? { Authorization: `Bearer ${state.token}` } : {};
  // After a new start the node has nothing that is so late: ask for all of it then.
  const answer = await fetch(`/api/status?after=${after}`, { headers, cache: "no-store", signal: AbortSignal.timeout(PATIENCE_MS) });
  if (answer.status === 401) {
    $("token").hidden = false;
    show("lost", "a token is needed");
    return;
  }
  if (!answer.ok) throw new Error(`the node answered ${answer.status}`);
  $("token").hidden = true;
  take(await answer.json());
};

const lost = () => {
  const silent = state.heard ? Math.round((performance.now() - state.heard) / 1000) : 0;
  show("lost", "disconnected");
  notice(state.heard ? `No answer from this node for ${duration(silent)}. What you see is what it said last; the page goes on asking.` : "No answer from this node. The page goes on asking.");
  draw();
};

const loop = async () => {
  try {
    await ask();
  } catch (error) {
    lost(error);
  }
  setTimeout(loop, ASK_MS);
};

for (const minutes of [2, 5, 15]) {
  const button = el("button", { type: "button", "aria-pressed": String(state.span === minutes * 60) }, `${minutes} min`);
  button.addEventListener("click", () => {
    state.span = minutes * 60;
    for (const each of $("range").children) each.setAttribute("aria-pressed", String(each === button));
    draw();
  });
  $("range").append(button);
}
$("token").addEventListener("submit", (event) => {
  event.preventDefault();
  state.token = $("token-text").value.trim();
  sessionStorage.setItem("marble-token", state.token);
});
$("charts").append(...charts.map((chart) => chart.root));
addEventListener("resize", draw);
loop();
