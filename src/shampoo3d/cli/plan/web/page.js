// The page: zoom, ranks, table. What is looked at is in the address, so that links and "back" zoom.

const data = JSON.parse(document.getElementById("data").textContent);
const parameters = parametersOf(data.ownership);
const layers = new Map();
for (const of of parameters) {
  const name = of.layer || of.name;
  layers.set(name, [...(layers.get(name) ?? []), of]);
}
const byRank = Object.fromEntries(Object.entries(data["by rank"]).map(([name, packed]) => [name, unpack(packed)]));
const world = data.ranks;
const $ = (id) => document.getElementById(id);

/** Make an element with these properties, and things inside. */
function make(tag, properties = {}, ...inside) {
  const element = Object.assign(document.createElement(tag), properties);
  element.append(...inside);
  return element;
}

const count = (number) => number.toLocaleString("en");
const sides = (shape) => shape.join("x") || "()";
const short = (number) => (number ? Number(number.toPrecision(3)).toExponential().replace("e+", "e") : "0");
const percent = (share) => (share === null ? "-" : `${Number((100 * share).toPrecision(2))} %`);

function amount(bytes) {
  const power = Math.min(4, Math.max(0, Math.floor((String(Math.round(bytes)).length - 1) / 3)));
  return power ? `${Number((bytes / 1000 ** power).toPrecision(4))} ${" kMGT"[power]}B` : `${bytes} B`;
}

/** Replace what a list of facts says; those that are null are left out. */
function state(list, facts) {
  const known = Object.entries(facts).filter(([, value]) => value !== null && value !== undefined);
  list.replaceChildren(...known.map(([name, value]) => make("div", {}, make("dt", {}, name), make("dd", {}, value))));
}

/** Fill a table. */
function fill(table, header, rows) {
  const cells = (tag, row) => make("tr", {}, ...row.map((cell) => make(tag, tag === "th" ? { scope: "col" } : {}, cell)));
  table.replaceChildren(
    make("thead", {}, cells("th", header)),
    make("tbody", {}, ...rows.map((row) => cells("td", row.map(String)))),
  );
}

// What is looked at.

const LOOKED_AT = ["layer", "parameter", "plane", "block", "rank"];

function lookedAt() {
  const address = new URLSearchParams(location.hash.slice(1));
  const given = Object.fromEntries(LOOKED_AT.map((name) => [name, address.get(name)]));
  const rank = Number(given.rank);
  return { ...given, rank: given.rank !== null && byRank.cost[rank] !== undefined ? rank : null };
}

/** Return the address of another place to look at, with the same rank. */
function address(place) {
  const { rank } = lookedAt();
  const given = Object.entries({ rank, ...place }).filter(([, value]) => value !== null && value !== undefined);
  return `#${new URLSearchParams(given)}`;
}

function tile(name, about, place, of) {
  const { rank } = lookedAt();
  const own = rank === null ? 0 : of.reduce((sum, parameter) => sum + (chosenBlocks.get(parameter) ?? 0), 0);
  const picture = make("canvas", { role: "presentation" });
  const text = own && !("plane" in place) ? make("span", { className: "own" }, ` ${count(own)} of rank ${rank}`) : "";
  const link = make("a", { className: "tile", href: address(place) }, picture, make("b", {}, name), make("small", {}, about), text);
  return { link, picture };
}

let chosenBlocks = new Map();

function blocksIn(of) {
  const blocks = of.reduce((sum, parameter) => sum + parameter.blocks, 0);
  return blocks ? `${count(blocks)} block${blocks > 1 ? "s" : ""}` : "updated where it is stored";
}

function showTiles(level) {
  const { rank, layer, parameter } = lookedAt();
  const made = [];
  if (level === "model") {
    for (const [name, of] of layers) {
      const place = of[0].layer ? { layer: name } : { parameter: name };
      const about = `${short(of.reduce((sum, p) => sum + p.elements, 0))} elements, ${blocksIn(of)}`;
      made.push([tile(name, about, place, of), (canvas) => paintParameters(canvas, of, rank)]);
    }
  } else if (level === "layer") {
    for (const of of layers.get(layer)) {
      const about = `${sides(of.shape)}, ${blocksIn([of])}`;
      const name = of.name.slice(layer.length + 1);
      made.push([tile(name, about, { layer, parameter: of.name }, [of]), (canvas) => paintParameters(canvas, [of], rank)]);
    }
  } else {
    const of = named(parameter);
    for (let number = 0; number < of.planes; number++) {
      const plane = of.plane(number);
      const about = `${plane.rows} x ${plane.columns} blocks`;
      const draw = (canvas) => {
        const [context, width, height] = prepared(canvas);
        paint(context, plane, of.team, [0, 0, width, height], rank);
      };
      made.push([tile(`matrix ${number}`, about, { layer, parameter, plane: number }, [of]), draw]);
    }
  }
  $("tiles").className = made.length <= 24 ? "few" : made.length > 60 ? "many" : "";
  $("tiles").replaceChildren(...made.map(([{ link }]) => link));
  made.forEach(([{ picture }, draw]) => draw(picture));
}

const named = (name) => parameters.find((of) => of.name === name);

const NEAR = [7, 13];

/** Draw a matrix of blocks or, if one of them is looked at, those around it. */
function showPlane(of, plane, block) {
  const { rank } = lookedAt();
  const [context, width, height] = prepared($("plane"));
  if (!block) {
    paint(context, plane, of.team, [0, 0, width, height], rank, 1);
    $("plane").blockAt = (x, y) => [Math.floor((y / height) * plane.rows), Math.floor((x / width) * plane.columns)];
    return;
  }
  const sizes = [plane.rows, plane.columns].map((most, axis) => Math.min(most, NEAR[axis]));
  const first = sizes.map((size, axis) => {
    const most = [plane.rows, plane.columns][axis] - size;
    return Math.max(0, Math.min(most, block[axis] - (size >> 1)));
  });
  const near = { rows: sizes[0], columns: sizes[1], owner: (row, column) => plane.owner(first[0] + row, first[1] + column) };
  paint(context, near, of.team, [0, 0, width, height], rank);
  const [h, w] = [height / sizes[0], width / sizes[1]];
  context.textAlign = "center";
  for (let row = 0; row < sizes[0]; row++) {
    for (let column = 0; column < sizes[1]; column++) {
      const owner = near.owner(row, column);
      if (owner === null) continue;
      const pale = rank !== null && owner !== rank;
      const [r, g, b] = colour(owner, of.team);
      context.fillStyle = pale ? variable("--ink") : 0.3 * r + 0.59 * g + 0.11 * b > 128 ? "#000" : "#fff";
      context.fillText(`rank ${owner}`, (column + 0.5) * w, (row + 0.5) * h);
    }
  }
  context.strokeStyle = variable("--mark");
  context.lineWidth = 4;
  context.strokeRect((block[1] - first[1]) * w + 2, (block[0] - first[0]) * h + 2, w - 5, h - 5);
  $("plane").blockAt = (x, y) => [first[0] + Math.floor(y / h), first[1] + Math.floor(x / w)];
}

function showBlock(of, plane, block) {
  $("block").hidden = !block;
  if (!block) return;
  const index = plane.index(...block);
  const [kind, owner, keepers] = [data.ownership.kinds[of.kind(index)], of.owner(index), of.keepers(index)];
  state($("block"), {
    block: of.grid ? block.join(", ") : `${index[0] + 1} of ${of.blocks}`,
    elements: of.box(index).map(([a, b]) => `${a}:${b}`).join(", "),
    owner: make("a", { href: address({ ...lookedAt(), rank: owner }) }, `rank ${owner}`),
    "roots also on": keepers.length > 1 ? keepers.filter((rank) => rank !== owner).join(", ") : null,
    factors: kind.factors.join(", ") || "none",
    "diagonal factors": kind.diagonals.join(", ") || null,
    statistics: amount(kind.statistics),
    roots: amount(kind.roots),
    "multiply-adds of a step": short(kind.cost),
  });
}

function crumbs(of) {
  const { layer, parameter, plane, block } = lookedAt();
  const places = [[data.request.model, {}]];
  if (layer) places.push([layer, { layer }]);
  if (parameter) places.push([layer ? parameter.slice(layer.length + 1) : parameter, { layer, parameter }]);
  if (plane !== null && of.planes > 1) places.push([`matrix ${plane}`, { layer, parameter, plane }]);
  if (block) places.push([`block ${block.replace(",", ", ")}`, null]);
  const last = places.length - 1;
  const shown = places.map(([name, place], i) => (i < last ? make("a", { href: address(place) }, name) : make("b", {}, name)));
  $("crumbs").replaceChildren(...shown);
  $("crumbs").outward = last ? address(places[last - 1][1]) : null;
}

function showLegend(of) {
  const teams = data.ownership.teams.length;
  const [first, last] = of ? [of.team.first, of.team.last] : [0, world - 1];
  const scale = make("span", { className: "scale" });
  scale.style.background = `linear-gradient(to right, ${STOPS.map(css).join(", ")})`;
  const ends = of || teams === 1 ? [`rank ${first}`, `rank ${last}`] : ["first of the ranks that share it", "last"];
  $("legend").replaceChildren("A block has the colour of its owner: ", ends[0], scale, ends[1]);
}

function showMap() {
  const { layer, parameter, plane, block, rank } = lookedAt();
  const of = parameter ? named(parameter) : null;
  const level = of ? (of.planes > 1 && plane === null ? "planes" : "plane") : layers.has(layer) ? "layer" : "model";
  crumbs(of);
  showLegend(of);
  const flat = level === "plane" && of.planes > 0;
  $("tiles").hidden = level === "plane";
  $("plane").hidden = $("hint").hidden = !flat;
  const own = rank === null || !flat ? "" : ` Rank ${rank} owns ${count(chosenBlocks.get(of) ?? 0)} of its blocks.`;
  $("hint").textContent = `Click a block, or move with the arrow keys; Escape zooms out.${own}`;
  if (level !== "plane") {
    $("block").hidden = true;
    showTiles(level);
  } else if (flat) {
    const shown = of.plane(Number(plane ?? 0));
    const at = block?.split(",").map(Number);
    const known = at && shown.has(...at) ? at : null;
    $("plane").ariaLabel = `${of.name}: ${shown.rows} x ${shown.columns} blocks`;
    $("plane").look = (next) => shown.has(...next) && { layer, parameter, plane, block: next.join(",") };
    $("plane").block = known;
    showPlane(of, shown, known);
    showBlock(of, shown, known);
  } else {
    $("block").hidden = false;
    state($("block"), { "moved by": of.moved_by, shape: sides(of.shape), owner: "each element is updated where it is stored" });
  }
}

$("plane").addEventListener("click", (event) => {
  const place = $("plane").look($("plane").blockAt(event.offsetX, event.offsetY));
  if (place) location.hash = address(place);
});

const ARROWS = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] };

$("plane").addEventListener("keydown", (event) => {
  const move = ARROWS[event.key];
  const from = $("plane").block;
  if (event.key === "Escape") location.hash = $("crumbs").outward;
  else if (move || event.key === "Enter") {
    const place = $("plane").look(from && move ? from.map((i, axis) => i + move[axis]) : from ?? [0, 0]);
    if (place) {
      history.replaceState(null, "", address(place)); // no entry for each key
      show();
    }
  } else return;
  event.preventDefault();
});

// Ranks.

function showRanks() {
  const { rank } = lookedAt();
  const [low, high] = ["from", "to"].map((id, i) => ($(id).value === "" ? [0, world - 1][i] : Number($(id).value)));
  const [first, last] = [Math.min(low, high), Math.max(low, high)].map((n) => Math.max(0, Math.min(world - 1, n)));
  const order = Array.from({ length: last - first + 1 }, (_, i) => first + i);
  const sorted = (numbers) => ($("by-size").checked ? [...order].sort((a, b) => numbers[b] - numbers[a] || a - b) : order);
  const { state: whole, statistics, roots, momenta, cost } = byRank;
  const limit = data["bytes that fit"];
  const memory = bars($("memory"), sorted(whole), [statistics, roots, momenta], { chosen: rank, show: amount, exact: amount, limit });
  const work = bars($("cost"), sorted(cost), [cost], { chosen: rank, show: short, exact: short });
  $("memory").rankAt = memory.at;
  $("cost").rankAt = work.at;
  $("binned").hidden = memory.each === 1;
  $("binned").textContent = `A bar stands for ${memory.each} ranks and is that with most; the line across it is the least.`;
  $("rank").value = rank ?? "";
  $("rank-numbers").hidden = rank === null;
  if (rank === null) return;
  const received = data.received[rank];
  state($("rank-numbers"), {
    rank: String(rank),
    "multiply-adds of a step": short(cost[rank]),
    blocks: count(byRank.blocks[rank]),
    statistics: amount(statistics[rank]),
    roots: amount(roots[rank]),
    momenta: amount(momenta[rank]),
    state: amount(whole[rank]),
    ...Object.fromEntries(Object.entries(received ?? {}).map(([name, bytes]) => [`received ${name}`, amount(bytes)])),
  });
}

const choose = (rank) => (location.hash = address({ ...lookedAt(), rank }));

for (const id of ["memory", "cost"]) $(id).addEventListener("click", (event) => choose($(id).rankAt(event.offsetX)));
$("rank").addEventListener("change", () => choose($("rank").value === "" ? null : Number($("rank").value)));
for (const id of ["from", "to", "by-size"]) $(id).addEventListener("change", showRanks);
for (const form of document.forms) form.addEventListener("submit", (event) => event.preventDefault());

// The table of parameters.

const many = data.ownership.teams.length > 1;

function ranksOf({ first, last, size }) {
  return `${size <= last - first ? `${count(size)} of ` : ""}${first} to ${last}`;
}

const COLUMNS = [
  ["parameter", (of) => of.name, (of) => make("a", { href: address({ layer: of.layer, parameter: of.name }) }, of.name)],
  ...(many ? [["ranks", (of) => of.team.first, (of) => ranksOf(of.team)]] : []),
  ["shape", (of) => of.elements, (of) => sides(of.shape)],
  ["elements", (of) => of.elements, (of) => count(of.elements)],
  ["moved by", (of) => of.moved_by, (of) => of.moved_by + (of.reason ? ` (${of.reason})` : "")],
  ["blocks", (of) => of.blocks, (of) => (of.blocks ? `${count(of.blocks)} of ${sides(of.largest)}` : "-")],
  ["factors", (of) => product(of.factors), (of) => of.factors.join(", ") || "-"],
  ["divided", (of) => of.divided ?? -1, (of) => (of.divided === null ? "-" : `axis ${of.divided}`)],
  ["owners", (of) => of.owners, (of) => (of.owners ? count(of.owners) : "-")],
];
const SHOWN = 40;
const sorting = { column: null, down: false };
let shownRows = SHOWN;

function showParameters() {
  const words = $("filter").value.toLowerCase().split(/\s+/).filter(Boolean);
  const text = (of) => `${of.name} ${sides(of.shape)} ${of.moved_by} ${of.reason}`.toLowerCase();
  const found = parameters.filter((of) => words.every((word) => text(of).includes(word)));
  if (sorting.column !== null) {
    const key = COLUMNS[sorting.column][1];
    const compare = (a, b) => (typeof a === "string" ? a.localeCompare(b, "en", { numeric: true }) : a - b);
    found.sort((a, b) => (sorting.down ? -1 : 1) * compare(key(a), key(b)));
  }
  const elements = found.reduce((sum, of) => sum + of.elements, 0);
  $("found").textContent = `${count(found.length)} of ${count(parameters.length)} parameters, ${count(elements)} elements`;
  const header = COLUMNS.map(([name], i) => {
    const button = make("button", { type: "button", onclick: () => sortBy(i) }, name);
    const direction = i !== sorting.column ? "none" : sorting.down ? "descending" : "ascending";
    return make("th", { scope: "col", ariaSort: direction, className: name === "moved by" ? "text" : "" }, button);
  });
  const cell = ([name, , show], of) => make("td", { className: name === "moved by" ? "text" : "" }, show(of));
  const rows = found.slice(0, shownRows).map((of) => make("tr", {}, ...COLUMNS.map((column) => cell(column, of))));
  $("parameters").replaceChildren(make("thead", {}, make("tr", {}, ...header)), make("tbody", {}, ...rows));
  $("more").hidden = found.length <= shownRows;
  $("more").textContent = `Show all ${count(found.length)}`;
}

function sortBy(column) {
  sorting.down = sorting.column === column && !sorting.down;
  sorting.column = column;
  showParameters();
  $("parameters").querySelectorAll("th button")[column].focus();
}

$("filter").addEventListener("input", () => ((shownRows = SHOWN), showParameters()));
$("more").addEventListener("click", () => ((shownRows = Infinity), showParameters()));

// What does not change.

function showRest() {
  const most = (name) => data["per rank"][name];
  const peaks = Object.values(data.memory).map((of) => of.total);
  $("model").textContent = `${data.request.model}: ${data.layout}`;
  state($("summary"), {
    parameters: count(data.parameters),
    ranks: count(world),
    blocks: count(parameters.reduce((sum, of) => sum + of.blocks, 0)),
    "state of a rank": `${amount(most("state").most)} at most, ${amount(most("state").mean)} on average`,
    "with what a step takes": `${amount(Math.max(...peaks))} at most, on ${data.request.device}`,
    "work of a rank": `${short(most("cost").most)} multiply-adds at most`,
    "max / mean of the work": data["max / mean"].toFixed(3),
    "idle ranks": count(data["idle ranks"]),
    "share of a step": data["share of a step"] === null ? null : `${percent(data["share of a step"])} of ${count(data.request.tokens)} tokens`,
    [`fits ${data.request.fits}`]: data.fits === null ? null : data.fits ? "yes" : "no",
  });
  const kinds = Object.keys(Object.values(data.received)[0]);
  const parts = ["statistics", "roots", "momenta", "state"];
  const some = Object.keys(data.received).map((rank) => [
    rank,
    ...parts.map((name) => amount(byRank[name][rank])),
    data.memory[rank] ? amount(data.memory[rank].total) : "-",
    ...kinds.map((kind) => amount(data.received[rank][kind])),
  ]);
  fill($("some-ranks"), ["rank", ...parts, "most in a step", ...kinds.map((kind) => `receives ${kind}`)], some);
  $("comparison").hidden = !data.compared.length;
  const compared = data.compared.map((of) => [
    of["block size"], short(of.cost), percent(of["share of a step"]), of["max / mean"].toFixed(2), of["idle ranks"],
    amount(of.state), of.cheapest ? "cheapest" : of.fits ? "" : "does not fit",
  ]);
  fill($("compared"), ["block size", "multiply-adds", "share of a step", "max / mean", "idle ranks", "state", ""], compared);
  $("remarks").replaceChildren(...data.remarks.map((text) => make("li", {}, text)));
  [$("from").max, $("to").max, $("rank").max] = [world - 1, world - 1, world - 1];
  [$("from").value, $("to").value] = [0, world - 1];
}

function show() {
  const { rank } = lookedAt();
  chosenBlocks = rank === null ? new Map() : blocksOf(rank, data.ownership.teams);
  showMap();
  showRanks();
}

showRest();
show();
showParameters();
addEventListener("hashchange", () => (show(), showParameters()));
addEventListener("resize", show);
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", show);
