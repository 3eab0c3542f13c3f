// Owners of blocks. What is packed in the page is unpacked when it is looked at first.

/** Expand [difference, times, difference, times, ...] into numbers, the first of them counted from 0. */
function unpack(packed) {
  const numbers = [];
  let number = 0;
  for (let i = 0; i < packed.length; i += 2) {
    for (let times = packed[i + 1]; times > 0; times--) numbers.push((number += packed[i]));
  }
  return numbers;
}

/** Return the index of the last of these sorted numbers that is not above this one. */
function bisect(numbers, number) {
  let [low, high] = [0, numbers.length];
  while (low < high) {
    const middle = (low + high) >> 1;
    if (numbers[middle] > number) high = middle;
    else low = middle + 1;
  }
  return low - 1;
}

const product = (numbers) => numbers.reduce((a, b) => a * b, 1);

/** Equal blocks in the same rectangle of the grids of equal matrices, numbered as in planning/runs.py. */
class Run {
  constructor(of) {
    Object.assign(this, of);
    this.matrices = unpack(of.matrices);
    this.first_turns = unpack(of.first_turns);
    this.numbers = unpack(of.numbers);
    this.owners = unpack(of.owners);
    this.order = [...of.shape.keys()].sort((a, b) => (a !== of.along) - (b !== of.along));
    this.places = product(of.shape);
  }

  has(index) {
    return index.every((i, axis) => i >= this.start[axis] && i < this.start[axis] + this.shape[axis]);
  }

  owner(matrix, index) {
    const place = this.order.reduce((sum, axis) => sum * this.shape[axis] + index[axis] - this.start[axis], 0);
    const of = bisect(this.matrices, matrix);
    return this.owners[bisect(this.numbers, this.rotated(place, of) * this.matrices.length + of)];
  }

  rotated(place, matrix) {
    if (!this.first_turns.length) return place;
    const inRow = this.places / this.shape[this.along];
    const start = Math.floor((place % inRow) / this.turns) * this.turns;
    const first = place - (place % inRow) + start;
    const length = Math.min(this.turns, inRow - start);
    const moved = (place - first - matrix + this.first_turns[matrix]) % length;
    return first + (moved + length) % length;
  }

  /** Call with each matrix and the number of its blocks that a rank owns. */
  count(rank, call) {
    const length = this.matrices.length;
    const counts = new Array(length).fill(0);
    this.owners.forEach((owner, i) => {
      if (owner !== rank) return;
      const [first, last] = [this.numbers[i], this.numbers[i + 1] ?? this.places * length];
      const rounds = Math.floor((last - first) / length);
      if (rounds) counts.forEach((_, of) => (counts[of] += rounds));
      for (let number = first + rounds * length; number < last; number++) counts[number % length]++;
    });
    counts.forEach((count, of) => count && call(this.matrices[of], count));
  }
}

/** A parameter, its grid of blocks and their owners. */
class Parameter {
  constructor(team, number, [position, layer, name, look, owners], looks) {
    Object.assign(this, looks[look], { team, number, position, layer, name, owners });
    this.elements = product(this.shape);
    this.grid = this.cuts.length > 0;
    this.runs = [];
  }

  get lengths() {
    return (this._lengths ??= this.cuts.map(unpack));
  }

  get list() {
    return (this._list ??= (this.team.lists[this.number] ?? [[], []]).map(unpack));
  }

  /** The pictures that its blocks make: matrices of blocks; blocks that are no grid are wrapped into one. */
  get planes() {
    return this.grid ? product(this.lengths.slice(0, -2).map((axis) => axis.length)) : this.blocks ? 1 : 0;
  }

  plane(number) {
    if (!this.grid) {
      const columns = Math.ceil(Math.sqrt(4 * this.blocks));
      const index = (row, column) => [row * columns + column];
      return new Plane(this, Math.ceil(this.blocks / columns), columns, index);
    }
    const leading = [];
    for (const axis of this.lengths.slice(0, -2).reverse()) {
      leading.unshift(number % axis.length);
      number = Math.floor(number / axis.length);
    }
    const [rows, columns] = this.lengths.slice(-2).map((axis) => axis.length);
    return new Plane(this, rows, columns, (row, column) => [...leading, row, column]);
  }

  owner(index) {
    if (!this.grid) return this.list[1][index[0]];
    return this.runs.find((run) => run.has(index)).owner(this.number, index);
  }

  keepers(index) {
    const owner = this.owner(index);
    const groups = this.copies.map(unpack);
    const at = Math.max(...groups.map((ranks) => ranks.indexOf(owner)));
    return groups.length ? groups.map((ranks) => ranks[at]) : [owner];
  }

  kind(index) {
    return this.grid ? this.runs.find((run) => run.has(index)).kind : this.list[0][index[0]];
  }

  /** From and to, along each merged axis. */
  box(index) {
    if (this.grid) {
      return this.lengths.map((axis, i) => {
        const start = axis.slice(0, index[i]).reduce((a, b) => a + b, 0);
        return [start, start + axis[index[i]]];
      });
    }
    this._boxes ??= this.listed.map(([starts, lengths]) => [unpack(starts), unpack(lengths)]);
    return this._boxes.map(([starts, lengths]) => [starts[index[0]], starts[index[0]] + lengths[index[0]]]);
  }
}

/** Blocks as rows and columns of a picture. */
class Plane {
  constructor(parameter, rows, columns, index) {
    Object.assign(this, { parameter, rows, columns, index });
  }

  has(row, column) {
    const { grid, blocks } = this.parameter;
    const inside = row >= 0 && column >= 0 && row < this.rows && column < this.columns;
    return inside && (grid || this.index(row, column)[0] < blocks);
  }

  owner(row, column) {
    return this.has(row, column) ? this.parameter.owner(this.index(row, column)) : null;
  }
}

/** All planes of a parameter beside and below one another. */
function mosaic(parameter, aspect) {
  const count = parameter.planes;
  const first = parameter.plane(0);
  if (count < 2) return first;
  const across = Math.min(count, Math.max(1, Math.round(Math.sqrt((count * aspect * first.rows) / first.columns))));
  const planes = Array.from({ length: count }, (_, number) => parameter.plane(number));
  return {
    rows: Math.ceil(count / across) * first.rows,
    columns: across * first.columns,
    owner(row, column) {
      const of = planes[Math.floor(row / first.rows) * across + Math.floor(column / first.columns)];
      return of ? of.owner(row % first.rows, column % first.columns) : null;
    },
  };
}

/** Read teams and their parameters, in the order of the model. */
function parametersOf({ teams, looks }) {
  const all = [];
  for (const team of teams) {
    const ranks = unpack(team.ranks);
    [team.first, team.last, team.size] = [ranks[0], ranks[ranks.length - 1], ranks.length];
    team.members = team.parameters.map((of, number) => new Parameter(team, number, of, looks));
    team.runs = team.runs.map((of) => new Run(of));
    for (const run of team.runs) run.matrices.forEach((matrix) => team.members[matrix].runs.push(run));
    all.push(...team.members);
  }
  return all.sort((a, b) => a.position - b.position);
}

/** Count the blocks of each parameter that a rank owns. */
function blocksOf(rank, teams) {
  const counts = new Map();
  const add = (parameter, count) => counts.set(parameter, (counts.get(parameter) ?? 0) + count);
  for (const team of teams.filter((of) => rank >= of.first && rank <= of.last)) {
    for (const run of team.runs) run.count(rank, (matrix, count) => add(team.members[matrix], count));
    for (const matrix of Object.keys(team.lists)) {
      const count = team.members[matrix].list[1].filter((owner) => owner === rank).length;
      if (count) add(team.members[matrix], count);
    }
  }
  return counts;
}
