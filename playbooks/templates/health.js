// Copyright: Contributors to the kvmfleet.qcow2 collection
// GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
// SPDX-License-Identifier: GPL-3.0-or-later
// Search, sort, filter and draw the fleet. Whatever is in the data becomes text, never HTML.
"use strict";

const data = JSON.parse(document.getElementById("data").textContent);
const text = (place) => (place === null ? null : data.texts[place]);
const ended = Date.parse(data.ended) / 1000;
const HEALTHS = ["full", "unknown", "attention", "ok", "left out"];
const WORDS = { full: "only a full backup", unknown: "unknown", attention: "needs attention", ok: "in order", "left out": "not backed up" };
const PAGE = 100; // rows at a time

// What plugin_utils/_health/page.py has written, by place.
const vms = data.domains.map((one) => ({
  hostPlace: one[0],
  host: text(data.hosts[one[0]][0]),
  name: text(one[1]),
  state: text(one[2]),
  health: text(one[3]),
  since: text(one[4]),
  increment: one[6],
  held: one[7],
  chain: one[8],
  oldest: one[9],
  snapshots: one[10].map(text),
  raw: one,
}));
// What is only shown of a few is read only then.
const findings = (vm) => vm.raw[11].map((one) => one.map(text));
const paths = (vm) => vm.raw[12].flatMap((disk) => disk[3].map((image) => `${text(image[0])}/${text(image[1])}`));

function element(name, attributes = {}, ...children) {
  return fill(document.createElement(name), attributes, children);
}

function drawn(name, attributes = {}, ...children) {
  return fill(document.createElementNS("http://www.w3.org/2000/svg", name), attributes, children);
}

function fill(made, attributes, children) {
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  made.append(...children.filter((child) => child !== null));
  return made;
}

const named = (name) => element("span", { class: "name" }, name);

function size(bytes) {
  if (bytes === null) return "";
  let unit = 0;
  const units = ["B", "KiB", "MiB", "GiB", "TiB", "PiB"];
  for (; bytes >= 1024 && unit < units.length - 1; unit++) bytes /= 1024;
  return `${unit && bytes < 10 ? bytes.toFixed(1) : bytes.toFixed(0)} ${units[unit]}`;
}

function age(seconds) {
  if (seconds === null) return "";
  const hours = Math.max(0, ended - seconds) / 3600;
  if (hours < 1) return `${Math.floor(hours * 60)} min`;
  return hours < 48 ? `${Math.floor(hours)} h` : `${Math.floor(hours / 24)} days`;
}

const day = (seconds) => new Date(seconds * 1000).toISOString().slice(0, 16).replace("T", " ");

// A list of which a part is shown, and more on demand, so that 20,000 VMs are as quick as twenty.
function lazily(items, container, make, where) {
  let shown = 0;
  const button = element("button", { type: "button", class: "more" });
  const more = (count) => {
    const next = items.slice(shown, shown + count);
    container.append(...next.map(make));
    shown += next.length;
    button.textContent = `Show more (${items.length - shown} left)`;
    button.hidden = shown >= items.length;
    return next.length;
  };
  button.addEventListener("click", () => {
    const last = container.lastElementChild;
    more(PAGE);
    last.nextElementSibling?.querySelector("button, code")?.focus();
  });
  more(PAGE);
  where.append(button);
  return more;
}

function say(words) {
  document.getElementById("said").textContent = words;
}

async function copy(command, code) {
  getSelection().selectAllChildren(code);
  try {
    await navigator.clipboard.writeText(command);
  } catch {
    document.execCommand("copy"); // what is selected, where a page of a file has no clipboard
  }
  say("Copied.");
}

function asCommand(command) {
  if (command === null) return null;
  const code = element("code", { tabindex: "0" }, command);
  const button = element("button", { type: "button", "aria-label": `Copy the command: ${command}` }, "Copy");
  button.addEventListener("click", () => copy(command, code));
  return element("div", { class: "command" }, code, button);
}

function asFindings(vm) {
  const told = findings(vm);
  // One command mends what is broken alike, so it comes once, after the last of them.
  const command = (place) => (told[place][2] === told[place + 1]?.[2] ? null : asCommand(told[place][2]));
  const items = told.map((one, place) => element("li", {}, element("span", { class: "name" }, one[1]), command(place)));
  return element("ul", { class: "findings" }, ...items);
}

const asHealth = (health) =>
  element("span", { class: `health ${health.replace(" ", "-")}` }, WORDS[health] ?? health);

// Needs somebody: hosts that could not be asked, then VMs, the worst first.
function showNeeds() {
  const rank = (vm) => HEALTHS.indexOf(vm.health);
  const needy = vms.filter((vm) => vm.raw[11].length && vm.health !== "left out").sort((a, b) => rank(a) - rank(b));
  const lost = data.hosts.filter((host) => text(host[1]) !== "ok");
  const all = [...data.problems.map(text), ...lost, ...needy];
  const place = document.getElementById("needs");
  if (!all.length) {
    place.append(element("p", {}, "Nothing."));
    return;
  }
  const list = element("ul", { class: "needs" });
  place.append(list);
  lazily(all, list, asNeed, place);
}

function asNeed(one) {
  if (typeof one === "string") return element("li", { class: "failed" }, named(one));
  if (Array.isArray(one)) {
    const head = element("p", {}, element("span", { class: "health failed" }, `host ${text(one[1])}`), " ", named(text(one[0])));
    return element("li", { class: "failed" }, head, ...one[2].map((words) => element("p", { class: "name" }, text(words))));
  }
  const head = element("p", {}, asHealth(one.health), " ", element("strong", { class: "name" }, one.name), " on ", named(one.host));
  return element("li", { class: one.health }, head, asFindings(one));
}

// The chain of a disk, its base at the bottom. On the left a line for each checkpoint through the images that have it.
const ROW = 52;
const LANE = 18;

function asChain(vm, disk) {
  const [target, , , images, lanes] = disk;
  const told = vm.raw[13];
  const used = told.map((checkpoint, place) => [checkpoint, lanes[place] === null ? null : text(lanes[place]), place + 1]);
  const there = used.filter(([, lane]) => lane !== null);
  const left = there.length * LANE + 10;
  const wide = left + 460;
  const high = images.length * ROW + 22;
  const title = `${text(target)}: ${images.length} images, ${there.length} checkpoints`;
  const svg = drawn("svg", { role: "img", "aria-label": title, width: wide, height: high, viewBox: `0 0 ${wide} ${high}` });
  images.forEach((image, place) => svg.append(...asImage(image, place, images, left)));
  there.forEach(([checkpoint, lane, number], place) => svg.append(asLane(checkpoint, lane, number, place * LANE + 12)));
  return svg;
}

function asImage(image, place, images, left) {
  const [, name, format, , held, modified, snapshot, inUse] = image;
  const top = 20 + place * ROW;
  const below = images[place + 1];
  const taken = snapshot !== null && below && below[5] !== null ? `, taken ${age(below[5])} ago` : "";
  const what = snapshot !== null ? `snapshot ${text(snapshot)}${taken}` : below ? "overlay" : "base";
  const written = modified === null ? "" : `, written ${age(modified)} ago`;
  const second = `${short(text(name), 34)}, ${text(format)}, ${size(held)}${written}${inUse ? ", in use" : ""}`;
  const full = drawn("title", {}, `${what}: ${text(image[0])}/${text(name)}`);
  return [
    below ? drawn("path", { class: "down", d: `M${left + 20} ${top + 42}v${ROW - 42}` }) : "",
    drawn("g", {}, full, drawn("rect", { class: "image", x: left, y: top, width: 455, height: 42, rx: 5 })),
    drawn("text", { x: left + 8, y: top + 17 }, short(what, 60)),
    drawn("text", { class: "second", x: left + 8, y: top + 34 }, second),
  ].filter((part) => part !== "");
}

const short = (words, most) => (words.length > most ? `${words.slice(0, most / 2)}…${words.slice(1 - most / 2)}` : words);

function asLane([name, , valid], lane, number, x) {
  const middle = (place) => 20 + place * ROW + 21;
  const group = drawn("g", {}, drawn("title", {}, `checkpoint ${text(name)}`));
  group.append(drawn("text", { class: "second", x, y: 12, "text-anchor": "middle" }, String(number)));
  const kind = (mark) => (mark === "+" ? "good" : mark === "?" ? (valid === 1 ? "good" : valid === 0 ? "bad" : "untold") : "bad");
  for (let place = 1; place < lane.length; place++) {
    const worst = [kind(lane[place - 1]), kind(lane[place])].sort()[0]; // bad, good, untold
    group.append(drawn("path", { class: `lane ${worst}`, d: `M${x} ${middle(place - 1)}V${middle(place)}` }));
  }
  [...lane].forEach((mark, place) => {
    const y = middle(place);
    if (mark === "+") group.append(drawn("circle", { class: "dot good", cx: x, cy: y, r: 5 }));
    else if (mark === "?") group.append(drawn("circle", { class: `dot hollow ${kind(mark)}`, cx: x, cy: y, r: 5 }));
    else if (mark === "0") group.append(drawn("rect", { class: "dot hollow bad", x: x - 5, y: y - 5, width: 10, height: 10 }));
    else group.append(drawn("path", { class: "cross bad", d: `M${x - 5} ${y - 5}l10 10m0-10l-10 10` }));
  });
  return group;
}

const MARKS = { "+": "records", "!": "broken", 0: "disabled", "-": "missing", "?": "in the memory of the VM" };

function asCheckpoints(vm) {
  const told = vm.raw[13];
  if (!told.length) return element("p", { class: "soft" }, "libvirt knows no checkpoint of it.");
  const rows = told.map(([name, created, valid, problem, advice, dirty], place) => {
    const health = valid === 1 ? "ok" : valid === 0 ? "full" : "unknown";
    const word = valid === 1 ? "valid" : `${valid === 0 ? "not valid" : "unknown"}: ${text(problem)}`;
    const where = vm.raw[12].map((disk) => [text(disk[0]), disk[4][place]]).filter(([, lane]) => lane !== null);
    const lanes = where.map(([target, lane]) => `${target}: ${[...text(lane)].map((mark) => MARKS[mark]).join(", ")}`);
    return element(
      "tr",
      {},
      element("td", {}, String(place + 1)),
      element("td", {}, named(text(name))),
      element("td", {}, day(created)),
      element("td", {}, element("span", { class: `health ${health}` }, word), advice === null ? null : element("p", { class: "name" }, text(advice))),
      element("td", { class: "number" }, size(dirty)),
      element("td", { class: "soft" }, `${lanes.join("; ")}`)
    );
  });
  const heads = ["No.", "Checkpoint", "Made (UTC)", "Verdict", "Increment", "In the images, from the top"];
  const head = element("tr", {}, ...heads.map((words) => element("th", { scope: "col" }, words)));
  return scrolls(`Checkpoints of ${vm.name}`, element("table", {}, element("thead", {}, head), element("tbody", {}, ...rows)));
}

const scrolls = (label, what) => element("div", { class: "scroll", role: "group", tabindex: "0", "aria-label": label }, what);

function asDetail(vm) {
  const isTold = ["full", "unknown"].includes(vm.health); // by its findings
  const parts = isTold ? [] : [element("p", { class: "name" }, text(vm.raw[5]))];
  if (vm.raw[11].length) parts.push(asFindings(vm));
  if (vm.raw[15]) parts.push(element("p", {}, "It has a managed save."));
  if (vm.raw[14].length) parts.push(element("p", { class: "name" }, `libvirt has snapshots of its own: ${vm.raw[14].map(text).join(", ")}`));
  for (const disk of vm.raw[12]) {
    const [target, unfit, problem, images] = disk;
    parts.push(element("h3", { class: "name" }, text(target)));
    if (unfit !== null) parts.push(element("p", { class: "soft name" }, `In no snapshot: ${text(unfit)}`));
    if (problem !== null) parts.push(element("p", { class: "health failed name" }, text(problem)));
    if (images.length) parts.push(scrolls(`Chain of ${text(target)} of ${vm.name}`, asChain(vm, disk)));
  }
  parts.push(element("h3", {}, "Checkpoints"), asCheckpoints(vm));
  return parts;
}

// The fleet as a table.
const COLUMNS = [
  { head: "VM", key: (vm) => vm.name },
  { head: "Host", key: (vm) => vm.host, cell: (vm) => named(vm.host) },
  { head: "Next backup", key: (vm) => HEALTHS.indexOf(vm.health), cell: (vm) => asHealth(vm.health) },
  { head: "Is", key: (vm) => vm.state ?? "", cell: (vm) => vm.state ?? "", hide: "middle" },
  { head: "Since", key: (vm) => vm.since ?? "", cell: (vm) => named(vm.since ?? ""), hide: "middle" },
  { head: "Increment", key: (vm) => vm.increment ?? -1, cell: (vm) => size(vm.increment), number: true, hide: "middle" },
  { head: "Images", key: (vm) => vm.chain, cell: (vm) => String(vm.chain), number: true, hide: "wide" },
  { head: "Oldest snapshot", key: (vm) => (vm.oldest === null ? -1 : ended - vm.oldest), cell: (vm) => age(vm.oldest), number: true, hide: "wide" },
  { head: "Snapshots hold", key: (vm) => vm.held, cell: (vm) => (vm.held ? size(vm.held) : ""), number: true, hide: "wide" },
];
const order = { column: 2, down: false };
let showMore = () => 0;
let number = 0;

const classes = (column) => [column.number ? "number" : "", column.hide ?? ""].join(" ").trim();

function asRow(vm) {
  const id = `detail-${number++}`;
  const button = element("button", { type: "button", class: "open name", "aria-expanded": "false", "aria-controls": id }, vm.name);
  const inside = element("div", { class: "inside" });
  const detail = element("tr", { class: "detail", id, hidden: "" }, element("td", { colspan: COLUMNS.length }, inside));
  button.addEventListener("click", () => {
    const opens = detail.hidden;
    if (opens && !inside.hasChildNodes()) inside.append(...asDetail(vm));
    detail.hidden = !opens;
    button.setAttribute("aria-expanded", String(opens));
  });
  const cells = COLUMNS.slice(1).map((column) => element("td", { class: classes(column) }, column.cell(vm)));
  const row = element("tr", {}, element("th", { scope: "row" }, button), ...cells);
  const both = document.createDocumentFragment();
  both.append(row, detail);
  return both;
}

function chosen() {
  const value = (id) => document.getElementById(id).value;
  const words = value("search").toLowerCase().split(/\s+/).filter(Boolean);
  const [health, host, snapshot] = ["health", "host", "snapshot"].map(value);
  return vms.filter(
    (vm) =>
      (!health || vm.health === health) &&
      (host === "" || vm.hostPlace === Number(host)) &&
      (!snapshot || (snapshot === "-" ? !vm.snapshots.length : vm.snapshots.includes(snapshot.slice(1)))) &&
      words.every((word) => (vm.text ??= [vm.name, vm.host, ...vm.snapshots, ...paths(vm)].join("\n").toLowerCase()).includes(word))
  );
}

const compare = (a, b) => (typeof a === "number" ? a - b : collator.compare(a, b));
const collator = new Intl.Collator("en", { numeric: true });

function show() {
  const key = COLUMNS[order.column].key;
  const found = chosen().sort((a, b) => (order.down ? -1 : 1) * compare(key(a), key(b)) || collator.compare(a.name, b.name));
  document.getElementById("count").textContent = `${found.length} of ${vms.length} VMs`;
  const body = element("tbody");
  const table = element("table", {}, element("thead", {}, element("tr", {}, ...COLUMNS.map(asHead))), body);
  const place = document.getElementById("rows");
  const focused = document.activeElement?.dataset?.column;
  place.replaceChildren(scrolls("The VMs", table));
  showMore = lazily(found, body, asRow, place);
  if (focused !== undefined) place.querySelector(`[data-column="${Number(focused)}"]`)?.focus();
}

function asHead(column, place) {
  const button = element("button", { type: "button", "data-column": place }, column.head);
  button.addEventListener("click", () => {
    order.down = order.column === place && !order.down;
    order.column = place;
    show();
  });
  const sorted = order.column === place ? { "aria-sort": order.down ? "descending" : "ascending" } : {};
  return element("th", { scope: "col", class: classes(column), ...sorted }, button);
}

function choices(id, all, options) {
  const select = document.getElementById(id);
  select.append(element("option", { value: "" }, all), ...options.map(([value, words]) => element("option", { value }, words)));
  select.addEventListener("change", show);
}

function begin() {
  choices("health", "all", HEALTHS.map((health) => [health, WORDS[health]]));
  const hosts = data.hosts.map((host, place) => [place, text(host[0])]);
  choices("host", "all", hosts.sort((a, b) => collator.compare(a[1], b[1])));
  const snapshots = [...new Set(vms.flatMap((vm) => vm.snapshots))].sort(collator.compare);
  choices("snapshot", "all", [["-", "on none"], ...snapshots.map((name) => [`+${name}`, name])]);
  document.getElementById("search").addEventListener("input", show);
  const form = document.getElementById("choice");
  form.addEventListener("submit", (event) => event.preventDefault());
  form.addEventListener("reset", () => setTimeout(show)); // once the fields are empty
  const days = Math.floor((Date.now() / 1000 - ended) / 86400);
  if (days >= 1) document.getElementById("stale").textContent = `That was ${days} ${days > 1 ? "days" : "day"} ago.`;
  addEventListener("beforeprint", () => showMore(2000));
  showNeeds();
  show();
}

begin();
