// The map: x is the block of the context, y the layer, with one thin row for each KV head.

const LEFT = 42, TOP = 44, BOTTOM = 30, GAP = 2, MIN_CELL = 3, MAX_CELL = 26;

export class HeatMap {
  constructor(canvas, onPoint) {
    this.canvas = canvas;
    this.onPoint = onPoint;
    this.view = null;
    this.cursor = null; // { block, row }
    this.isPending = false;
    canvas.addEventListener("pointermove", (event) => this.point(this.cellAt(event)));
    canvas.addEventListener("pointerdown", (event) => this.point(this.cellAt(event)));
    canvas.addEventListener("keydown", (event) => this.move(event));
    new ResizeObserver(() => this.redraw()).observe(canvas.parentElement);
    matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => this.redraw());
  }

  // view: { rows, forced, window: [from, to] in tokens, blockSize, layers, numHeads }
  show(view) {
    this.view = view;
    if (this.cursor && this.cursor.block >= view.rows[0].length) this.cursor = null;
    this.redraw();
  }

  redraw() {
    if (this.isPending || !this.view) return;
    this.isPending = true;
    requestAnimationFrame(() => {
      this.isPending = false;
      this.draw();
    });
  }

  layout() {
    const { rows, layers, numHeads } = this.view;
    const room = this.canvas.parentElement.clientWidth - LEFT - 4;
    const cell = Math.min(MAX_CELL, Math.max(MIN_CELL, room / rows[0].length));
    const rowHeight = Math.max(2, Math.min(9, Math.floor((340 / layers.length - GAP) / numHeads)));
    const layerHeight = rowHeight * numHeads + GAP;
    return { cell, rowHeight, layerHeight, width: LEFT + cell * rows[0].length + 4, height: TOP + layerHeight * layers.length + BOTTOM };
  }

  rowTop(row, size) {
    const { numHeads } = this.view;
    return TOP + Math.floor(row / numHeads) * size.layerHeight + (row % numHeads) * size.rowHeight;
  }

  draw() {
    const { canvas, view } = this;
    const size = this.layout();
    const scale = window.devicePixelRatio || 1;
    canvas.width = Math.round(size.width * scale);
    canvas.height = Math.round(size.height * scale);
    canvas.style.width = `${size.width}px`;
    canvas.style.height = `${size.height}px`;
    const context = canvas.getContext("2d");
    context.scale(scale, scale);
    const style = getComputedStyle(canvas);
    const color = (name) => style.getPropertyValue(name).trim();
    context.font = `11px ${style.fontFamily}`;
    this.drawCells(context, size, color);
    this.drawColumns(context, size, color);
    this.drawAxes(context, size, color);
    this.drawForced(context, size, color);
    if (this.cursor) this.drawCursor(context, size, color);
    const { rows, layers } = view;
    canvas.setAttribute("aria-label", `Map of ${rows[0].length} blocks, ${layers.length} layers, ${view.numHeads} KV heads a layer`);
  }

  drawCells(context, size, color) {
    const gap = size.cell > 6 ? 1 : 0;
    const cell = color("--cell"), read = color("--read");
    this.view.rows.forEach((shares, row) => {
      const top = this.rowTop(row, size);
      context.globalAlpha = 1;
      context.fillStyle = cell;
      for (let block = 0; block < shares.length; block++) {
        context.fillRect(LEFT + block * size.cell, top, size.cell - gap, size.rowHeight - 0.5);
      }
      context.fillStyle = read;
      for (let block = 0; block < shares.length; block++) {
        if (!shares[block]) continue;
        context.globalAlpha = 0.15 + 0.85 * shares[block];
        context.fillRect(LEFT + block * size.cell, top, size.cell - gap, size.rowHeight - 0.5);
      }
    });
    context.globalAlpha = 1;
  }

  // Above the map: how many of all heads read each block.
  drawColumns(context, size, color) {
    const { rows } = this.view;
    const gap = size.cell > 6 ? 1 : 0;
    const height = TOP - 16;
    for (let block = 0; block < rows[0].length; block++) {
      let sum = 0;
      for (const shares of rows) sum += shares[block];
      const bar = (sum / rows.length) * height;
      context.fillStyle = color("--read");
      context.fillRect(LEFT + block * size.cell, TOP - 6 - bar, size.cell - gap, bar);
    }
    context.fillStyle = color("--line");
    context.fillRect(LEFT, TOP - 6, size.cell * rows[0].length - gap, 1);
    context.fillStyle = color("--soft");
    context.textAlign = "right";
    context.textBaseline = "middle";
    context.fillText("heads", LEFT - 5, TOP - 12);
  }

  drawAxes(context, size, color) {
    const { rows, layers, blockSize, window: [from, to] } = this.view;
    context.fillStyle = color("--soft");
    context.textBaseline = "middle";
    context.textAlign = "right";
    const every = Math.ceil(14 / size.layerHeight);
    layers.forEach((layer, i) => {
      if (i % every) return;
      context.fillText(String(layer), LEFT - 6, TOP + i * size.layerHeight + (size.layerHeight - GAP) / 2);
    });
    const bottom = TOP + size.layerHeight * layers.length;
    if (to > from) {
      context.fillStyle = color("--window");
      const left = LEFT + (from / blockSize) * size.cell;
      context.fillRect(left, bottom + 2, (to / blockSize) * size.cell + LEFT - left, 3);
    }
    context.fillStyle = color("--soft");
    context.textBaseline = "top";
    const step = niceStep(Math.ceil(52 / size.cell));
    for (let block = 0; block < rows[0].length; block += step) {
      context.textAlign = block ? "center" : "left";
      const x = LEFT + block * size.cell;
      if (block && x > size.width - 18) break;
      context.fillRect(x, bottom + 7, 1, 4);
      context.fillText(String(block * blockSize), x, bottom + 13);
    }
  }

  drawForced(context, size, color) {
    context.strokeStyle = color("--forced");
    context.lineWidth = 1.5;
    const height = size.layerHeight * this.view.layers.length - GAP;
    for (const [from, to] of this.view.forced) {
      const gap = size.cell > 6 ? 1 : 0;
      context.strokeRect(LEFT + from * size.cell - 0.75, TOP - 1.5, (to - from) * size.cell - gap + 1.5, height + 2);
    }
  }

  drawCursor(context, size, color) {
    const { block, row } = this.cursor;
    const x = LEFT + block * size.cell;
    context.strokeStyle = color("--text");
    context.lineWidth = 1;
    const gap = size.cell > 6 ? 1 : 0;
    const height = size.layerHeight * this.view.layers.length - GAP;
    context.strokeRect(x - 0.5, TOP - 0.5, size.cell - gap + 1, height + 1);
    context.lineWidth = 2;
    context.strokeRect(x - 1, this.rowTop(row, size) - 1, size.cell - gap + 2, size.rowHeight + 1.5);
  }

  cellAt(event) {
    if (!this.view) return null;
    const size = this.layout();
    const { rows, layers, numHeads } = this.view;
    const block = Math.floor((event.offsetX - LEFT) / size.cell);
    const y = Math.min(Math.max(event.offsetY - TOP, 0), size.layerHeight * layers.length - 1);
    const layer = Math.floor(y / size.layerHeight);
    const head = Math.min(numHeads - 1, Math.floor((y % size.layerHeight) / size.rowHeight));
    if (block < 0 || block >= rows[0].length) return null;
    return { block, row: layer * numHeads + head };
  }

  point(cell) {
    if (!cell || (this.cursor && this.cursor.block === cell.block && this.cursor.row === cell.row)) return;
    this.cursor = cell;
    this.redraw();
    this.onPoint(cell);
  }

  move(event) {
    const steps = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] };
    const step = steps[event.key];
    if (!step || !this.view) return;
    event.preventDefault();
    const { rows } = this.view;
    const { block, row } = this.cursor ?? { block: -step[0], row: -step[1] };
    this.point({
      block: Math.min(Math.max(block + step[0], 0), rows[0].length - 1),
      row: Math.min(Math.max(row + step[1], 0), rows.length - 1),
    });
  }
}

function niceStep(least) {
  for (let step = 1; ; step *= 2) if (step >= least) return step;
}
