// The trace panel: figures, the map, and the text of the block under the pointer.

import { HeatMap } from "./heatmap.js";

const $ = (id) => document.getElementById(id);

export class TracePanel {
  // loadText(ids): promise of the text of token ids. onToken(index): the reader chose a token.
  constructor(loadText, onToken) {
    this.loadText = loadText;
    this.onToken = onToken;
    this.turn = null;
    this.token = 0;
    this.isFollowing = true;
    this.mode = "token";
    this.cell = null;
    this.map = new HeatMap($("map"), (cell) => this.inspect(cell));
    $("token").addEventListener("input", () => this.choose(Number($("token").value)));
    for (const mode of ["token", "answer"]) {
      $(`mode-${mode}`).addEventListener("click", () => this.setMode(mode));
    }
  }

  clear(message) {
    this.turn = null;
    this.cell = null;
    this.map.view = null;
    this.map.cursor = null;
    $("trace-body").hidden = true;
    $("trace-empty").hidden = false;
    $("trace-empty").textContent = message;
  }

  // Shows an answer; follows its newest token until the reader chooses one.
  open(turn) {
    if (this.turn !== turn) this.cell = this.map.cursor = null;
    this.turn = turn;
    this.isFollowing = true;
    this.setText("Point at a block, or move with the arrow keys on the map.", null);
  }

  update(turn) {
    if (turn !== this.turn || !turn.trace.length) return;
    if (this.isFollowing) this.token = turn.trace.length - 1;
    this.render();
  }

  choose(token, turn = this.turn) {
    if (!turn?.trace.length) return;
    if (turn !== this.turn) this.open(turn);
    this.isFollowing = false;
    this.token = Math.min(token, turn.trace.length - 1);
    if (this.mode !== "token") this.setMode("token");
    else this.render();
  }

  setMode(mode) {
    this.mode = mode;
    for (const name of ["token", "answer"]) {
      $(`mode-${name}`).setAttribute("aria-pressed", String(name === mode));
    }
    if (this.turn) this.render();
  }

  get range() {
    return this.mode === "token" ? [this.token, this.token + 1] : [0, this.turn.trace.length];
  }

  render() {
    const { trace } = this.turn;
    if (!trace.length) return;
    $("trace-body").hidden = false;
    $("trace-empty").hidden = !trace.isTruncated;
    $("trace-empty").textContent = `The trace ends after ${trace.length} tokens.`;
    const [from, to] = this.range;
    this.renderFigures(trace.figures(from, to), to);
    const slider = $("token");
    slider.max = String(trace.length - 1);
    slider.value = String(this.token);
    slider.disabled = this.mode !== "token";
    $("token-label").textContent = this.mode === "token" ? `${this.token + 1} of ${trace.length}` : `all ${trace.length}`;
    this.onToken(this.turn, this.mode === "token" ? this.token : -1);
    const length = trace.contextLength(to - 1);
    this.map.show({
      rows: trace.sharesOf(from, to),
      forced: trace.forced(to - 1),
      window: [Math.max(0, length - trace.facts.window_size), trace.facts.window_size ? length : 0],
      blockSize: trace.facts.block_size,
      layers: trace.facts.layers,
      numHeads: trace.facts.num_kv_heads,
    });
    if (this.cell && this.map.cursor) this.describe(this.cell);
  }

  renderFigures(figures, to) {
    const { trace } = this.turn;
    const length = trace.contextLength(to - 1);
    put($("fig-blocks"), number(figures.read), `of ${number(figures.visible)}, ${trace.facts.block_size} tokens each`);
    put($("fig-share"), percent(figures.share), `of ${length.toLocaleString("en")} tokens`);
    const isAll = trace.facts.layers.length < trace.facts.num_layers ? ", all layers" : "";
    put($("fig-bytes"), percent(figures.bytes / figures.dense), `${bytes(figures.bytes)} of ${bytes(figures.dense)}${isAll}`);
  }

  inspect(cell) {
    this.cell = cell;
    this.describe(cell);
    clearTimeout(this.timer);
    this.timer = setTimeout(() => this.showText(cell.block), 60);
  }

  describe({ block, row }) {
    const { trace } = this.turn;
    const { layers, num_kv_heads, block_size } = trace.facts;
    const [from, to] = this.range;
    const rows = trace.sharesOf(from, to);
    const sum = rows.reduce((total, shares) => total + shares[block], 0);
    const layer = layers[Math.floor(row / num_kv_heads)];
    const head = row % num_kv_heads;
    const end = Math.min((block + 1) * block_size, trace.contextLength(to - 1));
    const isForced = trace.forced(to - 1).some(([first, stop]) => block >= first && block < stop);
    const share = rows[row][block];
    const verb = this.mode === "token" ? (share ? "reads it" : "skips it") : `reads it for ${percent(share)} of the tokens`;
    $("inspect-title").textContent =
      `Block ${block}${isForced ? " (always read)" : ""}, tokens ${block * block_size} to ${end - 1}: ` +
      `read by ${percent(sum / rows.length)} of heads. Layer ${layer}, KV head ${head} ${verb}.`;
  }

  async showText(block) {
    const turn = this.turn;
    const ids = turn.trace.blockIds(block);
    const isWhole = ids.length === turn.trace.facts.block_size;
    let text = turn.texts.get(block);
    try {
      text ??= await this.loadText(ids);
    } catch (error) {
      text = `The text could not be fetched: ${error.message}`;
      if (turn === this.turn && this.cell?.block === block) this.setText(null, text);
      return;
    }
    if (isWhole) turn.texts.set(block, text);
    if (turn === this.turn && this.cell?.block === block) this.setText(null, text);
  }

  setText(title, text) {
    if (title !== null) $("inspect-title").textContent = title;
    $("inspect-text").hidden = text === null;
    $("inspect-text").textContent = text ?? "";
  }
}

function put(element, figure, note) {
  const small = document.createElement("small");
  small.textContent = note;
  element.replaceChildren(figure, small);
}

function number(value) {
  return Number.isInteger(value) ? String(value) : value.toFixed(1);
}

function percent(share) {
  return `${(100 * share).toFixed(share > 0 && share < 0.0995 ? 1 : 0)}%`;
}

function bytes(count) {
  const units = ["B", "KiB", "MiB", "GiB"];
  let unit = 0;
  while (count >= 1024 && unit < units.length - 1) {
    count /= 1024;
    unit++;
  }
  return `${count.toFixed(count < 10 && unit ? 1 : 0)} ${units[unit]}`;
}
