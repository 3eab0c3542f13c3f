// Pictures: bars of ranks, and blocks coloured by their owners.

// From dark to light without a turn, so that the order is seen in grey and by the colour-blind.
const STOPS = ["#00224e", "#123570", "#3b496c", "#575d6d", "#707173", "#8a8678", "#a59c74", "#c3b369", "#e1cc55", "#fee838"].map(
  (stop) => [1, 3, 5].map((at) => parseInt(stop.slice(at, at + 2), 16)),
);

/** Return the colour of a rank among those of its team, as red, green and blue. */
function colour(rank, { first, last }) {
  const place = last > first ? ((rank - first) / (last - first)) * (STOPS.length - 1) : 0;
  const at = Math.min(STOPS.length - 2, Math.floor(place));
  return STOPS[at].map((a, i) => Math.round(a + (STOPS[at + 1][i] - a) * (place - at)));
}

const css = (rgb) => `rgb(${rgb.join(" ")})`;
const variable = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();

/** Return a context that draws in pixels of the page, and the size of the canvas in these. */
function prepared(canvas) {
  const { width, height } = canvas.getBoundingClientRect();
  const scale = window.devicePixelRatio || 1;
  [canvas.width, canvas.height] = [Math.round(width * scale), Math.round(height * scale)];
  const context = canvas.getContext("2d");
  context.scale(scale, scale);
  context.font = "12px system-ui, sans-serif";
  context.textBaseline = "middle";
  return [context, width, height];
}

/** Draw a plane of blocks, or where there are more blocks than room some of them; those of other ranks are pale. */
function paint(context, plane, team, [x, y, width, height], chosen, smallest = 2) {
  const columns = Math.max(1, Math.min(plane.columns, Math.floor(width / smallest)));
  const rows = Math.max(1, Math.min(plane.rows, Math.floor(height / smallest)));
  const [w, h] = [width / columns, height / rows];
  const gap = Math.min(w, h) >= 6 ? 1 : 0;
  for (let row = 0; row < rows; row++) {
    for (let column = 0; column < columns; column++) {
      const at = [row, column].map((i, axis) =>
        Math.floor(((i + 0.5) / [rows, columns][axis]) * [plane.rows, plane.columns][axis]),
      );
      const owner = plane.owner(...at);
      if (owner === null || owner === undefined) continue;
      context.globalAlpha = chosen === null || owner === chosen ? 1 : 0.18;
      context.fillStyle = css(colour(owner, team));
      context.fillRect(x + column * w, y + row * h, w - gap + (gap ? 0 : 0.5), h - gap + (gap ? 0 : 0.5));
    }
  }
  context.globalAlpha = 1;
}

/** Draw parameters side by side, as wide as they have elements; those without blocks are outlined. */
function paintParameters(canvas, parameters, chosen) {
  const [context, width, height] = prepared(canvas);
  const total = parameters.reduce((sum, of) => sum + of.elements, 0);
  let x = 0;
  for (const of of [...parameters].sort((a, b) => b.elements - a.elements)) {
    const w = (of.elements / total) * width;
    if (w < 2 && parameters.length > 1) continue;
    const room = [x, 0, Math.max(1, w - (parameters.length > 1 ? 2 : 0)), height];
    if (of.planes) paint(context, mosaic(of, room[2] / height), of.team, room, chosen);
    else {
      context.strokeStyle = variable("--quiet");
      context.setLineDash([3, 3]);
      context.strokeRect(room[0] + 1, 1, Math.max(1, room[2] - 2), height - 2);
    }
    x += w;
  }
}

/** Choose a step between marks of an axis: 1, 2 or 5 times a power of ten. */
function step(length, marks) {
  const power = 10 ** Math.floor(Math.log10(length / marks));
  return [1, 2, 5, 10].map((n) => n * power).find((size) => length / size <= marks);
}

const AXES = { left: 70, right: 12, top: 16, bottom: 34 };

/** Draw bars of ranks in this order, each of several parts; of ranks that share a column the one with most.
 *
 * Returns the number of ranks in a column, and a function from a place to the rank that is seen there.
 */
function bars(canvas, order, parts, { chosen, show, limit = null, exact }) {
  const [context, width, height] = prepared(canvas);
  const total = (rank) => parts.reduce((sum, numbers) => sum + numbers[rank], 0);
  const [wide, high] = [width - AXES.left - AXES.right, height - AXES.top - AXES.bottom];
  const each = Math.ceil(order.length / Math.min(order.length, Math.floor(wide / 2)));
  const columns = [];
  for (let i = 0; i < order.length; i += each) {
    const ranks = order.slice(i, i + each);
    const most = ranks.reduce((a, b) => (total(b) > total(a) ? b : a));
    columns.push({ ranks, most: ranks.includes(chosen) ? chosen : most, least: Math.min(...ranks.map(total)) });
  }
  const most = Math.max(...order.map(total)) || 1;
  const top = limit && limit < 3 * most ? Math.max(most, limit) : most;
  const w = wide / columns.length;
  const y = (number) => AXES.top + high * (1 - number / top);
  const [ink, quiet, line, mark] = ["--ink", "--quiet", "--line", "--mark"].map(variable);
  context.textAlign = "right";
  for (let tick = 0; tick <= top * 1.001; tick += step(top, 5)) {
    context.fillStyle = line;
    context.fillRect(AXES.left, y(tick), wide, 1);
    context.fillStyle = quiet;
    context.fillText(show(tick), AXES.left - 6, y(tick));
  }
  const gap = w >= 4 ? Math.min(8, w * 0.2) : 0;
  columns.forEach((column, i) => {
    let below = 0;
    const x = AXES.left + i * w;
    const [from, to] = [x + gap / 2, x + w - gap / 2].map((place) => (w < 4 ? Math.round(place) : place));
    parts.forEach((numbers, part) => {
      context.fillStyle = variable(`--part-${part}`);
      const above = below + numbers[column.most];
      context.fillRect(from, y(above), to - from, y(below) - y(above));
      below = above;
    });
    if (each > 1 && column.least < total(column.most)) {
      context.fillStyle = mark;
      context.fillRect(x, y(column.least) - 1, w, 2);
    }
    if (column.ranks.includes(chosen)) {
      context.fillStyle = mark;
      context.beginPath();
      context.moveTo(x + w / 2, y(below) - 2);
      context.lineTo(x + w / 2 - 6, y(below) - 12);
      context.lineTo(x + w / 2 + 6, y(below) - 12);
      context.fill();
    }
  });
  if (limit && limit <= top) {
    context.fillStyle = mark;
    context.fillRect(AXES.left, y(limit), wide, 2);
  }
  context.fillStyle = ink;
  context.textAlign = "center";
  const marks = Math.max(1, step(columns.length, Math.min(columns.length, Math.floor(wide / 60))));
  for (let i = 0; i < columns.length; i += Math.ceil(marks)) {
    context.fillText(columns[i].ranks[0], AXES.left + (i + 0.5) * w, height - AXES.bottom + 10);
  }
  context.fillStyle = quiet;
  context.fillText("rank", AXES.left + wide / 2, height - 8);
  canvas.ariaLabel = `From ${exact(Math.min(...order.map(total)))} to ${exact(most)}, on ${order.length} ranks`;
  const at = (x) => columns[Math.min(columns.length - 1, Math.max(0, Math.floor((x - AXES.left) / w)))].most;
  return { each, at };
}
